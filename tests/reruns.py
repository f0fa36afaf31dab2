"""Simulated reruns of every kind of task: how often the gate cries wolf, how often it finds what it says it finds.

    python tests/reruns.py 1000     # the table of docs/statistics.md

Every baseline is drawn itself and compared with one rerun, as in CI over the years.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_eval.metrics import perplexity, share
from qwen_eval.report.compare import compare_runs
from qwen_eval.report.comparison import Margins, Side
from qwen_eval.report.items import Item
from qwen_eval.report.verdict import Judgement, judge
from qwen_eval.runs.record_json import metric_to_json
from qwen_eval.runs.run import Run

Array = NDArray[np.float64]
DAY = 0.02  # standard deviation of the log speed of one machine from day to day


@dataclass(frozen=True, kw_only=True)
class Family:
    """`rerun(rng, base, effect)`: the same model again with the family's own noise, `effect` worse (0: unchanged)."""

    base: Callable[[np.random.Generator], Any]
    first: Callable[[Any], Side]
    rerun: Callable[[np.random.Generator, Any, float], Side]
    beyond: float = 0.0  # on top of the stated effect, for noise that one run cannot show


def false_alarms(family: Family, num: int, *, seed: int) -> int:
    """How many of `num` unchanged reruns are called worse or better."""
    rng = np.random.default_rng(seed)
    return sum(_again(family, rng, family.base(rng), 0.0).verdict in ("worse", "better") for _ in range(num))


def found_regressions(family: Family, num: int, *, seed: int) -> int:
    """How many of `num` regressions, each of the size that its own report states, are called worse."""
    rng, found = np.random.default_rng(seed), 0
    for _ in range(num):
        base = family.base(rng)
        stated = _again(family, rng, base, 0.0).mde
        assert stated is not None
        found += _again(family, rng, base, stated + family.beyond).verdict == "worse"
    return found


def _again(family: Family, rng: np.random.Generator, base: Any, effect: float) -> Judgement:
    [comparison] = compare_runs(family.first(base), family.rerun(rng, base, effect), Margins())
    return judge(comparison)


def side(values: Array, *, tokens: NDArray[np.int64] | None = None, documents: int = 0) -> Side:
    """A run in memory: scores, or with `tokens` sums of NLL; `documents` clusters of equal size."""
    items = {
        f"q{i}": Item(
            id=f"q{i}", answer_sha256=f"{x!r}", extracted=None, score=None if tokens is not None else float(x),
            nll=float(x) if tokens is not None else None, num_tokens=0 if tokens is None else int(tokens[i]),
            cluster=f"d{i * documents // len(values)}" if documents else "",
        )
        for i, x in enumerate(values)
    }  # fmt: skip
    metric = share(list(values)) if tokens is None else perplexity(list(values), [int(t) for t in tokens])
    config = {"task": {"name": "t"}, "model": {"name": "m"}}
    run = Run(path=Path("x"), spec={"config": config}, result={"metrics": {"m": metric_to_json(metric)}})
    return Side(run=run, given=items)


def choice_base(rng: np.random.Generator) -> Array:
    return (rng.random(150) < 0.6).astype(float)


def choice_rerun(rng: np.random.Generator, base: Array, effect: float) -> Side:
    """Close calls fall the other way in 2 % of the items; a regression turns right ones wrong."""
    flipped = np.where(rng.random(150) < 0.02, 1 - base, base)
    return side(np.where((flipped > 0) & (rng.random(150) < effect / base.mean()), 0.0, flipped))


def sampled_base(rng: np.random.Generator) -> tuple[Array, Array]:
    chances = rng.beta(0.8, 0.8, 120)
    return chances, (rng.random(120) < chances).astype(float)


def sampled_rerun(rng: np.random.Generator, base: tuple[Array, Array], effect: float) -> Side:
    drawn = (rng.random(120) < base[0]).astype(float)
    return side(np.where((drawn > 0) & (rng.random(120) < effect / base[0].mean()), 0.0, drawn))


def passed_base(rng: np.random.Generator) -> tuple[Array, Array]:
    chances = rng.beta(0.5, 0.7, 60)
    return chances, rng.binomial(10, chances) / 10


def passed_rerun(rng: np.random.Generator, base: tuple[Array, Array], effect: float) -> Side:
    chances = base[0] * (1 - effect / base[0].mean())
    return side(rng.binomial(10, chances) / 10)


def document_base(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    tokens = rng.integers(200, 2000, 50)  # 25 documents in two blocks each
    return np.repeat(rng.normal(2.3, 0.4, 25), 2) * tokens, tokens


def document_rerun(rng: np.random.Generator, base: tuple[Array, NDArray[np.int64]], effect: float) -> Side:
    nll, tokens = base
    noise = np.repeat(rng.normal(0, 0.02, 25), 2) + rng.normal(0, 0.01, 50)
    return side(nll + (effect + noise) * tokens, tokens=tokens, documents=25)


def speed_side(raw: Array) -> Side:
    spec = {"kind": "profile", "config": {"task": {"name": "decode"}, "model": {"name": "m"}}}
    result = {"cells": [{"name": "decode", "tok_per_s": raw.tolist()}], "device": {"name": "d"}}
    return Side(run=Run(path=Path("x"), spec=spec, result=result))


def speed_base(rng: np.random.Generator) -> Array:
    """Seven repeats with 1.5 % spread, on a machine that is 2 % faster or slower from day to day."""
    return 40.0 * np.exp(rng.normal(0, DAY) + rng.normal(0, 0.015, 7))


def speed_rerun(rng: np.random.Generator, _: Array, effect: float) -> Side:
    return speed_side(speed_base(rng) * math.exp(-effect))


FAMILIES = {
    "choice accuracy, 150 items": Family(base=choice_base, first=side, rerun=choice_rerun),
    "sampled answers, 120 items": Family(base=sampled_base, first=lambda b: side(b[1]), rerun=sampled_rerun),
    "pass@1 of ten draws, 60 problems": Family(base=passed_base, first=lambda b: side(b[1]), rerun=passed_rerun),
    "perplexity, 25 documents": Family(
        base=document_base, first=lambda b: side(b[0], tokens=b[1], documents=25), rerun=document_rerun
    ),
    "speed, 7 repeats": Family(
        base=speed_base, first=speed_side, rerun=speed_rerun, beyond=0.84 * math.sqrt(2) * DAY  # a day may hide it
    ),
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    num = int(argv[0]) if argv else 1000
    print("| family | false alarms | regressions of the stated size found |\n|---|---:|---:|")
    for name, family in FAMILIES.items():
        alarms, found = false_alarms(family, num, seed=31), found_regressions(family, num, seed=32)
        print(f"| {name} | {alarms / num:.1%} | {found / num:.1%} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
