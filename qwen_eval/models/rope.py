"""Rotary positions of Qwen: dynamic NTK, LogN, YaRN, with a span per layer for windowed attention.

Dynamic NTK is stateless here: `alpha` follows from the length of a sequence at prefill and stays for its whole life,
as in the original (which kept it as module state). Everything cached after rotation is valid for one alpha only.
"""

# N tokens, R half of the rotary dimension

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_eval.models.config import ModelConfig, Yarn
from qwen_eval.models.transfer import upload


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


class Rope:
    """Tables of one model, built once per alpha and grown as positions grow.

    Alphas and lengths are Python numbers throughout: nothing here reads a tensor back from the device.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._logn_tables: dict[int | None, Tensor] = {}

    def alpha(self, length: int, window: int | None = None) -> int:
        """The NTK alpha of a sequence whose prefill has `length` tokens, in a layer that sees `window` of them."""
        if not self.config.dynamic_ntk:
            return 1
        return ntk_alpha(min(length, window) if window else length, self.config.train_length)

    def key(self, length: int) -> tuple[int, ...]:
        """What a cached prefix depends on: the alphas of a sequence of this length, one per distinct window."""
        return tuple(self.alpha(length, window) for window in self.distinct_windows)

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        return tuple(dict.fromkeys(self.config.windows)) or (None,)

    def rotations(self, positions_N: Tensor, lengths: int | Sequence[int], longest: int) -> list[Rotation]:
        """Per layer, the rotation of tokens at `positions_N`, which are all below `longest`.

        `lengths`: prefill tokens of the sequence, or [N] of each token's own.
        """
        if not isinstance(lengths, int) and len({self.key(length) for length in set(lengths)}) == 1:
            lengths = lengths[0]
        if isinstance(lengths, int):
            tables = RowTables(self, [lengths], max(longest, lengths))
            return tables.rotations(positions_N, None, longest)
        tables = RowTables(self, lengths, longest)
        return tables.rotations(positions_N, upload(torch.tensor(tables.offsets(lengths)), self.device), longest)

    def table(self, alpha: int, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P,R] with P >= `num_positions`."""
        if alpha not in self._tables or len(self._tables[alpha][0]) < num_positions:
            self._tables[alpha] = self._build(alpha, _rounded(num_positions))
        return self._tables[alpha]

    def logn(self, window: int | None, longest: int) -> Tensor | None:
        """Factors [P] of queries by position, P >= `longest`; None where every factor below `longest` is 1."""
        train_length = self.config.train_length
        if not self.config.logn or (window is not None and window <= train_length) or longest <= train_length:
            return None
        if window not in self._logn_tables or len(self._logn_tables[window]) < longest:
            steps = torch.arange(_rounded(longest))
            self._logn_tables[window] = logn_factors(steps, train_length, window).to(self.device)
        return self._logn_tables[window]

    def _build(self, alpha: int, length: int) -> tuple[Tensor, Tensor]:
        c, factor = self.config, 1.0
        if c.yarn is not None:
            frequencies, factor = yarn_frequencies(c.rotary_dim, c.rope_base, c.yarn)
        else:
            frequencies = inverse_frequencies(c.rotary_dim, c.rope_base, alpha)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        return angles.cos().mul_(factor).to(self.device), angles.sin_().mul_(factor).to(self.device)


class RowTables:
    """Tables for tokens whose sequences have different alphas, one behind another: a token finds its own by an offset.

    Offsets are data, so a decode step looks up every row in the same way whatever the alphas are.
    """

    def __init__(self, rope: Rope, lengths: Sequence[int], num_positions: int) -> None:
        self.rope = rope
        distinct = sorted(set(lengths))
        self._alphas = {w: sorted({rope.alpha(n, w) for n in distinct}) for w in rope.distinct_windows}
        self._tables: dict[int | None, tuple[Tensor, Tensor]] = {}
        for window, alphas in self._alphas.items():
            tables = [rope.table(alpha, num_positions) for alpha in alphas]
            if len(tables) > 1:
                tables = [(cos[:num_positions], sin[:num_positions]) for cos, sin in tables]
            cos, sin = zip(*tables)
            self._tables[window] = (cos[0], sin[0]) if len(tables) == 1 else (torch.cat(cos), torch.cat(sin))
        self._stride = num_positions
        self._logn: dict[int | None, Tensor] = {}  # kept as long as this: captured steps read them where they lie

    @property
    def is_single(self) -> bool:
        """One alpha in every window: offsets are all 0."""
        return all(len(alphas) == 1 for alphas in self._alphas.values())

    def offsets(self, lengths: Sequence[int]) -> list[list[int]]:
        """[W][N]: where the table of each token begins, by the prefill length of its sequence, for each window."""
        found = []
        for window, alphas in self._alphas.items():
            start = {n: alphas.index(self.rope.alpha(n, window)) * self._stride for n in set(lengths)}
            found.append([start[n] for n in lengths])
        return found

    def rotations(self, positions_N: Tensor, offsets_WN: Tensor | None, longest: int) -> list[Rotation]:
        """Per layer; `offsets_WN` None where they are all 0."""
        by_window = {}
        for w, (window, (cos, sin)) in enumerate(self._tables.items()):
            index_N = positions_N if offsets_WN is None else positions_N + offsets_WN[w]
            by_window[window] = Rotation(
                cos=cos[index_N], sin=sin[index_N], logn=self._factors(positions_N, window, longest)
            )
        config = self.rope.config
        return [by_window[config.window(i)] for i in range(config.num_layers)]

    def _factors(self, positions_N: Tensor, window: int | None, longest: int) -> Tensor | None:
        table = self.rope.logn(window, longest)
        if table is None:
            return None
        if window not in self._logn or len(self._logn[window]) < longest:
            self._logn[window] = table
        return self._logn[window][positions_N]


def _rounded(num_positions: int) -> int:
    return max(64, 1 << math.ceil(math.log2(num_positions)))
