"""Decoding and scoring on this CPU by two checkouts of the package, in turns: is the newer one slower?

    git worktree add /tmp/before COMMIT
    python tools/bench_checkouts.py /tmp/before . [--threads 1] [--rounds 9] [--hidden 512] [--layers 8]

Random weights of one seed; each checkout runs in a process of its own, and a round asks both, in changing order. Wall
seconds and seconds of CPU, which other work on the machine disturbs less; the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = """
import json, sys, time
request = json.loads(sys.stdin.readline())
sys.path.insert(0, request["checkout"])
import torch
torch.set_num_threads(request["threads"])
from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Choose, Generate, Prompt
try:
    from qwen_eval.engines.native.engine import open_engine
except ImportError:
    from qwen_eval.engines.native import open_engine
spec = ModelSpec(name="bench", asset="qwen-nano", weights="random", dtype=request["dtype"], arch=request["arch"])
engine = open_engine(EngineSpec(), spec)
head = "The following are multiple choice questions. " * 12
exams = [Choose(prompt=Prompt.raw(head * (1 + i // 32) + "Question %d: " % i + "what is it? " * (i % 7)),
                choices=("A", "B", "C", "D")) for i in range(64)]
texts = [Generate(prompt=Prompt.raw(head + "Question %d" % i), max_new_tokens=48) for i in range(16)]
work = {"decode, 1 row": texts[:1], "decode, 16 rows": texts, "choices of 64 questions": exams}
for asks in work.values():
    list(engine.run(asks))
print("ready", flush=True)
for line in sys.stdin:
    found = {}
    for name, asks in work.items():
        cpu, wall = time.process_time(), time.perf_counter()
        list(engine.run(asks))
        found[name] = [time.perf_counter() - wall, time.process_time() - cpu]
    print(json.dumps(found), flush=True)
"""


def arch(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "kv_channels": 64, "intermediate_size": hidden * 5, "vocab_size": 4096, "seq_length": 2048, "no_bias": True,
        "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "use_dynamic_ntk": True,
        "use_logn_attn": True, "tie_word_embeddings": False, "scale_attn_weights": True,
    }  # fmt: skip


class Worker:
    def __init__(self, checkout: Path, request: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(request["threads"])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.ask(json.dumps({**request, "checkout": str(checkout)})).strip() == "ready"

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def seconds(self) -> dict[str, list[float]]:
        """(wall, CPU) of each kind of work."""
        found: dict[str, list[float]] = json.loads(self.ask("again"))
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    request = {"threads": options.threads, "dtype": options.dtype, "arch": arch(options.hidden, options.layers)}
    workers = [Worker(path.resolve(), request) for path in (options.before, options.after)]
    rounds = []
    for number in range(options.rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        measured = {side: workers[side].seconds() for side in order}
        rounds.append((measured[0], measured[1]))
    for worker in workers:
        worker.close()
    report(rounds, options.threads)


def report(rounds: list[tuple[dict[str, list[float]], dict[str, list[float]]]], threads: int) -> None:
    print(f"{threads} threads, {len(rounds)} rounds; seconds before / after and the ratio [smallest, largest]")
    for name in rounds[0][0]:
        for kind, label in enumerate(("wall", "CPU")):
            before, after = ([r[side][name][kind] for r in rounds] for side in (0, 1))
            ratios = [b / a for a, b in zip(before, after)]
            print(
                f"{name:26} {label:5} {statistics.median(before):7.3f} / {statistics.median(after):7.3f} s  "
                f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            )


if __name__ == "__main__":
    main()
