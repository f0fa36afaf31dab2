"""What a trained model can do, measured with the training forward: held-out exercises, perplexity, baselines.

The checks of the run itself. The figures of the model card come from `qwen_eval`, which reads the exported checkpoint.
"""

# B batch, T tokens, V vocabulary

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiktoken
import torch
from torch.nn import functional as F

from nano.model import Qwen, ntk_alpha
from qwen_eval import exercises as ex

Pair = tuple[str, str]  # prompt, what must follow


def choice_pairs(dev: ex.Source, test: ex.Source, language: str, n: int, shots: int) -> list[Pair]:
    pairs = []
    for _ in range(n):
        exercise = test.choice(language)
        examples = ex.other_facts(dev, exercise, shots)
        pairs.append((ex.few_shot_choice(exercise, examples), ex.choice_gold(exercise)))
    return pairs


def arithmetic_pairs(dev: ex.Source, test: ex.Source, steps: int, n: int, shots: int = 2) -> list[Pair]:
    pairs = []
    for _ in range(n):
        exercise, examples = test.arithmetic(steps), [dev.arithmetic() for _ in range(shots)]
        pairs.append((ex.few_shot_arithmetic(exercise, examples), ex.arithmetic_gold(exercise)))
    return pairs


def recall_pairs(test: ex.Source, language: str, n: int, chars: int = 400, needles: int = 1) -> list[Pair]:
    made = [test.recall(language, chars=chars, needles=needles) for _ in range(n)]
    return [(ex.recall_block(e), ex.recall_gold(e)) for e in made]


@torch.inference_mode()
def exact(model: Qwen, vocabulary: tiktoken.Encoding, pairs: Sequence[Pair], batch: int = 32) -> float:
    """Share of pairs whose continuation is the greedy one, token by token."""
    encoded = [(vocabulary.encode_ordinary(p), vocabulary.encode_ordinary(g)) for p, g in pairs]
    right = 0
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
        ids = torch.zeros(len(part), max(len(p) + len(g) for p, g in part), dtype=torch.long)
        for row, (prompt, gold) in enumerate(part):
            ids[row, : len(prompt) + len(gold)] = torch.tensor(prompt + gold)
        greedy = model(ids).argmax(-1)
        for row, (prompt, gold) in enumerate(part):
            right += greedy[row, len(prompt) - 1 : len(prompt) + len(gold) - 1].tolist() == gold
    return right / len(pairs)


@torch.inference_mode()
def perplexity(model: Qwen, ids: Any, length: int, *, ntk: bool, logn: bool, limit: int = 40_000) -> float:
    """exp of the mean loss over non-overlapping chunks of exactly `length` tokens."""
    num_chunks = min(len(ids), limit) // length
    alpha = ntk_alpha(length, model.shape.seq_length) if ntk else 1.0
    total, count = 0.0, 0
    for rows_BT in (
        torch.from_numpy(ids[: num_chunks * length].astype(np.int64))
        .view(num_chunks, length)
        .split(max(1, 2048 // length))
    ):
        logits = model(rows_BT, alpha=alpha, logn=logn)[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), rows_BT[:, 1:].flatten(), reduction="sum").item()
        count += rows_BT[:, 1:].numel()
    return float(np.exp(total / count))


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


def report(
    model: Qwen, vocabulary: tiktoken.Encoding, passage: Callable[[random.Random, str, int], str], n: int = 200
) -> dict[str, float]:
    """Every held-out exercise kind by name."""
    dev = ex.Source(rng=random.Random(11), heldout=False, passage=passage)
    test = ex.Source(rng=random.Random(12), heldout=True, passage=passage)
    sets = {
        "choice en 5-shot": choice_pairs(dev, test, "en", n, 5),
        "choice en 0-shot": choice_pairs(dev, test, "en", n, 0),
        "choice zh 5-shot": choice_pairs(dev, test, "zh", n, 5),
        "arithmetic one step": arithmetic_pairs(dev, test, 1, n),
        "arithmetic two steps": arithmetic_pairs(dev, test, 2, n),
        "recall en": recall_pairs(test, "en", n),
        "recall en 3 needles": recall_pairs(test, "en", n, chars=250, needles=3),
        "recall zh": recall_pairs(test, "zh", n),
    }
    return {name: exact(model, vocabulary, pairs) for name, pairs in sets.items()}
