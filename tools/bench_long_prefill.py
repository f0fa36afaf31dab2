"""Memory and time of scoring one long text: ours in chunks, and transformers' plain forward with all logits.

    python tools/bench_long_prefill.py [--tokens 32768] [--peer-tokens 4096] [--layers 24] [--chunk 1024]
                                         [--vocab 151936] [--hidden 896] [--threads 1] [--dtype fp32]

The shape is Qwen2.5-0.5B's with the vocabulary of 151,936, weights are random. Each side runs in a process of its own,
on one thread unless --threads says more. Prints wall seconds, the peak of resident memory beyond weights and KV cache
(Linux's VmHWM, reset before the clock starts), and the ratio of times at --peer-tokens (0: no peer).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SHAPE = {
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}


def main() -> None:
    args = arguments()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    ours = measured("ours", args, args.tokens)
    show("ours", args.tokens, ours)
    if args.peer_tokens:
        same = ours if args.peer_tokens == args.tokens else measured("ours", args, args.peer_tokens)
        peer = measured("transformers", args, args.peer_tokens)
        show("ours", args.peer_tokens, same)
        show("transformers", args.peer_tokens, peer)
        print(f"times: transformers / ours = {peer['wall_s'] / same['wall_s']:.2f} at {args.peer_tokens:,} tokens")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--peer-tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--side", choices=("", *SIDES), default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(side: str, args: argparse.Namespace, num_tokens: int) -> dict[str, Any]:
    options = {"tokens": num_tokens, "layers": args.layers, "chunk": args.chunk, "vocab": args.vocab}
    options |= {"hidden": args.hidden, "threads": args.threads}
    command = [sys.executable, __file__, "--side", side, "--dtype", args.dtype]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} at {num_tokens:,} tokens ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(side: str, num_tokens: int, found: dict[str, Any]) -> None:
    print(
        f"{side:12} {num_tokens:6,} tokens: {found['wall_s']:8.1f} s wall, {found['cpu_s']:8.1f} s processor; "
        f"{found['beyond_bytes'] / MIB:7.0f} MiB beyond weights and KV ({found['kv_bytes'] / MIB:.0f} MiB)",
        flush=True,
    )


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    heads = args.hidden // 64
    width = {"hidden_size": args.hidden, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 7)}
    return {**SHAPE, **width, "num_hidden_layers": args.layers, "vocab_size": args.vocab}


def text_of(args: argparse.Namespace) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(args.vocab) for _ in range(args.tokens)]


# --- the two sides, each in its own process --------------------------------------------------------------------------


def ours(args: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    import torch

    from qwen_eval.engines.native.scoring import Job, Scorer
    from qwen_eval.models.checkpoint import Placement, random_model
    from qwen_eval.models.config import ModelConfig
    from qwen_eval.models.runner import ModelRunner

    torch.set_num_threads(args.threads)
    config = ModelConfig.from_hf({"model_type": "qwen2", **shape_of(args)})
    model = random_model(config, Placement(device=torch.device("cpu"), dtype=dtype_of(args.dtype)), 0)
    scorer = Scorer(ModelRunner(model, prefill_chunk=args.chunk))
    ids = text_of(args)
    kv_bytes = 2 * args.layers * args.tokens * config.num_kv_heads * config.head_dim * model.dtype.itemsize

    def score() -> float:
        ((_, found),) = scorer.run([Job(ids=tuple(ids))])
        return float(found.logprobs.mean())

    list(Scorer(scorer.forward).run([Job(ids=tuple(ids[:16]))]))
    return timed(score, kv_bytes)


def transformers(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(args.threads)
    model = Qwen2ForCausalLM(Qwen2Config(**shape_of(args))).to(dtype_of(args.dtype)).eval()
    ids = torch.tensor([text_of(args)])

    @torch.inference_mode()
    def score() -> float:
        logits = model(ids, use_cache=False).logits
        logprobs = logits[0, :-1].float().log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None]).mean())

    with torch.inference_mode():
        model(ids[:, :16], use_cache=False)
    return timed(score, 0)


def dtype_of(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def timed(score: Callable[[], float], kv_bytes: int) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now: weights and libraries
    before = memory_bytes("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    mean = score()
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    beyond = memory_bytes("VmHWM") - before - kv_bytes
    return {"wall_s": wall_s, "cpu_s": cpu_s, "mean": mean, "kv_bytes": kv_bytes, "beyond_bytes": beyond}


def memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


SIDES = {"ours": ours, "transformers": transformers}

if __name__ == "__main__":
    main()
