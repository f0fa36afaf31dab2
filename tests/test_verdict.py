"""Words for what two runs show: twelve constructed pairs, and what must not be hidden or claimed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import get_args

import numpy as np
import pytest

from qwen_eval.core import Metric
from qwen_eval.report.compare import adjusted
from qwen_eval.report.comparison import Comparison, Verdict
from qwen_eval.report.paired import Difference, paired_perplexity, paired_share, speed_ratio
from qwen_eval.report.verdict import Word, decide, joint, judge, judge_all

RNG = np.random.default_rng(9)


def answers(
    n: int, *, lost: int, gained: int, clusters: Sequence[Hashable] | None = None, task: str = "mmlu"
) -> Comparison:
    """`n` questions; the first `lost` of them were right before, the next `gained` are right now."""
    first = [1.0] * lost + [0.0] * gained + [1.0] * (n - lost - gained)
    second = [0.0] * lost + [1.0] * gained + [1.0] * (n - lost - gained)
    return pair(paired_share(first, second, clusters), task=task)


def texts(documents: int, *, shift: float, spread: float, task: str = "long_ppl") -> Comparison:
    """Documents of a thousand tokens whose NLL per token moves by `shift`, give or take `spread`."""
    base = RNG.normal(2.3, 0.4, documents) * 1000
    noise = RNG.normal(size=documents)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    moved = base + (shift + spread * noise) * 1000
    return pair(paired_perplexity(base.tolist(), moved.tolist(), [1000] * documents), task=task, family="ppl")


def pair(difference: Difference, *, task: str, family: str = "share") -> Comparison:
    margin = {"share": 0.01, "ppl": math.log1p(0.01), "speed": math.log1p(0.1)}[family]
    return Comparison(
        task=task, label="m", family=family, first=Metric(value=0.5, n=1), second=Metric(value=0.5, n=1),
        higher_is_better=family != "ppl", difference=difference, margin=margin,
    )  # type: ignore[arg-type]  # fmt: skip


PAIRS: list[tuple[str, Comparison, str, Verdict]] = [
    (
        "much data, as many lost as gained",
        answers(14_042, lost=140, gained=140),
        "equivalent within 1.0 points",
        "unchanged",
    ),
    ("much data, two points lost", answers(14_042, lost=400, gained=100), "worse by more than 1.0 points", "worse"),
    (
        "a small loss, certain but within the margin",
        answers(14_042, lost=200, gained=100),
        "equivalent within 1.0 points",
        "unchanged",
    ),
    ("a loss as large as the margin", answers(14_042, lost=240, gained=100), "not decided", "worse"),
    ("a point gained", answers(14_042, lost=100, gained=260), "better", "better"),
    (
        "more gained than lost, not certainly",
        answers(1_319, lost=3, gained=10),
        "not worse by more than 1.0 points",
        "cannot tell",
    ),
    ("more lost than gained, not certainly", answers(1_319, lost=10, gained=3), "not decided", "cannot tell"),
    ("too few items", answers(150, lost=2, gained=2), "not decided", "cannot tell"),
    ("perplexity as it was", texts(25, shift=0.0005, spread=0.002), "equivalent within 1.00 %", "unchanged"),
    ("perplexity three per cent up", texts(25, shift=0.03, spread=0.01), "worse by more than 1.00 %", "worse"),
    ("five documents", texts(5, shift=0.004, spread=0.01), "not decided", "cannot tell"),
    (
        "all losses in one of six documents",
        answers(600, lost=30, gained=0, clusters=[i // 100 for i in range(600)]),
        "not decided",
        "cannot tell",
    ),
]


@pytest.mark.parametrize(("comparison", "text", "verdict"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])
def test_a_pair_gets_its_words(comparison: Comparison, text: str, verdict: Verdict) -> None:
    judgement = judge(comparison)
    assert judgement.decision is not None
    assert judgement.decision.text.startswith(text)
    assert judgement.decision.word in get_args(Word)
    assert judgement.verdict == verdict


def test_cannot_tell_does_not_hide_what_is_shown() -> None:
    """Ten gained and three lost of 1,319 may be chance, but it is no loss of a point."""
    assert judge(answers(1_319, lost=3, gained=10)).why.endswith("; not worse by more than 1.0 points")
    assert judge(answers(1_319, lost=10, gained=3)).why.endswith("; not better by more than 1.0 points")
    assert "more than 1.0 points" not in judge(answers(150, lost=2, gained=2)).why


def test_as_many_more_items_as_said_decide() -> None:
    decision = decide(answers(1_319, lost=30, gained=30))
    assert decision is not None
    assert decision.text == f"not decided (about {decision.num_more:,} more items would decide)"
    assert decision.num_more is not None
    more = 1_319 + decision.num_more
    flips = round(30 * more / 1_319)
    assert decide(answers(more, lost=flips, gained=flips)).word == "equivalent"  # type: ignore[union-attr]
    assert decide(answers(1_319, lost=23, gained=10)).num_more is None  # type: ignore[union-attr]  # Δ is the margin
    assert "more documents" in decide(texts(5, shift=0.004, spread=0.01)).text  # type: ignore[union-attr]


def test_below_seven_draws_there_is_an_interval_and_no_test() -> None:
    """All of six clusters may move one way by chance alone three times of a hundred: no test can say more."""
    clusters = [i // 20 for i in range(120)]
    found = judge(answers(120, lost=120, gained=0, clusters=clusters))
    assert found.verdict == "cannot tell"
    assert "too few independent draws to test: fewer than 7" in found.why
    assert "-100.0 points" in found.why
    assert found.comparison.difference is not None
    assert found.comparison.difference.low is not None
    assert found.mde is None
    assert judge(answers(140, lost=140, gained=0, clusters=[i // 20 for i in range(140)])).verdict == "worse"
    assert judge(answers(6, lost=6, gained=0)).verdict == "cannot tell"
    assert judge(answers(7, lost=7, gained=0)).verdict == "worse"


def test_worse_needs_holm_and_equivalent_does_not() -> None:
    """One of forty tasks loses by chance what would be significant alone; equivalence of forty holds as it is."""
    alone = answers(400, lost=14, gained=2, task="unlucky")
    assert judge(alone).verdict == "worse"
    others = [answers(14_042, lost=140, gained=140, task=f"t{i}") for i in range(39)]
    found = judge_all(adjusted([alone, *others]))
    assert found[0].verdict == "cannot tell"
    assert [j.decision.word for j in found[1:] if j.decision] == ["equivalent"] * 39


def test_speed_takes_no_part_of_the_level() -> None:
    loss = answers(400, lost=14, gained=3)
    speeds = [
        pair(speed_ratio([40.0, 40.4, 39.8, 40.1], [40.2, 40.0, 39.9, 40.3]), task=f"s{i}", family="speed")
        for i in range(9)
    ]
    found = judge_all(adjusted([loss, *speeds]))
    assert found[0].comparison.p_adjusted == loss.difference.p_value  # type: ignore[union-attr]
    assert [j.comparison.p_adjusted for j in found[1:]] == [None] * 9
    assert {j.num_tests for j in found} == {1}
    assert found[1].decision is None


@pytest.mark.parametrize(("comparisons", "sentence"), [
    ([answers(14_042, lost=100, gained=100), texts(25, shift=0.0, spread=0.002)],
     "equivalent on all 2 tasks, each within its margin"),
    ([answers(14_042, lost=100, gained=100), answers(1_319, lost=3, gained=10, task="gsm8k")],
     "not worse by more than the margin on any of 2 tasks"),
    ([answers(14_042, lost=100, gained=100), answers(1_319, lost=60, gained=0, task="gsm8k")],
     "worse by more than the margin: gsm8k"),
    ([answers(14_042, lost=100, gained=100), answers(150, lost=2, gained=2, task="nano")],
     "not decided for all tasks together: nano not decided"),
    ([texts(25, shift=0.2, spread=0.002), texts(25, shift=0.2, spread=0.002)],
     "worse by more than the margin: long_ppl"),
    ([texts(25, shift=0.0, spread=0.002), texts(25, shift=0.0, spread=0.002)],
     "equivalent on long_ppl, each length within its margin"),
])  # fmt: skip
def test_all_tasks_are_told_in_one_sentence(comparisons: list[Comparison], sentence: str) -> None:
    assert joint(judge_all(adjusted(comparisons))) == sentence
