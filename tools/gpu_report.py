"""Every figure of the GPU table of docs/profile.md on this machine, in one command: reports/gpu/DEVICE.md and .json.

    python tools/gpu_report.py [--out reports/gpu] [--questions 14042]   # a 7B shape of random weights
    python tools/gpu_report.py --peer PYTHON --mmlu DIR --gsm8k FILE     # and against lm-evaluation-harness
    python tools/gpu_report.py --smoke --out /tmp/gpu                    # a miniature on the CPU, to try the command

Decode, encode and memory come from `python -m qwen_eval.profile`, predicted bytes beside measured ones. The choice
questions are made up, about as long as those of MMLU 5-shot: 57 heads of 600 tokens, questions of 120. A cell that
fails is a row with its reason. PYTHON is the interpreter of an environment with lm_eval[hf].
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Cell = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Model names and sizes of the cells."""

    plain: str = "qwen-7b"
    int4: str = "qwen-7b-chat-int4"
    int8: str = "qwen-7b-chat-int8"
    seq: int = 256
    batch: int = 64
    context: int = 8192
    encode: tuple[int, ...] = (2048, 8192)
    head_tokens: int = 600
    question_tokens: int = 120
    subjects: int = 57

    def cells(self) -> dict[str, list[str]]:
        """Arguments of `python -m qwen_eval.profile`, by name."""
        bf16 = [f"model={self.plain}", "model.dtype=bf16"]
        caches = "kv_cache=auto,int8"
        return {
            "decode": [*bf16, f"seq={self.seq}"],
            "int4": [f"model={self.int4}", f"seq={self.seq}"],
            "int8": [f"model={self.int8}", f"seq={self.seq}"],
            "batch": [*bf16, f"seq={self.seq}", f"batch={self.batch}", caches],
            "long": [*bf16, "mode=serve", f"seq={self.context}", "new_tokens=64", caches],
            "encode": [*bf16, "mode=encode", f"seq={','.join(map(str, self.encode))}"],
        }


SMOKE = Work(
    plain="qwen-nano", int4="qwen-nano", int8="qwen-nano", seq=4, batch=2, context=8, encode=(8, 16), head_tokens=20,
    question_tokens=8, subjects=2,
)  # fmt: skip


def profiled(name: str, arguments: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The cells of one profile; one that failed when the command did."""
    fixed = ["model.weights=random", f"runs_dir={folder}", f"tag={name}"]
    command = [sys.executable, "-m", "qwen_eval.profile", *arguments, *fixed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = list(folder.glob(f"profile/speed/*/{name}/result.json"))
    if not found:
        return [{"status": "failed", "reason": " ".join((done.stderr or done.stdout).split())[-300:]}]
    cells: list[dict[str, Any]] = json.loads(found[0].read_text())["cells"]
    return cells


def choices(work: Work, questions: int) -> dict[str, Any]:
    """Seconds for all questions, and FLOP/s as a share of the matrix product's."""
    sys.path.insert(0, str(ROOT))
    from qwen_eval import cli
    from qwen_eval.config import EngineSpec, EvalSpec
    from qwen_eval.core import Choose, Prompt
    from qwen_eval.engines.native.engine import open_engine
    from qwen_eval.models.cost import num_linear_weights
    from qwen_eval.models.device import probe

    overrides = [f"model={work.plain}", "model.weights=random", "model.dtype=bf16"]
    engine = open_engine(EngineSpec(), cli.compose(overrides, config_name="config", schema=EvalSpec).model)
    draw, words = random.Random(0), [f" {letter}" for letter in "abcdefghijklmnop"]  # of one token each
    heads = ["".join(draw.choices(words, k=work.head_tokens)) for _ in range(work.subjects)]
    asks = [
        Choose(
            prompt=Prompt.raw(heads[i % work.subjects] + "".join(draw.choices(words, k=work.question_tokens))),
            choices=("A", "B", "C", "D"),
        )
        for i in range(questions)
    ]
    list(engine.run(asks[: work.subjects]))
    before, start = int(str(engine.info["computed_tokens"])), time.perf_counter()
    list(engine.run(asks))
    seconds = time.perf_counter() - start
    tokens = int(str(engine.info["computed_tokens"])) - before
    device = probe(engine.forward.device, "bf16")
    flops = 2.0 * num_linear_weights(engine.forward.config) * tokens / seconds
    engine.close()
    assert device.best_flops is not None
    return {"status": "ok", "seconds": seconds, "tokens": tokens, "share": flops / device.best_flops}


def table(results: Mapping[str, Sequence[Cell]], work: Work) -> list[tuple[str, str]]:
    """(work, what was measured) for each row of the table of docs/profile.md."""
    decode, int4, int8 = (results[name][0] for name in ("decode", "int4", "int8"))
    batch = _with(results["batch"], "auto")
    return [
        ("decode BF16, batch 1", _share(decode, "decode_share", "of the bandwidth")),
        ("Int8 / Int4 against BF16, batch 1", f"{_ratio(int8, decode)} / {_ratio(int4, decode)}"),
        (f"decode BF16, batch {work.batch}", _share(batch, "decode_share", "of the bandwidth")),
        *((f"int8 cache against BF16 cache, {what}", _ratio(_with(results[name], "int8"), _with(results[name], "auto")))
          for what, name in ((f"batch {work.batch}", "batch"), (f"{work.context:,} tokens of context", "long"))),
        *((f"encode {cell.get('seq', '?'):,}", _share(cell, "prefill_share", "of the matrix product's peak"))
          for cell in results["encode"]),
        ("choice questions, 5-shot", _questions(results["choices"][0])),
        ("load Int4", f"{int4['load_s']:.0f} s" if int4["status"] == "ok" else _why(int4)),
    ]  # fmt: skip


def memory(results: Mapping[str, Sequence[Cell]]) -> list[tuple[str, str]]:
    """(cell, predicted against measured peak)."""
    rows = []
    for name, cells in results.items():
        for cell in cells:
            if cell["status"] == "ok" and cell.get("peak_bytes"):
                measured = cell["peak_bytes"] - cell.get("baseline_bytes", 0)
                predicted = cell["predicted_bytes"]
                text = f"{predicted / 2**30:.2f} / {measured / 2**30:.2f} GiB, {predicted / max(measured, 1) - 1:+.1%}"
                rows.append((f"{name}: {cell['key']}, {cell['kv_cache']} cache", text))
    return rows


def _with(cells: Sequence[Cell], kv_cache: str) -> Cell:
    return next((cell for cell in cells if cell.get("kv_cache") == kv_cache), cells[0])


def _why(cell: Cell) -> str:
    return f"{cell['status']}: {cell.get('reason', '')}"


def _share(cell: Cell, key: str, of: str) -> str:
    if cell["status"] != "ok":
        return _why(cell)
    rate = sorted(cell["tok_per_s"])[len(cell["tok_per_s"]) // 2]
    return f"{rate:,.1f} tokens/s" + ("" if cell[key] is None else f", {cell[key]:.0%} {of}")


def _ratio(cell: Cell, to: Cell) -> str:
    bad = next((each for each in (cell, to) if each["status"] != "ok"), None)
    return _why(bad) if bad else f"{to['tpot_s']['mean'] / cell['tpot_s']['mean']:.2f} x"


def _questions(cell: Cell) -> str:
    if cell["status"] != "ok":
        return _why(cell)
    return f"{cell['seconds']:.1f} s, {cell['tokens']:,} tokens, {cell['share']:.0%} of the matrix product's peak"


def comparisons(python: str, mmlu: str, gsm8k: str) -> dict[str, list[str]]:
    """Commands that ask the same of lm-evaluation-harness, on a model of 24 layers of width 2,048."""
    both = ["--peer", python, "--device", "cuda", "--dtype", "bf16", "--hidden", "2048", "--layers", "24",
            "--batch-size", "auto", "--rounds", "1"]  # fmt: skip
    return {
        "MMLU 5-shot": ["tools/bench_scoring.py", "--mmlu", mmlu, "--questions", "100", *both],
        "GSM8K 8-shot": [
            "tools/bench_generation.py",
            "--gsm8k",
            gsm8k,
            "--questions",
            "128",
            "--new-tokens",
            "128",
            *both,
        ],
    }


def compared(commands: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What each command printed last, or why it failed."""
    cells: list[dict[str, Any]] = []
    for name, arguments in commands.items():
        print(f"{name}: {' '.join(arguments)}", flush=True)
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-4:]
        cells.append({"status": "ok" if done.returncode == 0 else "failed", "what": name, "said": said})
    return cells


def page(results: Mapping[str, Sequence[Cell]], work: Work, device: str) -> str:
    kernels = {name: cells[0].get("engine", {}) for name, cells in results.items() if cells}
    used = [
        f"- {name}: " + ", ".join(f"{key} {facts[key]}" for key in KERNELS if facts.get(key))
        for name, facts in kernels.items()
        if facts
    ]
    lines = [f"# {device}: {work.plain}, random weights", "", "| work | measured |", "|---|---|"]
    lines += [f"| {what} | {found} |" for what, found in table(results, work)]
    lines += ["", "| peak memory | predicted / measured |", "|---|---|"]
    lines += [f"| {what} | {found} |" for what, found in memory(results)]
    for cell in results.get("against", ()):
        lines += [
            "",
            f"{cell['what']} against lm-evaluation-harness ({cell['status']}):",
            "",
            "```",
            *cell["said"],
            "```",
        ]
    return "\n".join([*lines, "", "Kernels:", "", *used, "", "Made by `python tools/gpu_report.py`.", ""])


KERNELS = ("attention", "decode_attention", "small_kernels", "kernels", "dense_kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "gpu")
    parser.add_argument("--questions", type=int, default=14042, help="choice questions; MMLU has 14,042")
    parser.add_argument("--smoke", action="store_true", help="a miniature, to try the command without a GPU")
    parser.add_argument("--peer", help="python of an environment with lm_eval[hf]")
    parser.add_argument("--mmlu", help="folder with dev/ and test/ in the official layout")
    parser.add_argument("--gsm8k", help="the official test.jsonl")
    options = parser.parse_args()
    if options.peer and not (options.mmlu and options.gsm8k):
        parser.error("--peer needs --mmlu and --gsm8k")
    work = SMOKE if options.smoke else Work()
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in work.cells().items():
            print(f"{name}: {' '.join(arguments)}", flush=True)
            results[name] = profiled(name, arguments, Path(folder))
    try:
        results["choices"] = [choices(work, 8 if options.smoke else options.questions)]
    except Exception as error:  # the cells before it took minutes and are kept
        results["choices"] = [{"status": "failed", "reason": f"{type(error).__name__}: {error}"}]
    if options.peer:
        results["against"] = compared(comparisons(options.peer, options.mmlu, options.gsm8k))
    write(results, work, options.out)


def write(results: Mapping[str, Sequence[Cell]], work: Work, out: Path) -> None:
    device = next(
        (cell["device"]["name"] for cells in results.values() for cell in cells if "device" in cell), "unknown"
    )
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    (out / f"{name}.md").write_text(page(results, work, device))
    print((out / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
