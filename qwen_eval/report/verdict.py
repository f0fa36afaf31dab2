"""From a comparison to one word: worse, better, unchanged, cannot tell, not comparable. docs/statistics.md says why.

"Worse" and "better" need significance (Holm over all tests of the report); "unchanged" needs evidence as well: the
same answers, or an interval inside the margin. Everything else is "cannot tell at this n".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from qwen_eval.metrics import t_quantile
from qwen_eval.report.comparison import Comparison, Verdict
from qwen_eval.report.paired import LEVEL, POWER, Difference

MOST_MORE = 1_000_000  # beyond that Δ lies on the margin, and no number decides

Word: TypeAlias = Literal["equivalent", "worse by more than the margin", "better", "not worse", "not decided"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Is the change within the margin, on questions like these? `text` is the word with the margin in figures.

    `num_more` independent draws (items, documents) would about decide it, where Δ and its spread stay as they are.
    """

    word: Word
    text: str
    num_more: int | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """`why` is one sentence. `num_tests`: how many comparisons share the 5 % chance of a false alarm."""

    comparison: Comparison
    verdict: Verdict
    why: str
    num_tests: int = 1

    @property
    def mde(self) -> float | None:
        """The smallest change for the worse that would be found four times of five, on the scale of the difference."""
        return smallest_shown(self.comparison, self.num_tests)

    @property
    def decision(self) -> Decision | None:
        """Whether the change matters; None for speed, whose verdict says it, and where there is no interval."""
        return decide(self.comparison)


def judge(comparison: Comparison, *, num_tests: int = 1) -> Judgement:
    verdict, why = _verdict(comparison, num_tests)
    return Judgement(comparison=comparison, verdict=verdict, why=why, num_tests=num_tests)


def judge_all(comparisons: list[Comparison]) -> list[Judgement]:
    tested = sum(
        c.family != "speed" and c.difference is not None and c.difference.p_value is not None for c in comparisons
    )
    return [judge(comparison, num_tests=max(1, tested)) for comparison in comparisons]


def smallest_shown(comparison: Comparison, num_tests: int = 1) -> float | None:
    """The smallest change that `judge` calls worse with 80 % power, on the scale of the difference."""
    difference = comparison.difference
    if difference is None or difference.error is None:
        return None
    dof = max(difference.dof, 1.0)
    half, reach = t_quantile(dof) * difference.error, t_quantile(dof, POWER) * difference.error
    if comparison.family == "speed":
        return comparison.margin + half + reach
    by_test = difference.mde(LEVEL / num_tests)
    # significant alone is not enough: the interval must also leave the margin
    return None if by_test is None else max(by_test, comparison.margin - half + reach)


def _verdict(c: Comparison, num_tests: int) -> tuple[Verdict, str]:
    """Nothing that got better may hide what got worse: every way to "worse" is tried before any other word."""
    if c.failures:
        return "worse", "; ".join(c.failures)
    if c.not_comparable:
        return "not comparable", "; ".join(c.not_comparable)
    if c.is_identical:
        return "unchanged", "every answer is the same"
    gains, losses = c.regraded
    if losses > gains:
        return "worse", _reread(gains, losses)
    verdict, why = _by_test(c)
    if not gains or verdict == "worse":
        return verdict, why
    if _is_worse_without_rereads(c, num_tests):
        return "worse", f"{why}; {_reread(gains, losses)}, and the others got worse"
    # what was read otherwise both ways is no plain gain: the tests say what it comes to
    return ("better", _reread(gains, losses)) if not losses else (verdict, f"{why}; {_reread(gains, losses)}")


def _is_worse_without_rereads(c: Comparison, num_tests: int) -> bool:
    d = c.without_rereads
    if d is None or d.p_value is None:
        return False
    p_value = min(1.0, d.p_value * num_tests)
    return _by_test(replace(c, difference=d, p_adjusted=p_value))[0] == "worse"


def _by_test(c: Comparison) -> tuple[Verdict, str]:
    difference = c.difference
    if c.family == "speed" and difference is not None:
        return _by_speed(c, difference)
    if difference is None or difference.low is None or difference.high is None:
        return "cannot tell", "fewer than two independent draws" if difference is not None else "; ".join(c.notes)
    return _by_quality(c, difference)


def _by_quality(c: Comparison, difference: Difference) -> tuple[Verdict, str]:
    low, high = difference.low or 0.0, difference.high or 0.0
    p_value = _p_value(c, difference)
    is_significant = p_value is not None and p_value <= LEVEL
    if -c.margin <= low and high <= c.margin:
        tail = ", though the small change is more than chance" if is_significant else ""
        return "unchanged", f"the interval lies within the margin of {shown(c, c.margin)}{tail}"
    delta = f"Δ {shown(c, difference.delta, sign=True)}"
    if is_significant:
        is_better = (difference.delta > 0) == c.higher_is_better
        return ("better" if is_better else "worse"), f"{delta}, p {equals(p_value)}"
    known = _what_is_known(c, difference)
    if p_value is None:
        return "cannot tell", f"{delta}, {difference.test}{known}"
    return "cannot tell", f"{delta} may be chance, p {equals(p_value)}{known}"


def _p_value(c: Comparison, difference: Difference) -> float | None:
    return c.p_adjusted if c.p_adjusted is not None else difference.p_value


def _by_speed(c: Comparison, difference: Difference) -> tuple[Verdict, str]:
    """Repeats of one run do not show how runs differ, so the whole interval must lie beyond the margin.

    What was measured once has no interval: the ratio itself must.
    """
    has_interval = difference.low is not None and difference.high is not None
    low, high = (difference.low or 0.0, difference.high or 0.0) if has_interval else (difference.delta,) * 2
    text = f"{math.exp(difference.delta):.3f} ×"
    text += f" [{math.exp(low):.3f}, {math.exp(high):.3f}]" if has_interval else ", measured once,"
    is_up, is_down = low > c.margin, high < -c.margin
    if is_up or is_down:
        verdict: Verdict = "better" if is_up == c.higher_is_better else "worse"
        return verdict, f"{text} lies beyond the margin of {math.expm1(c.margin):.0%}"
    if -c.margin <= low and high <= c.margin:
        return "unchanged", f"{text} lies within the margin of {math.expm1(c.margin):.0%}"
    return "cannot tell", f"{text} is neither within nor beyond the margin of {math.expm1(c.margin):.0%}"


# --- equivalence -----------------------------------------------------------------------------------------------------


def decide(c: Comparison) -> Decision | None:
    """The interval of Δ against the margin. "Worse" and "better" need the test as well, so that Holm's level holds over
    all tasks; "equivalent" and "not worse" need none: that every one of them is true is no matter of luck.
    """
    difference = c.difference
    if c.family == "speed" or difference is None or difference.low is None or difference.high is None:
        return None
    low, high = _towards_better(c, difference.low, difference.high)
    margin, p_value = shown(c, c.margin), _p_value(c, difference)
    is_significant = p_value is not None and p_value <= LEVEL
    if -c.margin <= low and high <= c.margin:
        return Decision(word="equivalent", text=f"equivalent within {margin}")
    if high < -c.margin and is_significant:
        return Decision(word="worse by more than the margin", text=f"worse by more than {margin}")
    if low > 0 and is_significant:
        return Decision(word="better", text="better")
    if low >= -c.margin:
        return Decision(word="not worse", text=f"not worse by more than {margin}")
    num_more = _num_more(c, difference, low, high)
    unit = "documents" if c.family == "ppl" else "items" if difference.num_clusters == difference.n else "clusters"
    tail = f" (about {num_more:,} more {unit} would decide)" if num_more else ""
    return Decision(word="not decided", text=f"not decided{tail}", num_more=num_more)


def joint(judgements: Sequence[Judgement]) -> str:
    """All tasks in one sentence: every one must hold for "not worse", and Holm's p-values say which one broke."""
    found = [(j.comparison.task, decision) for j in judgements if (decision := j.decision) is not None]
    missing = [j.comparison.task for j in judgements if j.decision is None and j.comparison.family != "speed"]
    tasks = _once(task for task, _ in found)  # perplexity has a comparison a length
    are_many = len(tasks) > 1
    broken = _once(task for task, decision in found if decision.word == "worse by more than the margin")
    if broken:
        return f"worse by more than the margin: {', '.join(broken)}"
    open_ones = _once([task for task, decision in found if decision.word == "not decided"] + missing)
    if open_ones or not found:
        return f"not decided for all tasks together: {', '.join(open_ones)} not decided"
    if all(decision.word == "equivalent" for _, decision in found):
        where = f"on all {len(tasks)} tasks, each" if are_many else f"on {tasks[0]}, each length"
        return f"equivalent {where} within its margin"
    return f"not worse by more than the margin on any {f'of {len(tasks)} tasks' if are_many else 'length'}"


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _towards_better(c: Comparison, low: float, high: float) -> tuple[float, float]:
    """The interval with the better end up."""
    return (low, high) if c.higher_is_better else (-high, -low)


def _num_more(c: Comparison, difference: Difference, low: float, high: float) -> int | None:
    """Draws that would bring the nearest of the answers into reach; the interval narrows with their square root."""
    delta = difference.delta if c.higher_is_better else -difference.delta
    room = -c.margin - delta if delta < -c.margin else max(c.margin - abs(delta), delta)
    if room <= 0:
        return None
    more = difference.num_clusters * (((high - low) / 2 / room) ** 2 - 1)
    if not 1 <= more <= MOST_MORE:
        return None
    digits = int(10 ** max(0, math.floor(math.log10(more)) - 1))  # two digits: it is an estimate
    return math.ceil(more / digits) * digits


def _what_is_known(c: Comparison, difference: Difference) -> str:
    """What the interval shows even where the test shows nothing."""
    low, high = _towards_better(c, difference.low or 0.0, difference.high or 0.0)
    if low >= -c.margin:
        return f"; not worse by more than {shown(c, c.margin)}"
    return f"; not better by more than {shown(c, c.margin)}" if high <= c.margin else ""


# --- words -----------------------------------------------------------------------------------------------------------


def _reread(gains: int, losses: int) -> str:
    moved = f"{losses} lost, {gains} gained" if gains else f"{losses} lost"
    moved = moved if losses else f"{gains} gained"
    return f"the extraction changed: {moved} among answers that are the same word for word"


def shown(c: Comparison, value: float | None, *, sign: bool = False) -> str:
    """A value on the scale of the difference, in the unit a reader expects."""
    if value is None or math.isnan(value):
        return "–"
    plus = "+" if sign else ""
    if c.family == "share":
        return f"{value * 100:{plus}.1f} points"
    if c.family in ("speed", "ppl"):
        return f"{math.expm1(value):{plus}.1%}" if c.family == "speed" else f"{math.expm1(value) * 100:{plus}.2f} %"
    return f"{value:{plus}.4g}"


def equals(p_value: float | None) -> str:
    """`"= 0.042"` or `"< 0.001"`, to stand behind a p."""
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"


def p_text(p_value: float | None) -> str:
    if p_value is None:
        return "–"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
