"""What counting does: the baselines that the model card holds the miniature against."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np


class Trigram:
    """Interpolated Kneser-Ney (absolute discount 0.75) of order 3 over token ids."""

    def __init__(self, ids: Sequence[int], num_tokens: int, discount: float = 0.75) -> None:
        self.discount, self.num_tokens = discount, num_tokens
        self.unigrams = Counter(ids)
        self.total = len(ids)
        trigrams = Counter(zip(ids, ids[1:], ids[2:]))
        bigrams = Counter((b, c) for _, b, c in trigrams)  # continuation counts: in how many contexts b c was seen
        singles = Counter(c for _, c in bigrams)
        self.levels = [_level(trigrams), _level(bigrams)]
        self.singles, self.num_bigrams = singles, len(bigrams)

    def probability(self, a: int, b: int, c: int) -> float:
        lowest = (self.singles[c] + 0.5) / (self.num_bigrams + 0.5 * self.num_tokens)
        middle = self._discounted(self.levels[1], (b,), c, lowest)
        return self._discounted(self.levels[0], (a, b), c, middle)

    def _discounted(self, level: Any, context: tuple[int, ...], token: int, lower: float) -> float:
        counts, totals, kinds = level
        total = totals.get(context, 0)
        if not total:
            return lower
        kept = max(counts.get((*context, token), 0) - self.discount, 0.0)
        return float(kept + self.discount * kinds[context] * lower) / float(total)

    def perplexity(self, ids: Sequence[int]) -> float:
        logs = [np.log(self.probability(a, b, c)) for a, b, c in zip(ids, ids[1:], ids[2:])]
        return float(np.exp(-np.mean(logs)))

    def unigram_perplexity(self, ids: Sequence[int]) -> float:
        share = [(self.unigrams[i] + 0.5) / (self.total + 0.5 * self.num_tokens) for i in ids]
        return float(np.exp(-np.mean(np.log(share))))


def _level(counts: Counter[tuple[int, ...]]) -> tuple[Any, dict[Any, int], dict[Any, int]]:
    totals: dict[Any, int] = defaultdict(int)
    kinds: dict[Any, int] = defaultdict(int)
    for key, count in counts.items():
        totals[key[:-1]] += count
        kinds[key[:-1]] += 1
    return counts, totals, kinds
