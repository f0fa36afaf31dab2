"""Evidence about a benchmark's mean paired difference while its items are drawn: valid at every look, by betting.

The items of a benchmark are a finite population, drawn in a uniformly random order without replacement. A gambler bets
on the next difference against the hypothesis "the mean of all is at most the threshold". Where that is true, the
capital is a supermartingale that starts at 1, so the chance that it ever reaches 1/α is at most α (Ville). Nothing is
assumed of the items: duplicates and clusters need no model. After the last item the mean is known for certain.

Sources: Waudby-Smith and Ramdas, "Confidence sequences for sampling without replacement"
(https://arxiv.org/abs/2006.04347) and "Estimating means of bounded random variables by betting"
(https://arxiv.org/abs/2010.09686). `python tools/simulate_ship.py` measures how often it errs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
MOST_AT_STAKE = 0.995  # of the capital that one item may lose
PRIOR_ITEMS = 40.0
TOLERANCE = 1e-9  # of sums of weighted scores
NUM_THRESHOLDS = 50  # of a grid, and of a finer one within it
NUM_FUTURES = 25  # drawn to estimate how many items a decision needs

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Bet:
    """One gambler: where the mean is believed to lie, and what share of the capital follows that belief.

    `gap` is the distance of that belief from the threshold, in margins. `prior_hits` of `PRIOR_ITEMS` items that differ
    are added to those seen: few make bolder bets before anything was seen.
    """

    share: float
    gap: float
    prior_hits: float = 5.0


# "Not worse" is bet on by no change, mostly; then by a small loss, and by hardly any item that differs. How much worse
# a worse candidate is nobody knows: a little, clearly, or broken.
NOT_WORSE = (Bet(share=0.8, gap=1.0), Bet(share=0.1, gap=0.6), Bet(share=0.1, gap=1.0, prior_hits=0.5))
WORSE = (Bet(share=0.4, gap=1.0), Bet(share=0.3, gap=3.0), Bet(share=0.3, gap=10.0))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The differences of scores (candidate minus reference, in -1..1) of the items drawn so far, in the drawn order.

    `weights` are those of all items of the benchmark in that order, of mean 1: the score on the benchmark is the mean
    of weight times score. A macro average weighs an item by N / (number of groups · size of its group).
    """

    differences: Array
    weights: Array

    def __post_init__(self) -> None:
        assert len(self.differences) <= len(self.weights), (len(self.differences), len(self.weights))
        assert not len(self.differences) or float(np.abs(self.differences).max()) <= 1.0, "scores lie in 0..1"
        assert math.isclose(float(self.weights.mean()), 1.0, rel_tol=1e-6), "weights have the mean 1"

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def size(self) -> int:
        return len(self.weights)

    @cached_property
    def values(self) -> Array:
        return self.differences * self.weights[: self.n]

    @property
    def is_complete(self) -> bool:
        return self.n == self.size

    @property
    def mean(self) -> float:
        """Of the whole benchmark once complete; before, the estimate from what was drawn."""
        if self.n == 0:
            return 0.0
        return math.fsum(self.values) / (self.size if self.is_complete else math.fsum(self.weights[: self.n]))

    def head(self, n: int) -> Draws:
        return Draws(differences=self.differences[:n], weights=self.weights)

    def mirrored(self) -> Draws:
        return Draws(differences=-self.differences, weights=self.weights)


def log_evidence(draws: Draws, threshold: float, margin: float, bets: Sequence[Bet]) -> Array:
    """After each item: the largest capital so far, as a logarithm, against "the mean is at most `threshold`".

    Infinite once no outcome of the items left could bring the mean down to the threshold. It depends on the drawn items
    alone, not on when one looked.
    """
    if draws.n == 0:
        return np.zeros(0)
    capital = np.logaddexp.reduce(
        [math.log(bet.share) + _capital(draws, threshold, margin, bet) for bet in bets], axis=0
    )
    left = draws.size - np.cumsum(draws.weights[: draws.n])
    is_certain = np.cumsum(draws.values) - left > draws.size * (threshold + TOLERANCE)
    return np.maximum.accumulate(np.where(is_certain, np.inf, capital))


def _capital(draws: Draws, threshold: float, margin: float, bet: Bet) -> Array:
    """Logarithm of what one gambler has after each item. Each stake is set from the items before it."""
    values, size = draws.values, draws.size
    bound, scale = float(draws.weights.max()), float(np.mean(draws.weights**2))
    seen = np.arange(draws.n)
    before, squares = _sums_before(values), _sums_before(values**2)
    left = size - seen
    expected = (size * threshold - before) / left  # of the next item, where the mean is just the threshold
    variance = (bet.prior_hits * scale + squares) / (PRIOR_ITEMS + seen)
    edge = size * bet.gap * margin / left  # by which the next item is believed to exceed that
    room = np.maximum(bound + expected, 1e-12)  # what the worst item takes of each unit at stake
    stake = np.minimum(edge / (variance + edge**2), MOST_AT_STAKE / room)
    stake = np.where(bound + expected <= 0, 0.0, stake)  # certain already: nothing left to bet on
    return np.asarray(np.cumsum(np.log1p(stake * (values - expected))), dtype=np.float64)


def _sums_before(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)[:-1]])


# --- the three questions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Logarithms of the capital after each item, bet on three answers: the candidate is not worse by the margin, it is
    worse by more than the margin, it is not better by the margin.
    """

    not_worse: Array
    worse: Array
    not_better: Array


def evidence(draws: Draws, margin: float) -> Evidence:
    mirrored = draws.mirrored()
    return Evidence(
        not_worse=log_evidence(draws, -margin, margin, NOT_WORSE),
        worse=log_evidence(mirrored, margin, margin, WORSE),
        not_better=log_evidence(mirrored, -margin, margin, NOT_WORSE),
    )


def crossing(evidence: Array, alpha: float = ALPHA) -> int | None:
    """The number of items after which the evidence first reaches 1/α; None where it has not."""
    at = int(np.searchsorted(evidence, -math.log(alpha)))
    return at + 1 if at < len(evidence) else None


def p_value(evidence: Array) -> float:
    """Valid whenever one looks: one over the largest capital."""
    return math.exp(-max(0.0, float(evidence[-1]))) if len(evidence) else 1.0


def lower_bound(draws: Draws, margin: float, alpha: float = ALPHA) -> float:
    """The mean is above this with confidence 1 - α, at every look: all thresholds up to here are refuted."""
    if draws.n == 0:
        return -1.0
    if draws.is_complete:
        return draws.mean
    found = _refuted(draws, margin, alpha, -1.0, max(draws.mean, -1.0))
    ends = [_refuted(draws, margin, alpha, *found)[0]]
    for threshold, bets in ((-margin, NOT_WORSE), (margin, WORSE)):  # the interval must not contradict the answer
        if crossing(log_evidence(draws, threshold, margin, bets), alpha) is not None:
            ends.append(threshold)
    return max(ends)


def _refuted(draws: Draws, margin: float, alpha: float, low: float, high: float) -> tuple[float, float]:
    """Two neighbours of a grid from `low` to `high`: the last threshold that is refuted, and the first that is not."""
    grid = np.linspace(low, high, NUM_THRESHOLDS)
    for last, threshold in itertools.pairwise(grid):
        if crossing(log_evidence(draws, float(threshold), margin, WORSE), alpha) is None:
            return float(last), float(threshold)
    return high, high


def upper_bound(draws: Draws, margin: float, alpha: float = ALPHA) -> float:
    return -lower_bound(draws.mirrored(), margin, alpha)


def items_needed(draws: Draws, margin: float, alpha: float = ALPHA, *, seed: int = 0) -> int:
    """About how many items in all decide "ship" or "do not ship", if those left are like those drawn. At most all."""
    if draws.n == 0:
        return draws.size
    rng, needed = np.random.default_rng(seed), []
    for _ in range(NUM_FUTURES):
        future = rng.choice(draws.differences, size=draws.size - draws.n)
        whole = Draws(differences=np.concatenate([draws.differences, future]), weights=draws.weights)
        ways = (
            log_evidence(whole, -margin, margin, NOT_WORSE),
            log_evidence(whole.mirrored(), margin, margin, WORSE),
        )
        needed.append(min(crossing(way, alpha) or draws.size for way in ways))
    return max(draws.n, int(np.median(needed)))


# --- blocks ----------------------------------------------------------------------------------------------------------

FIRST_BLOCK = 128
PARTS = 16  # of a small benchmark, or of what was drawn
STEP = 32


def block_ends(size: int) -> list[int]:
    """Where blocks of a benchmark of `size` items end: 128 at first (fewer of a small one), then a sixteenth of what
    was drawn. Longer blocks share more prompt prefixes, shorter ones stop sooner.
    """
    first = min(FIRST_BLOCK, max(1, size // PARTS // STEP) * STEP)
    ends, n = [], 0
    while n < size:
        n = min(size, n + max(first, n // PARTS // STEP * STEP))
        ends.append(n)
    return ends
