"""From scores to metrics with 95 % intervals: shares, means, macro averages, perplexity, pass@k, rates.

Every function drops `None` and NaN, never raises on emptiness (value NaN, n 0, no interval) and never returns an
interval narrower than the data allow: a perfect score on ten items is not [1, 1]. What each interval assumes, and how
well it covers, is said in docs/statistics.md and pinned by tests/test_metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from qwen_eval.core import Completions, Grade, Metric, Record

if TYPE_CHECKING:  # numpy takes a tenth of a second to import, and a mistake on the command line shall show at once
    import numpy as np
    from numpy.typing import NDArray

ALPHA = 0.05
FLAGS = ("truncated", "empty", "looping", "no_answer")
RARE_FLAGS = ("overlong", "grading_timeout", "cut_prompt", "filtered")  # a rate only where one was seen

Clusters = Sequence[Hashable] | None
Interval = tuple[float, float]


def share(scores: Sequence[float | None], clusters: Clusters = None, *, higher_is_better: bool = True) -> Metric:
    """Mean of scores in 0..1. Independent right/wrong items: Clopper-Pearson, exact at every n.

    Clustered items or partial credit: Korn-Graubard, the same beta interval at the effective number of items that the
    (cluster-robust) variance implies, so it stays in 0..1 and is not empty at 0 or 1.
    """
    kept, groups = _finite(scores, clusters)
    if not kept:
        return Metric(value=math.nan, n=0, higher_is_better=higher_is_better)
    n = len(kept)
    value = min(1.0, max(0.0, math.fsum(kept) / n))
    low, high = proportion_interval(value, _effective_n(kept, groups))
    return Metric(
        value=value, n=n, low=low, high=high, num_clusters=_num_clusters(groups), higher_is_better=higher_is_better
    )


def mean(
    values: Sequence[float | None],
    clusters: Clusters = None,
    unit: str = "",
    higher_is_better: bool = True,
    *,
    is_positive: bool = False,
) -> Metric:
    """Mean of any numbers with a t interval, cluster-robust where `clusters` are given; no interval below two draws.

    `is_positive`: the quantity cannot be below zero (a divergence, a speed), so neither can its interval.
    """
    kept, groups = _finite(values, clusters)
    if not kept:
        return Metric(value=math.nan, n=0, kind="mean", higher_is_better=higher_is_better, unit=unit)
    value = math.fsum(kept) / len(kept)
    variance, dof = ratio_variance(kept, [1.0] * len(kept), groups)
    low, high = (positive_interval if is_positive else t_interval)(value, variance, dof) or (None, None)
    return Metric(
        value=value, n=len(kept), kind="mean", low=low, high=high, num_clusters=_num_clusters(groups),
        higher_is_better=higher_is_better, unit=unit,
    )  # fmt: skip


def macro(
    groups: Mapping[str, Sequence[float | None]],
    clusters: Mapping[str, Sequence[Hashable]] | None = None,
    *,
    kind: Literal["share", "mean"] = "share",
) -> Metric:
    """Unweighted mean of group means: the groups are fixed, their items are the draws.

    The variance is that of the items within their groups; a group of one item borrows the pooled variance. `clusters`
    (group -> one a score) names items that are one draw, such as a question asked twice; they may lie in two groups.
    """
    found = [_finite(scores, None if clusters is None else clusters[name]) for name, scores in groups.items()]
    found = [(values, draws) for values, draws in found if values]
    kept = [values for values, _ in found]
    if not kept:
        return Metric(value=math.nan, n=0, kind=kind)
    n = sum(map(len, kept))
    value = math.fsum(math.fsum(values) / len(values) for values in kept) / len(kept)
    variance, dof = _stratified_variance(kept)
    variance += _shared_variance(kept, [draws for _, draws in found])
    interval: Interval | None
    if kind == "share":
        interval = proportion_interval(value, _implied_n(value, variance, dof, default=n))
    else:
        interval = t_interval(value, variance, dof)
    low, high = interval or (None, None)
    num_clusters = None if clusters is None else len({draw for _, draws in found for draw in draws or ()})
    return Metric(value=value, n=n, kind=kind, low=low, high=high, num_clusters=num_clusters)


def perplexity(nll_sums: Sequence[float], num_tokens: Sequence[int], clusters: Clusters = None) -> Metric:
    """`exp(sum of NLL / sum of tokens)`; `n` counts tokens. The draws are documents (or `clusters` of them).

    The interval is that of NLL per token, a ratio of sums over documents, on the log scale: it cannot fall below 0, nor
    the perplexity's below 1. None for one document.
    """
    assert len(nll_sums) == len(num_tokens), (len(nll_sums), len(num_tokens))
    rows = [i for i, (nll, num) in enumerate(zip(nll_sums, num_tokens)) if num > 0 and not math.isnan(nll)]
    if not rows:
        return Metric(value=math.nan, n=0, kind="ppl", higher_is_better=False, unit="ppl")
    sums, counts = [float(nll_sums[i]) for i in rows], [float(num_tokens[i]) for i in rows]
    groups = [clusters[i] for i in rows] if clusters is not None else rows
    value = math.fsum(sums) / math.fsum(counts)
    variance, dof = ratio_variance(sums, counts, groups)
    low, high = positive_interval(value, variance, dof) or (None, None)
    return Metric(
        value=_exp(value), n=int(sum(counts)), kind="ppl", low=None if low is None else _exp(low),
        high=None if high is None else _exp(high), num_clusters=len(set(groups)), higher_is_better=False, unit="ppl",
    )  # fmt: skip


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n completions, c of them right, hold a right one: unbiased (https://arxiv.org/abs/2107.03374)."""
    assert 0 <= c <= n >= k >= 1, f"pass@k of n={n}, c={c}, k={k}"
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def rates(records: Iterable[Record]) -> dict[str, Metric]:
    """How often answers were truncated, empty, looping, unreadable, or read otherwise by the official extractor.

    The flags are rates of records with generated text; a flag also appears where another kind of record carries it.
    "extractor_disagreement" is over the records that hold both readings. All: lower is better.
    """
    rows = list(records)
    generated = [row for row in rows if any(isinstance(answer, Completions) for answer in row.answers)]
    found: dict[str, Metric] = {}
    for flag in (*FLAGS, *RARE_FLAGS):
        is_seen = any(flag in row.grade.flags for row in rows)
        basis = generated if generated and (is_seen or flag in FLAGS) else rows if is_seen else []
        if basis:
            found[flag] = share([float(flag in row.grade.flags) for row in basis], higher_is_better=False)
    both = [row.grade for row in rows if row.grade.score_upstream is not None]
    if both:
        found["extractor_disagreement"] = share([float(_readings_differ(g)) for g in both], higher_is_better=False)
    return found


# --- intervals -----------------------------------------------------------------------------------------------------


def proportion_interval(value: float, n: float) -> Interval:
    """Clopper-Pearson for `value * n` successes of `n`; `n` may be fractional (an effective number of items)."""
    from scipy.special import betaincinv

    hits = min(n, max(0.0, value * n))
    misses = n - hits
    low = 0.0 if hits < 1e-9 else float(betaincinv(hits, misses + 1, ALPHA / 2))
    high = 1.0 if misses < 1e-9 else float(betaincinv(hits + 1, misses, 1 - ALPHA / 2))
    return min(low, value), max(high, value)


def t_interval(value: float, variance: float, dof: float) -> Interval | None:
    """`value ± t * sqrt(variance)`; None where there is no variance to be had (fewer than two draws)."""
    if dof < 1 or not math.isfinite(variance):
        return None
    half = t_quantile(dof) * math.sqrt(variance)
    return value - half, value + half


def t_quantile(dof: float, level: float = 1 - ALPHA / 2) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(dof, level))


def positive_interval(value: float, variance: float, dof: float) -> Interval | None:
    """The t interval of the logarithm, taken back: of a quantity that cannot be below zero."""
    if not value > 0:
        return t_interval(value, variance, dof)
    log = t_interval(0.0, variance / value**2, dof)
    return None if log is None else (value * _exp(log[0]), value * _exp(log[1]))


def ratio_variance(sums: Sequence[float], counts: Sequence[float], groups: Clusters) -> tuple[float, float]:
    """Cluster-robust variance of `sum(sums) / sum(counts)` and its degrees of freedom; NaN for one cluster.

    With counts of 1 this is the variance of a mean; with no groups every item is a cluster.
    """
    import numpy as np

    totals, sizes = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if groups is not None:
        numbers: dict[Hashable, int] = {}
        index = [numbers.setdefault(group, len(numbers)) for group in groups]
        totals, sizes = (np.bincount(index, weights=x).astype(np.float64) for x in (totals, sizes))
    totals, sizes = totals[sizes > 0], sizes[sizes > 0]
    if len(totals) < 2:
        return math.nan, 0.0
    variance, dof = cluster_variance(totals, sizes)
    return float(variance), float(dof)


def cluster_variance(
    sums: NDArray[np.float64], sizes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """CR2 variance of `sums.sum(-1) / sizes.sum(-1)` and Satterthwaite's degrees of freedom; clusters on the last axis.

    Bell and McCaffrey's estimator for a mean, under a working model in which the items of a cluster move together, so
    that a large cluster is one draw like a small one (Pustejovsky and Tipton 2018,
    https://doi.org/10.1080/07350015.2016.1247004). Equal sizes give the usual variance with clusters - 1 degrees;
    uneven ones give fewer, down to 1 where one cluster holds nearly everything. With w = size / total and S = sum(w²)
    the residual of cluster g has variance 1 - 2 w_g + S in units of a cluster's own, by which its square is divided.
    """
    total_1: NDArray[np.float64] = sizes.sum(-1, keepdims=True)
    weights_G = sizes / total_1
    squares_1: NDArray[np.float64] = (weights_G**2).sum(-1, keepdims=True)
    spread_G = 1 - 2 * weights_G + squares_1
    sum_1: NDArray[np.float64] = sums.sum(-1, keepdims=True)
    residuals_G = (sums - weights_G * sum_1) / total_1
    variance: NDArray[np.float64] = (residuals_G**2 / spread_G).sum(-1)
    # Satterthwaite: (trace P)² / trace P², P_gh = w_g w_h (g==h - w_g - w_h + S) / sqrt(spread_g spread_h), no G x G
    factor_G = weights_G**2 / spread_G
    moments: list[NDArray[np.float64]] = [(factor_G * weights_G**k).sum(-1) for k in range(3)]
    squares: NDArray[np.float64] = squares_1[..., 0]
    every = squares**2 * moments[0] ** 2 + 2 * moments[0] * moments[2] + 2 * moments[1] ** 2
    every = every - 4 * squares * moments[0] * moments[1]
    diagonal: NDArray[np.float64] = (weights_G**4 - (factor_G * (squares_1 - 2 * weights_G)) ** 2).sum(-1)
    dof = squares**2 / (every + diagonal)
    return variance, dof.clip(1.0, sizes.shape[-1] - 1.0)


def _effective_n(scores: Sequence[float], groups: Clusters) -> float:
    """Independent right/wrong items that would be as uncertain as these; never more than there are of such items."""
    n = len(scores)
    is_binary = all(score in (0.0, 1.0) for score in scores)
    num_clusters = len(set(groups)) if groups is not None else n
    if num_clusters == n or num_clusters < 2:
        groups, num_clusters = None, n  # one cluster says nothing about others: the interval is within it
    if is_binary and groups is None:
        return float(n)
    value = math.fsum(scores) / n
    variance, dof = ratio_variance(scores, [1.0] * n, groups)
    implied = _implied_n(value, variance, dof, default=num_clusters)
    return min(implied, float(n)) if is_binary else implied


def _implied_n(value: float, variance: float, dof: float, *, default: float) -> float:
    """Number of independent right/wrong items with this variance, shrunk for its own uncertainty (Korn & Graubard)."""
    if not variance > 0 or dof < 1 or not 0 < value < 1:
        return float(default)
    implied = value * (1 - value) / variance
    return implied * (t_quantile(max(implied - 1, 1.0)) / t_quantile(dof)) ** 2


def _stratified_variance(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Variance of the unweighted mean of group means, and Satterthwaite's degrees of freedom."""
    scatters = [math.fsum((x - math.fsum(g) / len(g)) ** 2 for x in g) for g in groups]
    spare = sum(len(g) - 1 for g in groups)
    if spare < 1:
        return ratio_variance([g[0] for g in groups], [1.0] * len(groups), None)
    pooled = math.fsum(scatters) / spare
    parts = [(s / (len(g) - 1) if len(g) > 1 else pooled) / len(g) for s, g in zip(scatters, groups)]
    total = math.fsum(parts)
    weights = math.fsum(part**2 / max(len(g) - 1, 1) for part, g in zip(parts, groups))
    return total / len(groups) ** 2, total**2 / weights if weights > 0 else float(spare)


def _shared_variance(groups: Sequence[Sequence[float]], clusters: Sequence[Clusters]) -> float:
    """What clusters add to the variance of the mean of group means: the products of the residuals within each."""
    sums: dict[Hashable, float] = {}
    squares = 0.0
    for values, draws in zip(groups, clusters):
        centre, n = math.fsum(values) / len(values), len(values)
        scale = math.sqrt(n / (n - 1)) / (n * len(groups)) if n > 1 else 0.0
        for value, draw in zip(values, draws or ()):
            residual = (value - centre) * scale
            sums[draw] = sums.get(draw, 0.0) + residual
            squares += residual**2
    return max(0.0, math.fsum(total**2 for total in sums.values()) - squares)


def _finite(scores: Sequence[float | None], clusters: Clusters) -> tuple[list[float], Clusters]:
    assert clusters is None or len(clusters) == len(scores), (len(scores), len(clusters or ()))
    rows = [i for i, score in enumerate(scores) if score is not None and not math.isnan(score)]
    groups = None if clusters is None else [clusters[i] for i in rows]
    return [float(scores[i] or 0.0) for i in rows], groups


def _num_clusters(groups: Clusters) -> int | None:
    return None if groups is None else len(set(groups))


def _readings_differ(grade: Grade) -> bool:
    return str(grade.extracted).strip() != str(grade.extracted_upstream).strip()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
