"""Scores of a whole corpus: BLEU and chrF are functions of summed counts, not means over segments; their intervals.

A segment keeps its counts, as sacreBLEU makes them, so scores, intervals and comparisons need no text. What is drawn
in the bootstrap is a cluster of segments, a document where documents are known.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from qwen_eval.core import Metric
from qwen_eval.metrics import cluster_variance, t_interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sacrebleu.metrics import BLEU as Bleu
    from sacrebleu.metrics import CHRF as Chrf

BLEU_QWEN, BLEU_SACREBLEU, CHRF = "bleu_qwen", "bleu_sacrebleu", "chrf2"
NUM_DRAWS = 1_000
MAX_CHARACTERS = 20_000  # of a segment: a bound on what a looping model costs


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One translated segment. `counts` belong to one score; `group` is a corpus of its own (a language pair)."""

    counts: tuple[int, ...]
    group: str = ""
    cluster: Hashable = ""


# --- counting ------------------------------------------------------------------------------------------------------


def bleu_counts(reply: str, reference: str, *, tokenize: str) -> tuple[int, ...]:
    """Length of the reply and of the reference, matched n-grams of 1 to 4, n-grams of the reply.

    `tokenize`: sacreBLEU's "13a" or "zh"; "jieba" cuts both texts into words first and then does as "13a".
    """
    reply, reference = reply[:MAX_CHARACTERS], reference[:MAX_CHARACTERS]
    if tokenize == "jieba":
        return bleu_counts(cut_words(reply), cut_words(reference), tokenize="13a")
    return _counts(_bleu(tokenize), reply, reference)


def chrf_counts(reply: str, reference: str) -> tuple[int, ...]:
    """Character n-grams of 1 to 6: of the reply, of the reference, in both."""
    return _counts(_chrf(), reply[:MAX_CHARACTERS], reference[:MAX_CHARACTERS])


def cut_words(text: str) -> str:
    """Words of a Chinese text with spaces between them, as jieba cuts it."""
    return " ".join(_jieba()(text))


def _counts(score: Bleu | Chrf, reply: str, reference: str) -> tuple[int, ...]:
    return tuple(int(x) for x in score._extract_corpus_statistics([reply], [[reference]])[0])


@cache
def _bleu(tokenize: str) -> Bleu:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenize)


@cache
def _chrf() -> Chrf:
    from sacrebleu.metrics import CHRF

    return CHRF()


@cache
def _jieba() -> Callable[[str], Iterator[str]]:
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)  # it tells on stderr that it loads its dictionary
    return jieba.cut


# --- scores --------------------------------------------------------------------------------------------------------


def corpus_score(name: str, sums: Sequence[int]) -> float:
    """BLEU or chrF2, 0 to 100, of summed counts."""
    score = _chrf() if name == CHRF else _bleu("13a")  # the counts are made: no text is tokenised any more
    return float(score._compute_score_from_stats([int(x) for x in sums]).score)


def segment_bleu(counts: Sequence[int]) -> float:
    """BLEU of one segment in 0..1, over the orders that it has: for looking at segments, not for averages."""
    from sacrebleu.metrics import BLEU

    matched, total = list(counts[2:6]), list(counts[6:10])
    found = BLEU.compute_bleu(matched, total, counts[0], counts[1], smooth_method="exp", effective_order=True)
    return float(found.score) / 100


def corpus_metric(name: str, segments: Sequence[Segment]) -> Metric:
    """The score, averaged over groups where there are several; the interval is from a bootstrap over clusters."""
    unit = "chrF2" if name == CHRF else "BLEU"
    if not segments:
        return Metric(value=math.nan, n=0, kind="mean", unit=unit)
    value = group_mean(name, segments)
    low, high = t_interval(value, *variance_of(replicates(name, segments), segments)) or (None, None)
    return Metric(
        value=value, n=len(segments), kind="mean", low=None if low is None else max(0.0, low),
        high=None if high is None else min(100.0, high), unit=unit,
        num_clusters=len({(segment.group, segment.cluster) for segment in segments}),
    )  # fmt: skip


def group_mean(name: str, segments: Sequence[Segment]) -> float:
    tables = _by_cluster(segments)
    return math.fsum(corpus_score(name, table.sum(axis=0).tolist()) for table in tables) / len(tables)


def replicates(name: str, segments: Sequence[Segment], *, seed: int = 0) -> NDArray[np.float64]:
    """The score of `NUM_DRAWS` draws of clusters with replacement, within each group.

    The draws depend on the clusters and the seed alone: two systems over the same segments meet the same draws.
    """
    import numpy as np

    tables = _by_cluster(segments)
    found = np.zeros(NUM_DRAWS)
    for i, table in enumerate(tables):
        num = len(table)
        draws = np.random.default_rng([seed, i]).multinomial(num, np.full(num, 1 / num), size=NUM_DRAWS)
        found += [corpus_score(name, sums.tolist()) for sums in draws @ table]
    return np.asarray(found / len(tables), dtype=np.float64)


def variance_of(scores: NDArray[np.float64], segments: Sequence[Segment]) -> tuple[float, float]:
    """Variance that the replicates show, and its degrees of freedom; NaN and 0 where they show none.

    Of few or uneven clusters a bootstrap shows too little: the variance is raised as much as CR2 would raise it for a
    mean over clusters of these sizes, and the degrees of freedom are CR2's, of the group that has fewest.
    """
    import numpy as np

    variance = float(scores.var(ddof=1))
    sizes = [table[:, 1].astype(np.float64) for table in _by_cluster(segments)]  # tokens of the references
    if not variance > 0 or min(map(np.count_nonzero, sizes)) < 2:
        return math.nan, 0.0  # no draw differs, or there is one cluster: the draws say nothing
    known = [size[size > 0] for size in sizes]
    dof = min(float(cluster_variance(np.zeros_like(size), size)[1]) for size in known)
    return variance * max(_shortfall(size) for size in known), dof


def _shortfall(sizes: NDArray[np.float64]) -> float:
    """True over shown variance, where clusters move as a whole; clusters / (clusters - 1) for equal sizes."""
    weights = sizes / sizes.sum()
    squares = (weights**2).sum()
    return float(squares / (weights**2 * (1 - 2 * weights + squares)).sum())


def least_clusters(segments: Sequence[Segment]) -> int:
    """Clusters of the group that has fewest."""
    return min(len(table) for table in _by_cluster(segments))


def _by_cluster(segments: Sequence[Segment]) -> list[NDArray[np.int64]]:
    """One table a group: a row a cluster, the sums of its counts; both sorted, so that draws depend on no order."""
    import numpy as np

    sums: dict[str, dict[Hashable, NDArray[np.int64]]] = defaultdict(dict)
    for segment in segments:
        row = np.asarray(segment.counts, dtype=np.int64)
        before = sums[segment.group].get(segment.cluster)
        sums[segment.group][segment.cluster] = row if before is None else before + row
    return [np.stack([sums[group][key] for key in sorted(sums[group], key=str)]) for group in sorted(sums)]
