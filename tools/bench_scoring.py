"""MMLU scored by lm-evaluation-harness and by us: the same questions, checkpoint and machine, alternating in one run.

    python tools/bench_scoring.py --mmlu DIR [--peer PYTHON] [--vllm PYTHON] [--questions 100] [--dtype bf16]
    python tools/bench_scoring.py --mmlu DIR --hidden 2048 --questions 4    # our share of the GEMM peak, no peer needed
    python tools/bench_scoring.py --mmlu DIR --peer PYTHON --device cuda --hidden 2048 --layers 24 --batch-size auto

PYTHON is the interpreter of an environment that has lm_eval[hf] (or vllm). Prints wall seconds of the scoring itself
(models are loaded before the clock starts), tokens computed, ratio, equal answers, and the share of the GEMM peak that
the same process measured before and after. Only the products of the layers count as work, and of the last layer only
q, k and v: the rest of it is computed for one token a question. Attention, the head and everything else count as loss.
With --threads 1 and no peer, seconds are those of the thread's own clock: other processes slow it less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import LM_EVAL_HEAD, ROOT, add_options, clock_name, common_payload, in_turns, write_checkpoint

SUBJECTS = ("anatomy", "astronomy", "marketing", "world_religions")

OURS = """
import json, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tools"]
request = json.load(open(sys.argv[1]))
import torch
from peers import peak_flops
from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Choose, Prompt
from qwen_eval.engines.native.engine import open_engine
torch.set_num_threads(request["threads"])
clock = getattr(time, request["clock"])
engine = open_engine(EngineSpec(), ModelSpec(name="bench", path=request["checkpoint"], dtype=request["dtype"],
                                           device=request["device"]))
asks = [Choose(prompt=Prompt.raw(q["prompt"]), choices=(" A", " B", " C", " D")) for q in request["questions"]]
list(engine.run(asks[:8]))
engine.scorer.counters.computed_tokens = 0
peak = peak_flops(request["device"], request["dtype"], clock)
start = clock()
found = dict(engine.run(asks))
seconds = clock() - start
peak = max(peak, peak_flops(request["device"], request["dtype"], clock))
layers = engine.forward.model.layers
linears = [m for layer in [*layers[:-1], layers[-1].attn.qkv] for m in layer.modules() if hasattr(m, "in_features")]
flops = 2 * sum(m.in_features * m.out_features for m in linears) * engine.scorer.counters.computed_tokens
json.dump({{"seconds": seconds, "logprobs": [found[i].logprobs for i in range(len(asks))],
           "computed": engine.scorer.counters.computed_tokens, "flops": flops, "peak": peak}},
          open(request["result"], "w"))
"""

LM_EVAL = (
    LM_EVAL_HEAD
    + """
asks = [Instance("loglikelihood", {}, (q["prompt"], c), i, (None, None, 1))
        for i, q in enumerate(request["questions"]) for c in (" A", " B", " C", " D")]
lm.loglikelihood(asks[:8], disable_tqdm=True)
start = now()
found = [value for value, _ in lm.loglikelihood(asks, disable_tqdm=True)]
seconds = now() - start
json.dump({"seconds": seconds, "logprobs": [found[i:i + 4] for i in range(0, len(found), 4)]},
          open(request["result"], "w"))
"""
)

VLLM = """
import json, os, sys, time
os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="4", VLLM_LOGGING_LEVEL="ERROR")
if __name__ == "__main__":
    request = json.load(open(sys.argv[1]))
    from vllm import LLM, SamplingParams
    llm = LLM(request["checkpoint"], dtype={"bf16": "bfloat16", "fp32": "float32"}[request["dtype"]],
              enable_prefix_caching=True, max_model_len=4096)
    ids = [llm.get_tokenizer().encode(" " + x)[0] for x in "ABCD"]
    params = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=ids)  # all four, whatever is likelier
    prompts = [q["prompt"] for q in request["questions"]]
    llm.generate(prompts, params, use_tqdm=False)  # first pass: warm-up
    llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    found = [[o.outputs[0].logprobs[0][i].logprob for i in ids] for o in outputs]
    json.dump({"seconds": seconds, "logprobs": found}, open(request["result"], "w"))
"""


def questions(folder: str, per_subject: int) -> list[dict[str, Any]]:
    """The official 5-shot prompts of the first questions of four subjects."""
    sys.path.insert(0, str(ROOT))
    from qwen_eval.core import Choose
    from qwen_eval.tasks.mmlu import Mmlu
    from qwen_eval.tasks.registry import TaskContext

    spec = Mmlu.Spec(name="mmlu", path=folder, subjects=list(SUBJECTS))
    task = Mmlu(spec, TaskContext())
    taken: dict[str, int] = {}
    rows = []
    for sample in task.samples():
        taken[sample.group] = taken.get(sample.group, 0) + 1
        if taken[sample.group] <= per_subject:
            request = task.request(sample, ())
            assert isinstance(request, Choose)
            rows.append({"prompt": request.prompt.text, "answer": sample.target})
    return rows


def agreement(a: list[list[float]], b: list[list[float]]) -> tuple[int, float]:
    """Questions with the same best letter, and the largest difference of any letter's log-probability."""
    same = sum(max(range(4), key=x.__getitem__) == max(range(4), key=y.__getitem__) for x, y in zip(a, b))
    worst = max(abs(p - q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True))
    return same, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmlu", required=True, help="folder with dev/ and test/ in the official csv layout")
    parser.add_argument("--vllm", help="python of an environment with vllm")
    parser.add_argument("--questions", type=int, default=25, help="per subject, four subjects")
    parser.add_argument("--vocab", type=int, default=151936)
    add_options(parser, dtype="bf16")
    arguments = parser.parse_args()
    rows = questions(arguments.mmlu, arguments.questions)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), vocab_size=arguments.vocab, hidden=arguments.hidden, layers=arguments.layers)
        payload: dict[str, Any] = {"checkpoint": folder, "questions": rows, **common_payload(arguments)}
        workers = {"ours": (sys.executable, OURS.format(root=str(ROOT)))}
        if arguments.peer:
            workers["lm-eval"] = (arguments.peer, LM_EVAL)
        if arguments.vllm:
            workers["vllm"] = (arguments.vllm, VLLM)
        payload["clock"] = clock_name(arguments.threads, workers)
        results = in_turns(workers, payload, rounds=arguments.rounds)
        report(results, rows, arguments.dtype)


def report(results: dict[str, list[dict[str, Any]]], rows: list[Any], dtype: str) -> None:
    ours = results["ours"][0]
    shares = [r["flops"] / r["seconds"] / r["peak"] for r in results["ours"]]
    peak = statistics.median(r["peak"] for r in results["ours"])
    print(
        f"\n{len(rows)} questions, {dtype}; ours: {ours['computed']} tokens computed, {statistics.median(shares):.0%} "
        f"({min(shares):.0%} to {max(shares):.0%}) of the GEMM peak measured with it ({peak / 1e9:.0f} GFLOP/s)"
    )
    for name, runs in results.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        ratios = [r["seconds"] / o["seconds"] for r, o in zip(runs, results["ours"])]
        same, worst = agreement(ours["logprobs"], runs[0]["logprobs"])
        print(
            f"{name:8} {seconds:8.2f} s {len(rows) / seconds:7.1f} questions/s {statistics.median(ratios):5.1f} x ours "
            f"same answer {same}/{len(rows)}, largest difference {worst:.1e}"
        )
    print(json.dumps({name: [r["seconds"] for r in runs] for name, runs in results.items()}))


if __name__ == "__main__":
    main()
