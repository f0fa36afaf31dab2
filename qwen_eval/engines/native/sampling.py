"""Drawing the next token as the original does: repetition penalty, temperature, top-k, top-p, in that order."""

# V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_eval.core import Sampling

NON_FINITE = -1  # in place of a token: the logits held NaN or an infinity


def greedy_tokens(logits_BV: Tensor) -> Tensor:
    """[B] the most likely token of each row, the first of equals; NON_FINITE where the row is no distribution.

    NaN counts as the greatest, so the greatest logit alone shows NaN and infinity: no further pass over the logits, and
    no further read by the host. A lone -inf is no token that could be chosen.
    """
    best_B = logits_BV.argmax(-1)
    top_B = logits_BV.gather(1, best_B[:, None])[:, 0]
    return torch.where(torch.isfinite(top_B), best_B, NON_FINITE)


def distribution(logits_V: Tensor, ids: Sequence[int], sampling: Sampling) -> Tensor:
    """Probabilities [V] fp32 after all processors. `ids`: prompt and generated tokens, which the penalty looks at."""
    scores = penalised(logits_V.float(), ids, sampling.repetition_penalty)
    if sampling.temperature not in (0.0, 1.0):
        scores = scores / sampling.temperature
    if sampling.top_k > 0:
        kth = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if sampling.top_p < 1.0:
        scores = _nucleus(scores, sampling.top_p)
    return scores.softmax(-1)


def penalised(scores_V: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """Scores of every token already present divided (positive) or multiplied (negative) by the penalty."""
    if penalty == 1.0 or not ids:
        return scores_V
    seen = torch.tensor(sorted(set(ids)), device=scores_V.device)
    held = scores_V[seen]
    return scores_V.index_put((seen,), torch.where(held < 0, held * penalty, held / penalty))


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens with probability >= top_p (ascending cumulative sum, as transformers counts)."""
    ascending, order = scores.sort(descending=False)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[-1] = False
    return scores.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), float("-inf"))


def generator_of(sampling: Sampling, ids: Sequence[int], k: int) -> torch.Generator:
    """Random numbers that belong to this request's `k`-th completion, whatever batch it runs in."""
    text = f"{sampling.seed}:{k}:{','.join(map(str, ids))}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def draw(logits_V: Tensor, ids: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token; greedy takes the highest penalised score (the first of equals)."""
    if sampling.is_greedy:
        return int(penalised(logits_V.float(), ids, sampling.repetition_penalty).argmax())
    probabilities = distribution(logits_V, ids, sampling).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
