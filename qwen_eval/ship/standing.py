"""What is known of one task, and of all: numbers in, one of three words out. docs/decide.md says what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen_eval.core import ConfigError, Record
from qwen_eval.report.paired import holm, paired_perplexity
from qwen_eval.report.sequential import (
    Draws,
    evidence,
    items_needed,
    lower_bound,
    upper_bound,
)
from qwen_eval.ship.drawing import score

Word: TypeAlias = Literal["ship", "do not ship", "not decided"]
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Look:
    """After `items`: the estimate and the three p-values, each valid whenever one looks."""

    items: int
    delta: float
    not_worse: float
    worse: float
    not_better: float

    def to_json(self) -> dict[str, Any]:
        return {"items": self.items, **{name: rounded(value) for name, value in vars(self).items() if name != "items"}}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One task. `delta` in [`low`, `high`] is on the scale of `margin`: parts of a score (candidate minus reference),
    or the logarithm of the ratio of perplexities with its sign turned, so that up is better in both.
    """

    task: str
    kind: Literal["items", "texts"]
    num_items: int
    size: int
    margin: float
    delta: float
    low: float
    high: float
    looks: tuple[Look, ...]
    is_exact: bool = False  # every item was asked: nothing is estimated
    num_lost: int = 0
    num_gained: int = 0
    needed: int | None = None  # items in all that would about decide

    @property
    def last(self) -> Look:
        return self.looks[-1]

    def is_not_worse(self, alpha: float) -> bool:
        return self.last.not_worse <= alpha

    def is_equivalent(self, alpha: float) -> bool:
        return self.is_not_worse(alpha) and self.last.not_better <= alpha


@dataclass(frozen=True, kw_only=True)
class ShipVerdict:
    """Over all tasks. "Ship" needs every task; "do not ship" one, whose p-value is Holm's over all of them."""

    word: Word
    by_task: Mapping[str, Word]
    is_equivalent: bool


def verdict(standings: Sequence[Standing], tasks: Sequence[str], alpha: float) -> ShipVerdict:
    """`tasks`: all that were asked for, begun or not."""
    known = {standing.task: standing for standing in standings}
    worse = holm([known[task].last.worse if task in known else 1.0 for task in tasks])
    by_task: dict[str, Word] = {}
    for task, p_value in zip(tasks, worse):
        if p_value is not None and p_value <= alpha:
            by_task[task] = "do not ship"
        else:
            by_task[task] = "ship" if task in known and known[task].is_not_worse(alpha) else "not decided"
    words = set(by_task.values())
    word: Word = "do not ship" if "do not ship" in words else "ship" if words == {"ship"} else "not decided"
    is_equivalent = word == "ship" and all(standing.is_equivalent(alpha) for standing in standings)
    return ShipVerdict(word=word, by_task=by_task, is_equivalent=is_equivalent)


# --- items, drawn at random ------------------------------------------------------------------------------------------


def draws_of(pairs: Sequence[tuple[Record, Record]], weights: Sequence[float] | NDArray[np.float64]) -> Draws:
    differences = np.array([score(candidate) - score(reference) for reference, candidate in pairs], dtype=np.float64)
    return Draws(differences=differences, weights=np.asarray(weights, dtype=np.float64))


def looks(draws: Draws, ends: Sequence[int], margin: float) -> tuple[Look, ...]:
    """One after each whole block. After the last item of the benchmark nothing is left to chance."""
    paths = evidence(draws, margin)
    found = []
    for end in (end for end in ends if end <= draws.n):
        delta = draws.head(end).mean
        if end == draws.size:
            above, below = delta > -margin + 1e-12, delta < margin - 1e-12
            chances = (float(not above), float(above), float(not below))
        else:
            chances = tuple(_p(path[end - 1]) for path in (paths.not_worse, paths.worse, paths.not_better))  # type: ignore[assignment]
        found.append(Look(items=end, delta=delta, not_worse=chances[0], worse=chances[1], not_better=chances[2]))
    return tuple(found)


def _p(log_capital: float) -> float:
    return math.exp(-max(0.0, float(log_capital)))


def of_items(task: str, draws: Draws, ends: Sequence[int], margin: float, alpha: float, *, is_final: bool) -> Standing:
    """`is_final`: with the interval and the items needed, which take a moment."""
    found = Standing(
        task=task, kind="items", num_items=draws.n, size=draws.size, margin=margin, delta=draws.mean,
        low=-math.inf, high=math.inf, looks=looks(draws, ends, margin), is_exact=draws.is_complete,
        num_lost=int((draws.differences < 0).sum()), num_gained=int((draws.differences > 0).sum()),
    )  # fmt: skip
    if not is_final:
        return found
    decided = found.is_not_worse(alpha) or found.last.worse <= alpha
    bounds = {"low": lower_bound(draws, margin, alpha), "high": upper_bound(draws, margin, alpha)}
    needed = None if decided else items_needed(draws, margin, alpha)
    return Standing(**{**vars(found), **bounds, "needed": needed})


# --- scored texts, all of them ---------------------------------------------------------------------------------------


def of_texts(task: str, pairs: Sequence[tuple[Record, Record]], margin_percent: float, alpha: float) -> Standing:
    """Perplexity: its items are not bounded, so all texts are read once and one paired t test is made of documents."""
    rows = [(a, b) for a, b in pairs if a.grade.values.get("num_tokens")]
    tokens = [(int(a.grade.values["num_tokens"]), int(b.grade.values["num_tokens"])) for a, b in rows]
    if any(first != second for first, second in tokens):
        raise ConfigError(f"tasks={task}: the two models cut the texts into other tokens; perplexities do not compare")
    found = paired_perplexity(
        [a.grade.values["nll"] for a, _ in rows], [b.grade.values["nll"] for _, b in rows],
        [first for first, _ in tokens], [a.cluster or a.sample_id for a, _ in rows],
    )  # fmt: skip
    if found.error is None:
        raise ConfigError(f"tasks={task}: one text says nothing of others; use more texts")
    margin, delta = math.log1p(margin_percent / 100), -found.delta
    half = _quantile(found.dof, 1 - alpha) * found.error
    look = Look(
        items=len(rows),
        delta=delta,
        not_worse=_chance(-margin - delta, found.error, found.dof),
        worse=_chance(delta + margin, found.error, found.dof),
        not_better=_chance(delta - margin, found.error, found.dof),
    )
    return Standing(
        task=task, kind="texts", num_items=len(rows), size=len(rows), margin=margin, delta=delta, low=delta - half,
        high=delta + half, looks=(look,),
    )  # fmt: skip


def _chance(distance: float, error: float, dof: float) -> float:
    """One-sided p-value of the t test: small where `distance` is far below 0."""
    from scipy.special import stdtr

    if error == 0:
        return float(distance >= 0)
    return float(stdtr(dof, distance / error))


def _quantile(dof: float, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(dof, level))


def rounded(value: float) -> float:
    """To the digits that are written."""
    return float(f"{value:.{DIGITS}g}") + 0.0  # no -0.0
