"""From scores to metrics with 95 % intervals: shares, means, macro averages, perplexity, pass@k, rates.

Every function drops `None` and NaN, never raises on emptiness (value NaN, n 0, no interval) and never returns an
interval narrower than the data allow: a perfect score on ten items is not [1, 1]. What each interval assumes, and how
well it covers, is said in docs/statistics.md and pinned by tests/test_metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal

from qwen_eval.core import Completions, Grade, Metric, Record

ALPHA = 0.05
FLAGS = ("truncated", "empty", "looping", "no_answer")

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
    values: Sequence[float | None], clusters: Clusters = None, unit: str = "", higher_is_better: bool = True
) -> Metric:
    """Mean of any numbers with a t interval, cluster-robust where `clusters` are given; no interval below two draws."""
    kept, groups = _finite(values, clusters)
    if not kept:
        return Metric(value=math.nan, n=0, kind="mean", higher_is_better=higher_is_better, unit=unit)
    value = math.fsum(kept) / len(kept)
    variance, dof = ratio_variance(kept, [1.0] * len(kept), groups)
    low, high = t_interval(value, variance, dof) or (None, None)
    return Metric(
        value=value, n=len(kept), kind="mean", low=low, high=high, num_clusters=_num_clusters(groups),
        higher_is_better=higher_is_better, unit=unit,
    )  # fmt: skip


def macro(groups: Mapping[str, Sequence[float | None]], *, kind: Literal["share", "mean"] = "share") -> Metric:
    """Unweighted mean of group means: the groups are fixed, their items are the draws.

    The variance is that of the items within their groups; a group of one item borrows the pooled variance.
    """
    kept = [values for values in (_finite(scores, None)[0] for scores in groups.values()) if values]
    if not kept:
        return Metric(value=math.nan, n=0, kind=kind)
    n = sum(map(len, kept))
    value = math.fsum(math.fsum(values) / len(values) for values in kept) / len(kept)
    variance, dof = _stratified_variance(kept)
    interval: Interval | None
    if kind == "share":
        interval = proportion_interval(value, _implied_n(value, variance, dof, default=n))
    else:
        interval = t_interval(value, variance, dof)
    low, high = interval or (None, None)
    return Metric(value=value, n=n, kind=kind, low=low, high=high)


def perplexity(nll_sums: Sequence[float], num_tokens: Sequence[int], clusters: Clusters = None) -> Metric:
    """`exp(sum of NLL / sum of tokens)`; `n` counts tokens. The draws are documents (or `clusters` of them).

    The interval is the linearised ratio estimator's on the log scale, then exponentiated; none for one document.
    """
    assert len(nll_sums) == len(num_tokens), (len(nll_sums), len(num_tokens))
    rows = [i for i, (nll, num) in enumerate(zip(nll_sums, num_tokens)) if num > 0 and not math.isnan(nll)]
    if not rows:
        return Metric(value=math.nan, n=0, kind="ppl", higher_is_better=False, unit="ppl")
    sums, counts = [float(nll_sums[i]) for i in rows], [float(num_tokens[i]) for i in rows]
    groups = [clusters[i] for i in rows] if clusters is not None else rows
    value = math.fsum(sums) / math.fsum(counts)
    variance, dof = ratio_variance(sums, counts, groups)
    low, high = t_interval(value, variance, dof) or (None, None)
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
    for flag in FLAGS:
        basis = generated or (rows if any(flag in row.grade.flags for row in rows) else [])
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


def ratio_variance(sums: Sequence[float], counts: Sequence[float], groups: Clusters) -> tuple[float, float]:
    """Cluster-robust variance of `sum(sums) / sum(counts)` and its degrees of freedom (clusters - 1).

    With counts of 1 this is the variance of a mean; with no groups every item is a cluster. NaN for one cluster.
    """
    total = math.fsum(counts)
    ratio = math.fsum(sums) / total
    residuals: dict[Hashable, float] = {}
    for i, (num, den) in enumerate(zip(sums, counts)):
        key = groups[i] if groups is not None else i
        residuals[key] = residuals.get(key, 0.0) + num - ratio * den
    num_draws = len(residuals)
    if num_draws < 2:
        return math.nan, 0.0
    scatter = math.fsum(r * r for r in residuals.values())
    return scatter * num_draws / (num_draws - 1) / total**2, num_draws - 1.0


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
