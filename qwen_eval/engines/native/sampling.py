"""Drawing the next token as the original does: repetition penalty, temperature, top-k, top-p, in that order.

`distribution` is the plain twin for one row; `TokenChoice` chooses for all running rows on the device.
"""

# B rows, S slots, V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_eval.core import Sampling
from qwen_eval.models.transfer import upload

# of SplitMix64 (Steele, Lea, Flood, 2014), as signed numbers
GOLDEN, MIX_1, MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

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


def noise_key(sampling: Sampling, ids: Sequence[int], k: int) -> int:
    """63 bits that belong to this request's `k`-th completion, whatever batch it runs in."""
    text = f"{sampling.seed}:{k}:{','.join(map(str, ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def uniform(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """[B] fp64 in [0, 1): a number for each key and position, the same on every device (SplitMix64).

    Noise without state: a step that is repeated or thrown away changes nothing of the ones after it.
    """
    x = keys_B + (positions_B + 1) * GOLDEN
    x = (x ^ _shifted(x, 30)) * MIX_1
    x = (x ^ _shifted(x, 27)) * MIX_2
    return _shifted(x ^ _shifted(x, 31), 11).double() * 2.0**-53


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right as an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What decides the tokens of one row: how they are drawn, its noise, and the tokens so far."""

    sampling: Sampling
    prompt: Sequence[int]
    k: int = 0


class TokenChoice:
    """The next token of each slot, chosen on the device; `draws`: all rows that will ever run.

    A row's tokens do not depend on which others run: every row is drawn in the order of the vocabulary by one number.
    """

    def __init__(self, draws: Iterable[Sampling], num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.is_sampled, self.is_cut, self.is_penalised = self.kind_of(draws)
        self.vocab_size, self.device = vocab_size, device
        self.keys_S, self.counts_S, self.top_k_S = torch.zeros(3, num_slots, dtype=torch.long, device=device).unbind()
        self.temperature_S, self.top_p_S, self.penalty_S = torch.zeros(3, num_slots, device=device).unbind()
        size = (num_slots, vocab_size) if self.is_penalised else (0, 0)
        self.seen_SV = torch.zeros(size, dtype=torch.bool, device=device)

    @property
    def is_plain(self) -> bool:
        """Every row takes its most likely token."""
        return not self.is_sampled and not self.is_penalised

    @staticmethod
    def kind_of(samplings: Iterable[Sampling]) -> tuple[bool, bool, bool]:
        """Whether any row is drawn, cut by top-k or top-p, penalised: what none needs is not computed."""
        distinct = set(samplings)
        is_sampled = any(not s.is_greedy for s in distinct)
        is_cut = any(not s.is_greedy and (s.top_k > 0 or s.top_p < 1.0) for s in distinct)
        return is_sampled, is_cut, any(s.repetition_penalty != 1.0 for s in distinct)

    @torch.inference_mode()
    def admit(self, first: int, draws: Sequence[Draw]) -> None:
        """New rows in the slots from `first` on."""
        if self.is_plain:
            return
        part, samplings = slice(first, first + len(draws)), [draw.sampling for draw in draws]
        keys = [noise_key(d.sampling, d.prompt, d.k) for d in draws]
        top_k = [min(s.top_k, self.vocab_size) or self.vocab_size for s in samplings]
        whole = torch.tensor([keys, [0] * len(draws), top_k])
        for field_S, values in zip((self.keys_S, self.counts_S, self.top_k_S), upload(whole, self.device).unbind()):
            field_S[part] = values
        real = [[s.temperature for s in samplings], [s.top_p for s in samplings]]
        real.append([s.repetition_penalty for s in samplings])
        fields = (self.temperature_S, self.top_p_S, self.penalty_S)
        for field_S, values in zip(fields, upload(torch.tensor(real), self.device).unbind()):
            field_S[part] = values
        if self.is_penalised:
            self.seen_SV[part] = False
            for slot, draw in enumerate(draws, first):
                self.seen_SV[slot].index_fill_(0, upload(torch.tensor(sorted(set(draw.prompt))), self.device), True)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        fields = (self.keys_S, self.counts_S, self.top_k_S, self.temperature_S, self.top_p_S, self.penalty_S)
        for field_S in fields:
            field_S[target] = field_S[source]
        if self.is_penalised:
            self.seen_SV[target] = self.seen_SV[source]

    @torch.inference_mode()
    def __call__(self, logits_BV: Tensor, first: int = 0) -> Tensor:
        """[B] tokens of the slots from `first` on; NON_FINITE where the logits are no distribution."""
        greedy_B = greedy_tokens(logits_BV)
        if self.is_plain:
            return greedy_B
        part = slice(first, first + len(logits_BV))
        scores_BV = logits_BV.float()
        if self.is_penalised:
            penalty_B1 = self.penalty_S[part, None]
            held = torch.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
            scores_BV = torch.where(self.seen_SV[part], held, scores_BV)
        tokens_B = scores_BV.argmax(-1)
        if self.is_sampled:
            tokens_B = torch.where(self.temperature_S[part] == 0, tokens_B, self._drawn(scores_BV, part))
            self.counts_S[part] += 1
        if self.is_penalised:
            self.seen_SV[part].scatter_(1, tokens_B[:, None], True)
        return torch.where(greedy_B == NON_FINITE, greedy_B, tokens_B)

    def _drawn(self, scores_BV: Tensor, part: slice) -> Tensor:
        temperature_B = self.temperature_S[part]
        scores_BV = scores_BV / torch.where(temperature_B == 0, 1.0, temperature_B)[:, None]
        if self.is_cut:
            scores_BV = _cut(scores_BV, self.top_k_S[part], self.top_p_S[part])
        below_BV = scores_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
        wanted_B1 = uniform(self.keys_S[part], self.counts_S[part])[:, None] * below_BV[:, -1:]
        return torch.searchsorted(below_BV, wanted_B1, right=True)[:, 0].clamp(max=scores_BV.shape[1] - 1)


def _cut(scores_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """`distribution`'s top-k and top-p, for each row its own."""
    ascending, order = scores_BV.sort(dim=-1)
    kth_B1 = ascending.gather(1, ascending.shape[1] - top_k_B.clamp(min=1)[:, None])
    removed = ascending.masked_fill(ascending < kth_B1, float("-inf")).softmax(-1).cumsum(-1) <= 1 - top_p_B[:, None]
    removed |= ascending < kth_B1
    removed[:, -1] = False
    return scores_BV.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), float("-inf"))
