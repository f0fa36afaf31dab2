"""Paired statistics: the same samples answered twice. Δ is always second minus first; p-values are two-sided.

Tests: exact McNemar for independent right/wrong items; t for perplexity, where documents are few and differences about
normal; else a sign-flip permutation test over clusters (base problems). Below seven independent draws no sign-flip test
can reach the level, so there is an interval and no test. Pinned against scipy and statsmodels in
tests/test_report_paired.py; error rates and coverage in docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qwen_eval.corpus import Segment, group_mean, least_clusters, replicates, variance_of
from qwen_eval.metrics import ALPHA, ratio_variance, t_quantile

LEVEL = 0.03  # of the tests: at a level of 5 % every other count of false alarms would be above 5 %
NORMAL_QUANTILE = 1.959963984540054  # of 0.975
POWER = 0.85  # promised are 80 %: the spread that goes into it is itself an estimate
MIN_DRAWS = 7  # all of six differences of one sign have a chance of 2 / 64 = 0.031: no test at LEVEL can say more
TOO_FEW = f"too few independent draws to test: fewer than {MIN_DRAWS}"
MAX_EXACT_CLUSTERS = 14
MAX_STEPS = 50_000  # of the exact distribution of whole multiples of a step
NUM_FLIPS_DRAWN = 4_999  # at first, and more while few of them reach what was observed
ENOUGH_HITS = 40
MAX_FLIPS = 1_000_000
MAX_SIGNS = 400_000_000  # draws times clusters: two seconds


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`delta` in [`low`, `high`] (95 %) and how likely by chance. Of perplexities, `delta` is the log of their ratio.

    `low`, `high`, `p_value` and `error` (the standard error, with `dof` degrees of freedom) are None when there are
    fewer than two independent draws, and `p_value` alone where there are too few to test. `test` names the test;
    `discordance` is the share of pairs that differ, for right/wrong items. With `has_own_spread` a regression is taken
    to fall on some items and not on others, by as much as it is large.
    """

    delta: float
    n: int
    num_clusters: int
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    error: float | None = None
    dof: float = 0.0
    discordance: float | None = None
    test: str = ""
    has_own_spread: bool = False

    def mde(self, alpha: float = ALPHA) -> float | None:
        """The smallest |Δ| that the test at level `alpha` finds four times of five with this n and this spread."""
        if self.p_value is None or self.error is None:
            return None
        if self.discordance is not None:
            return share_mde(self.num_clusters, self.discordance, alpha=alpha)
        if self.is_permuted and 2.0 ** (1 - self.num_clusters) > alpha:
            return None  # not even a change of every draw would be found
        errors = t_quantile(self.dof, 1 - alpha / 2) + t_quantile(self.dof, POWER)
        # effect = errors * sqrt(error² + effect² / clusters), solved for the effect; at few clusters at most doubled
        own = min(errors**2 / self.num_clusters, 0.75) if self.has_own_spread else 0.0
        return errors * self.error / math.sqrt(1.0 - own)

    @property
    def is_permuted(self) -> bool:
        return self.test.startswith("sign flip")


def paired_share(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Difference:
    """Difference of two means of scores in 0..1 over the same samples."""
    assert len(first) == len(second), (len(first), len(second))
    n, groups = len(first), _real_clusters(clusters, len(first))
    diffs = [b - a for a, b in zip(first, second)]
    if n == 0:
        return Difference(delta=math.nan, n=0, num_clusters=0)
    is_binary = all(x in (0.0, 1.0) for x in first) and all(x in (0.0, 1.0) for x in second)
    gains, losses = sum(d > 0 for d in diffs), sum(d < 0 for d in diffs)
    if not is_binary:
        return _difference_of_shares(diffs, groups)
    if groups is not None:
        return _clustered_answers(diffs, groups, gains, losses)
    low, high = bonett_price(gains, losses, n)
    is_tested = n >= MIN_DRAWS
    return Difference(
        delta=(gains - losses) / n, n=n, num_clusters=n, low=low, high=high,
        p_value=mcnemar(gains, losses) if is_tested else None, error=math.sqrt(gains + losses) / n, dof=n - 1.0,
        discordance=(gains + losses) / n, test="exact McNemar" if is_tested else TOO_FEW,
    )  # fmt: skip


def paired_mean(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Difference:
    """Difference of two means of any numbers over the same samples."""
    assert len(first) == len(second), (len(first), len(second))
    if not first:
        return Difference(delta=math.nan, n=0, num_clusters=0)
    diffs = [b - a for a, b in zip(first, second)]
    return _difference_of_means(diffs, _real_clusters(clusters, len(diffs)))


def paired_perplexity(
    first_nll: Sequence[float],
    second_nll: Sequence[float],
    num_tokens: Sequence[int],
    clusters: Sequence[Hashable] | None = None,
) -> Difference:
    """Log of the ratio of two perplexities over the same tokens; the draws are documents (or `clusters` of rows).

    It is the mean difference of NLL per token: documents differ far more in their perplexity than in what a change does
    to it. An interval of the difference of two perplexities would need how both vary together; the ratio does not.
    """
    assert len(first_nll) == len(second_nll) == len(num_tokens)
    total = float(sum(num_tokens))
    if total <= 0:
        return Difference(delta=math.nan, n=0, num_clusters=0)
    groups = _real_clusters(clusters, len(num_tokens))
    diffs = [b - a for a, b in zip(first_nll, second_nll)]
    spread = _spread_of(diffs, [float(t) for t in num_tokens], groups)
    found = _interval(math.fsum(diffs) / total, spread, n=int(total), test="t over documents")
    return replace(found, has_own_spread=True)


def paired_corpus(name: str, first: Sequence[Segment], second: Sequence[Segment]) -> Difference:
    """Difference of two corpus scores (BLEU) of the same segments: a paired bootstrap over their clusters.

    Both sides meet the same draws. The spread of the differences is the standard error of a t test.
    """
    assert [(s.group, s.cluster) for s in first] == [(s.group, s.cluster) for s in second]
    if not first:
        return Difference(delta=math.nan, n=0, num_clusters=0)
    delta, num_clusters = group_mean(name, second) - group_mean(name, first), least_clusters(first)
    variance, dof = variance_of(replicates(name, second) - replicates(name, first), first)
    spread = _Spread(variance=variance, dof=dof, num_draws=num_clusters)
    found = _interval(delta, spread, n=len(first), test="paired bootstrap")
    return found if num_clusters >= MIN_DRAWS else replace(found, p_value=None, test=TOO_FEW)


def speed_ratio(first: Sequence[float], second: Sequence[float]) -> Difference:
    """log(second / first) of two sets of repeats (not paired): Welch's t on logarithms."""
    a, b = np.log(np.asarray(first, dtype=float)), np.log(np.asarray(second, dtype=float))
    delta, n = float(np.median(b) - np.median(a)) if len(a) and len(b) else math.nan, len(a) + len(b)
    if min(len(a), len(b)) < 2:
        return Difference(delta=delta, n=n, num_clusters=n)
    var_a, var_b = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    variance = max(var_a + var_b, 1e-12)
    dof = variance**2 / max(var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1), 1e-30)
    dof = min(dof, float(n - 2))
    spread = _Spread(variance=variance, dof=dof, num_draws=n)
    return _interval(float(b.mean() - a.mean()), spread, n=n, test="Welch t of logs")


# --- tests ---------------------------------------------------------------------------------------------------------


def mcnemar(gains: int, losses: int) -> float:
    """Exact two-sided McNemar: discordant pairs fall either way with chance one half."""
    from scipy.special import bdtr

    few, total = min(gains, losses), gains + losses
    return 1.0 if total == 0 else min(1.0, 2.0 * float(bdtr(few, total, 0.5)))


def sign_flip(sums: NDArray[np.float64], *, seed: int = 0) -> tuple[float, str]:
    """Permutation p-value of a zero sum, each cluster's difference could as well have had the other sign; and its name.

    Exact for up to 14 clusters and for whole multiples of a step (right/wrong answers, k of n draws); else drawn, the
    more the smaller p is, as a fixed number would bound p from below.
    """
    values = np.abs(sums[np.abs(sums) > 0])
    if not len(values):
        return 1.0, "sign flip of clusters, exact"
    observed = abs(float(sums.sum())) * (1 - 1e-12)
    steps = _whole_steps(values)
    if steps is not None:
        return _tail_of_steps(*steps, observed), "sign flip of clusters, exact"
    if len(values) <= MAX_EXACT_CLUSTERS:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float(np.mean(np.abs(signs @ values) >= observed)), "sign flip of clusters, exact"
    p_value, num_drawn = _drawn_tail(values, observed, seed)
    return p_value, f"sign flip of clusters, {num_drawn:,} drawn"


def _whole_steps(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], float] | None:
    """(`values` / step, step) where all are whole multiples of one step and not too many; else None."""
    smallest = float(values.min())
    for parts in range(1, 13):
        multiples = values * (parts / smallest)
        rounded = np.rint(multiples)
        if np.allclose(multiples, rounded, rtol=0, atol=1e-6) and rounded.sum() <= MAX_STEPS:
            return rounded.astype(np.int64), smallest / parts
    return None


def _tail_of_steps(steps: NDArray[np.int64], step: float, observed: float) -> float:
    """Chance that |sum of ± steps| reaches `observed`: a convolution of binomials, one for each size of step."""
    chances = np.ones(1)
    for size, count in zip(*np.unique(steps, return_counts=True)):
        before, chances = chances, np.zeros(len(chances) + int(size * count))
        for ups, chance in enumerate(_binomial(np.arange(count + 1), int(count), 0.5)):
            chances[ups * size : ups * size + len(before)] += chance * before
    sums = 2 * np.arange(len(chances)) - int(steps.sum())
    return min(1.0, float(chances[np.abs(sums) >= observed / step - 0.5].sum()))


def _drawn_tail(values: NDArray[np.float64], observed: float, seed: int) -> tuple[float, int]:
    rng, hits, done, wanted, width = np.random.default_rng(seed), 0, 0, NUM_FLIPS_DRAWN, -(-len(values) // 8)
    most = max(NUM_FLIPS_DRAWN, min(MAX_FLIPS, MAX_SIGNS // len(values)))
    while done < wanted:  # in slices: 5,000 x 14,000 signs would be half a gigabyte
        rows = min(wanted - done, max(1, 4_000_000 // len(values)))
        bits = np.unpackbits(np.frombuffer(rng.bytes(rows * width), dtype=np.uint8).reshape(rows, width), axis=1)
        flipped = 2.0 * (bits[:, : len(values)].astype(np.float64) @ values) - values.sum()
        hits += int(np.count_nonzero(np.abs(flipped) >= observed))
        done += rows
        if done >= wanted and hits < ENOUGH_HITS:
            wanted = min(most, wanted * 4)
    return (hits + 1) / (done + 1), done


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment; None (no test) stays None and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - rank)))
        adjusted[i] = running
    return adjusted


def bonett_price(gains: float, losses: float, n: float, *, quantile: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """Adjusted Wald interval of a paired difference of shares (Bonett & Price 2012): covers at small n, never empty."""
    up, down = (gains + 1) / (n + 2), (losses + 1) / (n + 2)
    half = quantile * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


# --- minimum detectable effect -------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def share_mde(n: int, discordance: float, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest |Δ| of a share that exact McNemar finds with `power` at n pairs; None where even Δ = 1 is not found.

    `discordance` is the share of pairs that differ anyway, either way alike; the effect adds its own to them.
    """
    if mcnemar_power(n, 1.0, discordance, alpha) < power:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if mcnemar_power(n, middle, discordance, alpha) >= power else (middle, high)
    return high


def mcnemar_power(n: int, delta: float, discordance: float, alpha: float = ALPHA) -> float:
    """Exact power of the two-sided exact McNemar test: discordant pairs are binomial, and so are the losses of them."""
    from scipy.special import bdtr, bdtrc

    rate = min(1.0, discordance + delta)
    if rate <= 0 or n == 0:
        return 0.0
    spread = 7 * math.sqrt(n * rate * (1 - rate)) + 7
    totals: NDArray[np.int64] = np.arange(max(0, int(n * rate - spread)), min(n, int(n * rate + spread)) + 1)
    totals = totals[:: max(1, len(totals) // 400)]  # the power is smooth in the number of discordant pairs
    weights, limits = _binomial(totals, n, rate), _critical(totals, alpha)
    chance = (1 + delta / rate) / 2
    found = bdtrc(totals - limits - 1, totals, chance) + np.where(limits < 0, 0.0, bdtr(limits, totals, chance))
    return float(np.sum(weights * found) / np.sum(weights))


def _critical(totals: NDArray[np.int64], alpha: float) -> NDArray[np.int64]:
    """The largest number of pairs that fall the rarer way and are still significant; -1 where none is."""
    from scipy.special import bdtr, bdtrik

    near = np.nan_to_num(np.floor(bdtrik(alpha / 2, totals, 0.5))).astype(np.int64)
    limits = np.clip(near + 1, 0, totals)  # the inverse is off by one in places: step down from one above
    for _ in range(3):
        limits = np.where((limits >= 0) & (2 * bdtr(np.maximum(limits, 0), totals, 0.5) > alpha), limits - 1, limits)
    return limits


def _binomial(hits: NDArray[np.int64], n: int, rate: float) -> NDArray[np.float64]:
    from scipy.special import betaln, xlog1py, xlogy

    logs = xlogy(hits, rate) + xlog1py(n - hits, -rate) - betaln(n - hits + 1, hits + 1)
    return np.asarray(np.exp(logs) / (n + 1), dtype=np.float64)


# --- shared pieces -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """Variance of an estimate, its degrees of freedom, and how many independent draws there are."""

    variance: float
    dof: float
    num_draws: int


def _spread_of(sums: Sequence[float], counts: Sequence[float], groups: Sequence[Hashable] | None) -> _Spread:
    variance, dof = ratio_variance(sums, counts, groups)
    return _Spread(variance=variance, dof=dof, num_draws=len(sums) if groups is None else len(set(groups)))


def _difference_of_means(diffs: Sequence[float], groups: Sequence[Hashable] | None) -> Difference:
    """The t interval, and the sign-flip test where there are enough draws for one."""
    spread = _spread_of(diffs, [1.0] * len(diffs), groups)
    found = _interval(math.fsum(diffs) / len(diffs), spread, n=len(diffs), test=TOO_FEW)
    if spread.num_draws < MIN_DRAWS:
        return replace(found, p_value=None)
    p_value, test = sign_flip(_cluster_sums(diffs, groups))
    return replace(found, p_value=p_value, test=test)


def _difference_of_shares(diffs: Sequence[float], groups: Sequence[Hashable] | None) -> Difference:
    """Of partial credit. Equal differences everywhere are not certainty: another draw could be of another kind."""
    found = replace(_difference_of_means(diffs, groups), has_own_spread=True)
    if found.error != 0.0:
        return found
    low, high = bonett_price(0, 0, found.num_clusters)
    low, high = max(-1.0, found.delta + low), min(1.0, found.delta + high)
    return replace(found, low=low, high=high, discordance=0.0 if not any(diffs) else None)


def _clustered_answers(diffs: Sequence[float], groups: Sequence[Hashable], gains: int, losses: int) -> Difference:
    """Right/wrong answers in clusters (often of one): Bonett-Price at the effective number of items.

    That is the number of independent items as uncertain as these, so that few duplicates among many items change
    little, and a handful of large clusters much.
    """
    found, n = _difference_of_shares(diffs, groups), len(diffs)
    if found.error is None:
        return found
    independent = (gains + losses) / n**2 - found.delta**2 / n
    effective = n * min(1.0, independent / found.error**2) if found.error > 0 else float(found.num_clusters)
    up, down = gains * effective / n, losses * effective / n
    low, high = bonett_price(up, down, effective, quantile=t_quantile(found.dof))
    return replace(found, low=min(low, found.delta), high=max(high, found.delta))


def _interval(delta: float, spread: _Spread, *, n: int, test: str) -> Difference:
    """The t interval and the t test."""
    if spread.dof < 1 or not math.isfinite(spread.variance):
        return Difference(delta=delta, n=n, num_clusters=spread.num_draws)
    error = math.sqrt(spread.variance)
    half = t_quantile(spread.dof) * error
    return Difference(
        delta=delta, n=n, num_clusters=spread.num_draws, low=delta - half, high=delta + half,
        p_value=_t_test(delta, error, spread.dof), error=error, dof=spread.dof, test=test,
    )  # fmt: skip


def _t_test(delta: float, error: float, dof: float) -> float:
    from scipy.special import stdtr

    return 2.0 * float(stdtr(dof, -abs(delta) / error)) if error > 0 else float(delta == 0)


def _cluster_sums(diffs: Sequence[float], groups: Sequence[Hashable] | None) -> NDArray[np.float64]:
    if groups is None:
        return np.asarray(diffs, dtype=np.float64)
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(group, len(numbers)) for group in groups]
    return np.bincount(index, weights=np.asarray(diffs, dtype=np.float64)).astype(np.float64)


def _real_clusters(clusters: Sequence[Hashable] | None, n: int) -> Sequence[Hashable] | None:
    """None when clusters say nothing: every item its own, or one cluster, within which items are then the draws."""
    if clusters is None or len(set(clusters)) in (1, n):
        return None
    return clusters
