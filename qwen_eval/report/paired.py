"""Paired statistics: the same samples answered twice. Δ is always second minus first; p-values are two-sided.

Tests: exact McNemar for independent right/wrong items; t for perplexity, where documents are few and differences about
normal; else a sign-flip permutation test over clusters (base problems), exact up to 14 of them. Pinned against scipy
and statsmodels in tests/test_report_paired.py.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qwen_eval.metrics import ALPHA, ratio_variance, t_quantile

POWER = 0.85  # promised are 80 %: the spread that goes into it is itself an estimate
NUM_FLIPS_DRAWN = 4_999
MAX_EXACT_CLUSTERS = 14


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`delta` in [`low`, `high`] (95 %) and how likely by chance.

    `low`, `high`, `p_value` and `error` (the standard error) are None when there are fewer than two independent draws.
    `test` names the test; `discordance` is the share of pairs that differ, for right/wrong items. With `has_own_spread`
    a regression is taken to fall on some items and not on others, by as much as it is large.
    """

    delta: float
    n: int
    num_clusters: int
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    error: float | None = None
    discordance: float | None = None
    test: str = ""
    has_own_spread: bool = False

    def mde(self, alpha: float = ALPHA) -> float | None:
        """The smallest |Δ| that the test at level `alpha` finds four times of five with this n and this spread."""
        if self.discordance is not None:
            return share_mde(self.num_clusters, self.discordance, alpha=alpha)
        if self.error is None or self.num_clusters < 2:
            return None
        dof = self.num_clusters - 1
        errors = t_quantile(dof, 1 - alpha / 2) + t_quantile(dof, POWER)
        # effect = errors * sqrt(error² + effect² / clusters), solved for the effect; at few clusters at most doubled
        own = min(errors**2 / self.num_clusters, 0.75) if self.has_own_spread else 0.0
        return errors * self.error / math.sqrt(1.0 - own)


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
    if not is_binary or groups is not None:
        return _difference_of_means(diffs, groups, floor=True)
    gains, losses = sum(d > 0 for d in diffs), sum(d < 0 for d in diffs)
    low, high = bonett_price(gains, losses, n)
    return Difference(
        delta=(gains - losses) / n, n=n, num_clusters=n, low=low, high=high, p_value=mcnemar(gains, losses),
        error=math.sqrt(gains + losses) / n, discordance=(gains + losses) / n, test="exact McNemar",
    )  # fmt: skip


def paired_mean(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Difference:
    """Difference of two means of any numbers over the same samples."""
    assert len(first) == len(second), (len(first), len(second))
    if not first:
        return Difference(delta=math.nan, n=0, num_clusters=0)
    diffs = [b - a for a, b in zip(first, second)]
    return _difference_of_means(diffs, _real_clusters(clusters, len(diffs)), floor=False)


def paired_perplexity(
    first_nll: Sequence[float],
    second_nll: Sequence[float],
    num_tokens: Sequence[int],
    clusters: Sequence[Hashable] | None = None,
) -> Difference:
    """ΔPPL of two models over the same tokens; the draws are documents (or `clusters` of rows).

    Tested is the mean difference of NLL per token, the log of the ratio of the perplexities: documents differ far more
    in their perplexity than in what a change does to it. Its interval, times the first perplexity, is that of Δ.
    """
    assert len(first_nll) == len(second_nll) == len(num_tokens)
    total = float(sum(num_tokens))
    if total <= 0:
        return Difference(delta=math.nan, n=0, num_clusters=0)
    groups = _real_clusters(clusters, len(num_tokens))
    diffs = [b - a for a, b in zip(first_nll, second_nll)]
    variance, dof = ratio_variance(diffs, [float(t) for t in num_tokens], groups)
    log = _interval(math.fsum(diffs) / total, variance, dof, [], None, n=int(total), test="t over documents")
    reference = math.exp(math.fsum(first_nll) / total)
    low, high = (None if x is None else reference * math.expm1(x) for x in (log.low, log.high))
    error = None if log.error is None else log.error * reference * math.exp(log.delta)
    delta = reference * math.expm1(log.delta)
    return replace(log, delta=delta, low=low, high=high, error=error, has_own_spread=True)


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
    return _interval(float(b.mean() - a.mean()), variance, dof, [], None, n=n, test="Welch t of logs")


# --- tests ---------------------------------------------------------------------------------------------------------


def mcnemar(gains: int, losses: int) -> float:
    """Exact two-sided McNemar: discordant pairs fall either way with chance one half."""
    from scipy.special import bdtr

    few, total = min(gains, losses), gains + losses
    return 1.0 if total == 0 else min(1.0, 2.0 * float(bdtr(few, total, 0.5)))


def sign_flip(sums: NDArray[np.float64], *, seed: int = 0) -> float:
    """Permutation p-value of a zero sum: each cluster's difference could as well have had the other sign."""
    values = sums[np.abs(sums) > 0]
    if not len(values):
        return 1.0
    observed = abs(float(values.sum())) * (1 - 1e-12)
    if len(values) <= MAX_EXACT_CLUSTERS:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float(np.mean(np.abs(signs @ values) >= observed))
    rng, hits, done, width = np.random.default_rng(seed), 0, 0, -(-len(values) // 8)
    while done < NUM_FLIPS_DRAWN:  # in slices: 5,000 x 14,000 signs would be half a gigabyte
        rows = min(NUM_FLIPS_DRAWN - done, max(1, 4_000_000 // len(values)))
        bits = np.unpackbits(np.frombuffer(rng.bytes(rows * width), dtype=np.uint8).reshape(rows, width), axis=1)
        flipped = 2.0 * (bits[:, : len(values)].astype(np.float64) @ values) - values.sum()
        hits += int(np.count_nonzero(np.abs(flipped) >= observed))
        done += rows
    return (hits + 1) / (NUM_FLIPS_DRAWN + 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment; None (no test) stays None and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - rank)))
        adjusted[i] = running
    return adjusted


def bonett_price(gains: int, losses: int, n: int, *, alpha: float = ALPHA) -> tuple[float, float]:
    """Adjusted Wald interval of a paired difference of shares (Bonett & Price 2012): covers at small n, never empty."""
    from scipy.special import ndtri

    up, down = (gains + 1) / (n + 2), (losses + 1) / (n + 2)
    half = float(ndtri(1 - alpha / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
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
    totals = np.arange(max(0, int(n * rate - spread)), min(n, int(n * rate + spread)) + 1)
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


def _difference_of_means(diffs: Sequence[float], groups: Sequence[Hashable] | None, *, floor: bool) -> Difference:
    delta, n = math.fsum(diffs) / len(diffs), len(diffs)
    variance, dof = ratio_variance(diffs, [1.0] * n, groups)
    if floor and variance == 0.0:  # no cluster changed: that is not certainty, but at most a few in this many
        num_clusters = int(dof) + 1
        low, high = bonett_price(0, 0, num_clusters)
        return Difference(
            delta=delta, n=n, num_clusters=num_clusters, low=min(low, delta), high=max(high, delta), p_value=1.0,
            error=0.0, discordance=0.0, test="no difference",
        )  # fmt: skip
    return replace(_interval(delta, variance, dof, diffs, groups, n=n), has_own_spread=floor)


def _interval(
    delta: float,
    variance: float,
    dof: float,
    diffs: Sequence[float],
    groups: Sequence[Hashable] | None,
    *,
    n: int,
    test: str = "sign-flip permutation",
) -> Difference:
    num_clusters = int(dof) + 1
    if dof < 1 or not math.isfinite(variance):
        return Difference(delta=delta, n=n, num_clusters=num_clusters)
    error = math.sqrt(variance)
    half = t_quantile(dof) * error
    p_value = sign_flip(_cluster_sums(diffs, groups)) if diffs else _t_test(delta, error, dof)
    return Difference(
        delta=delta, n=n, num_clusters=num_clusters, low=delta - half, high=delta + half, p_value=p_value, error=error,
        test=test,
    )  # fmt: skip


def _t_test(delta: float, error: float, dof: float) -> float:
    from scipy.special import stdtr

    return 2.0 * float(stdtr(dof, -abs(delta) / error)) if error > 0 else float(delta == 0)


def _cluster_sums(diffs: Sequence[float], groups: Sequence[Hashable] | None) -> NDArray[np.float64]:
    if groups is None:
        return np.asarray(diffs, dtype=np.float64)
    _, index = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    return np.bincount(index, weights=np.asarray(diffs, dtype=np.float64)).astype(np.float64)


def _real_clusters(clusters: Sequence[Hashable] | None, n: int) -> Sequence[Hashable] | None:
    """None when clusters say nothing: every item its own, or one cluster, within which items are then the draws."""
    if clusters is None or len(set(clusters)) in (1, n):
        return None
    return clusters
