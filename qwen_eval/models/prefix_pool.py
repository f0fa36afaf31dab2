"""Copies of the prefixes that running rows continue, in memory that stays: which row reads which is data of a step.

A captured step reads the same memory each time, and prefixes come and go. So a step reads their copies in a pool, by
the place of each row's prefix and its length, and one captured step serves every prefix that fits.
"""

# B rows, K key-value heads, S keys, D head channels

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_eval.models.kv_cache import Prefix, Slots

GATHERED_BYTES = 256 * 2**20  # of one layer's prefixes, one for each row, where no kernel reads them by their place


@dataclass(kw_only=True)
class Pool:
    """Places for prefixes of up to `slots.capacity` tokens."""

    slots: Slots
    held: dict[int, weakref.ref[Prefix]] = field(default_factory=dict)  # by place

    def place_of(self, prefix: Prefix) -> int | None:
        return next((place for place, ref in self.held.items() if ref() is prefix), None)

    def take(self, prefixes: Sequence[Prefix]) -> list[int]:
        """The place of each, copied there if it is not; a single one lies in the first place."""
        kept = {place for prefix in prefixes if (place := self.place_of(prefix)) is not None}
        is_single = len(prefixes) == 1
        free = [place for place in range(self.slots.num_slots) if is_single or place not in kept]
        return [self._place(prefix, free, is_single) for prefix in prefixes]

    def _place(self, prefix: Prefix, free: list[int], is_single: bool) -> int:
        found = self.place_of(prefix)
        if found is not None and (found == 0 or not is_single):
            return found
        place = free.pop(0)
        self.slots.put(place, prefix)
        self.held = {at: ref for at, ref in self.held.items() if at != place and ref() is not prefix}
        self.held[place] = weakref.ref(prefix)
        return place


class PrefixPools:
    """Pools of a few sizes, made when they are needed: what was captured with one stays valid.

    `make(places, tokens)` allocates; `round_places` and `round_tokens` give few sizes. `max_gathered`: tokens that
    all rows together may read of different prefixes; None: any number.
    """

    def __init__(
        self,
        make: Callable[[int, int], Slots],
        round_places: Callable[[int], int],
        round_tokens: Callable[[int], int],
        *,
        max_tokens: int,
        max_gathered: int | None = None,
    ) -> None:
        self._make, self._round_places, self._round_tokens = make, round_places, round_tokens
        self.max_tokens, self.max_gathered = max_tokens, max_gathered
        self.pools: list[Pool] = []

    def pool(self, num_prefixes: int, longest: int, num_gathering: int) -> Pool | None:
        """The smallest that is large enough; None where memory for another is not granted.

        `num_gathering`: rows that read different prefixes.
        """
        found = self._pool(num_prefixes, longest)
        if found is None or self.max_gathered is None:
            return found
        return found if num_gathering * found.slots.capacity <= self.max_gathered else None

    def _pool(self, num_prefixes: int, longest: int) -> Pool | None:
        large = [p for p in self.pools if p.slots.num_slots >= num_prefixes and p.slots.capacity >= longest]
        if large:
            return min(large, key=lambda pool: pool.slots.num_slots * pool.slots.capacity)
        places, tokens = self._round_places(num_prefixes), self._round_tokens(longest)
        used = sum(pool.slots.num_slots * pool.slots.capacity for pool in self.pools)
        if used + places * tokens > self.max_tokens:
            return None
        self.pools.append(Pool(slots=self._make(places, tokens)))
        return self.pools[-1]


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The prefixes of a step's rows as data. `is_single`: all rows continue the one in the first place."""

    slots: Slots
    is_single: bool
    place_B: Tensor
    length_B: Tensor  # tokens of the row's prefix; 0 where it has none
    positions_B: Tensor

    def span(self, window: int | None) -> tuple[Tensor, Tensor]:
        """[B] first and end of the keys that a row sees, counted in its place.

        A windowed layer has kept the last `window - 1` tokens of a prefix only.
        """
        if window is None:
            return torch.zeros_like(self.length_B), self.length_B
        start_B = (self.length_B - (window - 1)).clamp(min=0)
        return (self.positions_B - window + 1 - start_B).clamp(min=0), self.length_B - start_B

    def mask(self, window: int | None) -> Tensor:
        """[B,S] bool, or [1,S] where all rows see the same: then heads of one key-value head are one product."""
        steps_S = torch.arange(self.slots.capacity, device=self.length_B.device)
        first_B, end_B = self.span(window)
        if self.is_single and window is None:
            first_B, end_B = first_B[:1], end_B[:1]
        return (steps_S >= first_B[:, None]) & (steps_S < end_B[:, None])
