"""Which item comes when, and what it counts: the random order of a benchmark, its weights, its blocks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from qwen_eval.core import AveragesGroups, ConfigError, Record, Sample, Task
from qwen_eval.report.sequential import Array, block_ends

RUN_AHEAD = 1024  # items of the reference before the other model is loaded for the first time


def drawn_order(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """A uniformly random order, given by the seed and the ids alone: the order of the file plays no part."""

    def rank(sample: Sample) -> bytes:
        return hashlib.sha256(f"{seed}\0{sample.id}".encode("utf-8", "surrogatepass")).digest()

    return sorted(samples, key=rank)


def weights(task: Task, ordered: Sequence[Sample]) -> Array:
    """What each item counts in the score on the benchmark, of mean 1: all alike, or each group alike."""
    if not is_macro(task):
        return np.ones(len(ordered))
    sizes = Counter(sample.group for sample in ordered)
    return np.array([len(ordered) / (len(sizes) * sizes[sample.group]) for sample in ordered])


def is_macro(task: Task) -> bool:
    return isinstance(task, AveragesGroups) and task.average == "macro"


def ends_until(size: int, max_items: int | None) -> list[int]:
    """Where blocks end; the last one is cut at `max_items`."""
    most = size if max_items is None else min(size, max_items)
    ends = [end for end in block_ends(size) if end < most]
    return [*ends, most]


def reach(ends: Sequence[int], at: int, *, is_together: bool) -> int:
    """How far the reference is asked before block `at` of the candidate: where only one model fits in memory it runs
    ahead, to twice as many items, so that models are loaded few times.
    """
    if is_together:
        return ends[at]
    wanted = max(RUN_AHEAD, 2 * ends[at])
    return next((end for end in ends[at:] if end >= wanted), ends[-1])


def score(record: Record) -> float:
    """In 0..1, as the evidence needs it; ConfigError for an item without such a score."""
    found = record.grade.score
    if found is None:
        raise ConfigError(
            f"{record.sample_id}: has no score, as where a split has no answers; use a split that has them"
        )
    if not 0.0 <= found <= 1.0:
        raise ConfigError(f"{record.sample_id}: scores {found:g}; a certificate needs scores between 0 and 1")
    return found
