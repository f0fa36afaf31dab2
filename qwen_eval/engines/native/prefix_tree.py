"""Which token sequences share a beginning worth computing once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

# Rows of two prefixes that run together read both at each step: one that adds little to the other saves less than that.
MIN_PART_OF_RUNNING = 1 / 8
MIN_SAVED_TOKENS = 64  # a shared node costs about one small forward: it must save more than that


@dataclass(kw_only=True)
class Node:
    """Tokens `ids` after the `depth` tokens of its ancestors; `leaves` continue right after it."""

    ids: tuple[int, ...]
    depth: int
    children: list[Node] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)  # indices into the sequences

    @property
    def end(self) -> int:
        return self.depth + len(self.ids)


def build(
    sequences: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    min_saved: int = MIN_SAVED_TOKENS,
    min_part: float = 0.0,
) -> Node:
    """The tree over all sequences; at most the first `limits[i]` tokens of sequence i are shared.

    A node is made where it saves at least `min_saved` tokens, (sequences below - 1) x its own tokens, and where its own
    are at least `min_part` of those before it.
    """
    keys = [np.asarray(s, dtype=">u4").tobytes() for s in sequences]  # big-endian bytes sort like the integers
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = np.array([0] + [_shared(keys[a], keys[b], min(limits[a], limits[b])) for a, b in pairwise(order)])
    root = Node(ids=(), depth=0)
    pending = [(0, len(order), root)]
    while pending:
        low, high, node = pending.pop()
        if high - low == 1:
            node.leaves.append(order[low])
            continue
        common = int(shared[low + 1 : high].min())
        own = common - node.end
        if own * (high - low - 1) >= min_saved and own >= min_part * node.end:
            child = Node(ids=tuple(sequences[order[low]][node.end : common]), depth=node.end)
            node.children.append(child)
            node = child
        cuts = [low, *(low + 1 + np.flatnonzero(shared[low + 1 : high] == common)).tolist(), high]
        pending.extend((a, b, node) for a, b in reversed(list(pairwise(cuts))))
    return root


def _shared(a: bytes, b: bytes, limit: int) -> int:
    """Tokens that two keys have in common at their beginning, at most `limit`."""
    size = min(len(a), len(b), 4 * limit)
    if a[:size] == b[:size]:
        return size // 4
    different = np.frombuffer(a[:size], np.uint32) != np.frombuffer(b[:size], np.uint32)
    return int(different.argmax())
