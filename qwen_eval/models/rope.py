"""Rotary positions of Qwen: dynamic NTK, LogN, YaRN, with a span per layer for windowed attention.

Dynamic NTK is stateless here: `alpha` follows from the length of a sequence at prefill and stays for its whole life,
as in the original (which kept it as module state). Everything cached after rotation is valid for one alpha only.
"""

# N tokens, R half of the rotary dimension

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_eval.models.config import ModelConfig, Yarn


def ntk_alpha(length: int, train_length: int) -> int:
    """1 up to the training length, then 3, 7, 15, 31 ... for each doubling (Qwen technical report, section 2.3.2)."""
    if length <= train_length:
        return 1
    return int(max(2 ** math.ceil(math.log2(length / train_length) + 1) - 1, 1))


def inverse_frequencies(dim: int, base: float, alpha: float = 1.0) -> Tensor:
    """[dim / 2] fp32: base' ** (-2j / dim) with base' = base * alpha ** (dim / (dim - 2))."""
    scaled = base * alpha ** (dim / (dim - 2)) if alpha != 1 else base
    return 1.0 / (scaled ** (torch.arange(0, dim, 2).float() / dim))


def yarn_frequencies(dim: int, base: float, yarn: Yarn) -> tuple[Tensor, float]:
    """Interpolated frequencies and the factor on cos and sin (YaRN, section 3.2 and 3.4)."""

    def dimension_of(rotations: float) -> float:
        return dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    plain = inverse_frequencies(dim, base)
    return plain / yarn.factor * ramp + plain * (1 - ramp), _attention_factor(yarn)


def _attention_factor(yarn: Yarn) -> float:
    """The factor on cos and sin: as stated, else from the two scales (where both are there), else from `factor`."""

    def scaled(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return scaled(yarn.mscale) / scaled(yarn.mscale_all_dim)
    return scaled(1.0)


def logn_factors(positions: Tensor, train_length: int, window: int | None = None) -> Tensor:
    """ln(i) / ln(train_length) for the i-th token (from 1) where i exceeds the training length, else 1; fp32.

    A windowed layer never sees more than `window` keys, so i stops there.
    """
    count = (positions + 1).clamp(max=window) if window else positions + 1
    factors = count.double().log() / math.log(train_length)
    return torch.where(count > train_length, factors, 1.0).float()


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What turns the heads of N tokens: `cos`, `sin` [N, R] fp32, and `logn` [N] fp32 for queries, None where all 1."""

    cos: Tensor
    sin: Tensor
    logn: Tensor | None

    def rows(self, index: Tensor) -> Rotation:
        logn = None if self.logn is None else self.logn[index]
        return Rotation(cos=self.cos[index], sin=self.sin[index], logn=logn)

    def turn(self, heads_NHD: Tensor) -> Tensor:
        """Rotate-half on the leading 2R channels, in fp32, back to the input's dtype (as the original)."""
        half = self.cos.shape[-1]
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        x1, x2 = heads_NHD[..., :half].float(), heads_NHD[..., half : 2 * half].float()
        turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(heads_NHD.dtype)
        if 2 * half == heads_NHD.shape[-1]:
            return turned
        return torch.cat((turned, heads_NHD[..., 2 * half :]), dim=-1)


class Rope:
    """Tables of one model, built once per (alpha) and grown as positions grow."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def alpha(self, length: int, window: int | None = None) -> int:
        """The NTK alpha of a sequence whose prefill has `length` tokens, in a layer that sees `window` of them."""
        if not self.config.dynamic_ntk:
            return 1
        return ntk_alpha(min(length, window) if window else length, self.config.train_length)

    def key(self, length: int) -> tuple[int, ...]:
        """What a cached prefix depends on: the alphas of a sequence of this length, one per distinct window."""
        return tuple(self.alpha(length, window) for window in self._distinct_windows())

    def _distinct_windows(self) -> tuple[int | None, ...]:
        return tuple(dict.fromkeys(self.config.windows)) or (None,)

    def rotations(self, positions_N: Tensor, lengths_N: Tensor | int) -> list[Rotation]:
        """Per layer, the rotation of tokens at `positions_N` in sequences of `lengths_N` prefill tokens."""
        by_window = {w: self._rotation(positions_N, lengths_N, w) for w in self._distinct_windows()}
        return [by_window[self.config.window(i)] for i in range(self.config.num_layers)]

    def _rotation(self, positions_N: Tensor, lengths_N: Tensor | int, window: int | None) -> Rotation:
        alphas = self._alphas(lengths_N, window)
        if isinstance(alphas, int):
            cos, sin = self._lookup(alphas, positions_N, lengths_N if isinstance(lengths_N, int) else 0)
        else:
            cos = torch.empty(len(positions_N), self.config.rotary_dim // 2, device=self.device)
            sin = torch.empty_like(cos)
            for alpha in set(alphas.tolist()):
                rows = alphas == alpha
                cos[rows], sin[rows] = self._lookup(int(alpha), positions_N[rows])
        return Rotation(cos=cos, sin=sin, logn=self._logn(positions_N, window))

    def _alphas(self, lengths_N: Tensor | int, window: int | None) -> int | Tensor:
        if isinstance(lengths_N, int):
            return self.alpha(lengths_N, window)
        distinct = {length: self.alpha(int(length), window) for length in set(lengths_N.tolist())}
        if len(set(distinct.values())) == 1:
            return next(iter(distinct.values()))
        return torch.tensor([distinct[length] for length in lengths_N.tolist()], device=self.device)

    def _logn(self, positions_N: Tensor, window: int | None) -> Tensor | None:
        if not self.config.logn or (window is not None and window <= self.config.train_length):
            return None
        if int(positions_N.max()) < self.config.train_length:
            return None
        return logn_factors(positions_N, self.config.train_length, window)

    def _lookup(self, alpha: int, positions: Tensor, length: int = 0) -> tuple[Tensor, Tensor]:
        """Rows of the table of `alpha`, built at once for the whole `length` where that is known."""
        needed = max(int(positions.max()) + 1, length)
        if alpha not in self._tables or len(self._tables[alpha][0]) < needed:
            self._tables[alpha] = self._build(alpha, max(64, 2 ** math.ceil(math.log2(needed))))
        cos, sin = self._tables[alpha]
        return cos[positions], sin[positions]

    def _build(self, alpha: int, length: int) -> tuple[Tensor, Tensor]:
        c, factor = self.config, 1.0
        if c.yarn is not None:
            frequencies, factor = yarn_frequencies(c.rotary_dim, c.rope_base, c.yarn)
        else:
            frequencies = inverse_frequencies(c.rotary_dim, c.rope_base, alpha)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        return angles.cos().mul_(factor).to(self.device), angles.sin_().mul_(factor).to(self.device)
