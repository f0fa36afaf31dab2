"""Decode steps: one token for each running row, out of static buffers, with nothing read back from the device.

Python knows every length; the device holds the same numbers as data. A step is described by its `StepShape`: steps of
one shape run the same kernels on the same memory and differ in data only.
"""

# B rows of a step, W distinct windows, E hidden size

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen_eval.models.attend import DecodeAttend, PrefixGroup, by_layer
from qwen_eval.models.graph import StepGraphs
from qwen_eval.models.kv_cache import Prefix, Slots
from qwen_eval.models.prefix_pool import Pool, Pooled, PrefixPools
from qwen_eval.models.rope import Rope, Rotation, RowTables
from qwen_eval.models.transfer import upload
from qwen_eval.models.transformer import Transformer

# hidden states [B,E] -> what a step gives [B,*], and the tokens [B] that are fed next, where they are known by then
Finish = Callable[[Tensor], "StepResult"]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes that a step is rounded up to, so that few shapes occur."""

    num_keys: int  # a multiple of this, of 8 times this beyond 8 of them, and so on
    is_exact_rows: bool

    def keys(self, needed: int) -> int:
        return needed if self.num_keys == 1 else _rounded(needed, self.num_keys)

    def rows(self, needed: int) -> int:
        """1, 2, 4, 8, then multiples of 8, of 16 beyond 64, of 32 beyond 128, and so on."""
        if self.is_exact_rows:
            return needed
        return next((size for size in (1, 2, 4) if size >= needed), _rounded(needed, 8))

    def rows_within(self, wanted: int, room: int) -> int:
        """`wanted` rows, or as many as `room` rows of memory hold: padding takes memory too."""
        if self.rows(min(wanted, room)) <= room:
            return min(wanted, room)
        return next((size for size in range(room, 0, -1) if self.rows(size) <= room), 1)


def _rounded(needed: int, step: int) -> int:
    """Up to a multiple of `step`, which doubles beyond 8 of them, and so on: less than a quarter is added."""
    while needed > 8 * step:
        step *= 2
    return -(-needed // step) * step


EXACT = Buckets(num_keys=1, is_exact_rows=True)
COARSE = Buckets(num_keys=256, is_exact_rows=False)


def buckets_for(device: torch.device) -> Buckets:
    """A CPU gains nothing from equal shapes and would compute the padding."""
    return COARSE if device.type == "cuda" else EXACT


@dataclass(frozen=True, kw_only=True)
class RunningRow:
    """What Python knows of a row. `prefill_tokens`, those of its whole prompt, decide its NTK alpha."""

    prefill_tokens: int
    own_tokens: int  # in its slot
    prefix: Prefix | None = None

    @property
    def num_cached(self) -> int:
        return self.own_tokens + (self.prefix.length if self.prefix else 0)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """All that decides which kernels run, and on how much memory."""

    num_rows: int
    num_keys: int
    is_full: bool  # every row sees every key: no mask
    longest: int  # bound of all positions, as far as LogN asks
    groups: tuple[PrefixGroup, ...] = ()  # prefixes that are read where they lie
    pool: tuple[int, int] | None = None  # places and tokens of the pool that prefixes are read from
    is_single: bool = False  # all rows continue the one in the first place

    @property
    def key(self) -> StepShape | None:
        """What a captured step is known by; None where it reads prefixes where they lie, since those come and go."""
        return self if not self.groups else None


StepResult = tuple[Tensor, Tensor | None]


class _Side:
    """What one device holds of the running rows: numbers [*,B], prefixes, tables of positions."""

    def __init__(self, rope: Rope, lengths: Sequence[int], num_positions: int, num_slots: int) -> None:
        self.tables = RowTables(rope, lengths, num_positions)
        num_fields = 3 + len(rope.distinct_windows)
        self._data = torch.zeros(num_fields, num_slots, dtype=torch.long, device=rope.device)
        self.own_B, self.base_B, self.place_B = self._data[:3]
        self.groups: tuple[PrefixGroup, ...] = ()
        self.pool: Pool | None = None
        self.is_single = False

    def arrange(self, rows: Sequence[RunningRow], pools: PrefixPools | None = None) -> None:
        own = [row.own_tokens for row in rows]
        bases = [row.prefix.length if row.prefix else 0 for row in rows]
        offsets = self.tables.offsets([row.prefill_tokens for row in rows])
        places = self._placed(rows, pools)
        fields = torch.tensor([own, bases, places, *offsets], dtype=torch.long)
        self._data.zero_()  # rows of padding read and write the first token of their own slot, which no one else has
        self._data[:, : len(rows)].copy_(upload(fields, self._data.device))
        self.groups = tuple(self._grouped(rows)) if self.pool is None else ()

    def _placed(self, rows: Sequence[RunningRow], pools: PrefixPools | None) -> list[int]:
        """Where in a pool each row's prefix lies; 0 for all where none is used."""
        prefixes = list({id(row.prefix): row.prefix for row in rows if row.prefix is not None}.values())
        self.is_single = len(prefixes) == 1 and all(row.prefix is not None for row in rows)
        longest = max((prefix.length for prefix in prefixes), default=0)
        gathering = 0 if self.is_single else len(rows)
        self.pool = pools.pool(len(prefixes), longest, gathering) if pools is not None and prefixes else None
        if self.pool is None:
            return [0] * len(rows)
        places = {id(prefix): place for prefix, place in zip(prefixes, self.pool.take(prefixes))}
        return [places.get(id(row.prefix), 0) for row in rows]

    def pooled(self, positions_B: Tensor) -> Pooled | None:
        if self.pool is None:
            return None
        num_rows = len(positions_B)
        return Pooled(
            slots=self.pool.slots,
            is_single=self.is_single,
            place_B=self.place_B[:num_rows],
            length_B=self.base_B[:num_rows],
            positions_B=positions_B,
        )

    def _grouped(self, rows: Sequence[RunningRow]) -> Iterable[PrefixGroup]:
        members: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if row.prefix is not None:
                members.setdefault(id(row.prefix), []).append(i)
        for same in members.values():
            prefix = rows[same[0]].prefix
            assert prefix is not None
            is_all = len(same) == len(rows)  # rows of padding may look at anything
            yield PrefixGroup(prefix=prefix, rows_G=None if is_all else upload(torch.tensor(same), self._data.device))

    def positions(self, num_rows: int) -> Tensor:
        positions_B: Tensor = self.base_B[:num_rows] + self.own_B[:num_rows]
        return positions_B

    def rotations(self, positions_B: Tensor, longest: int) -> list[Rotation]:
        """Per layer."""
        offsets_WB = None if self.tables.is_single else self._data[3:, : len(positions_B)]
        return self.tables.rotations(positions_B, offsets_WB, longest)


class Decoding:
    """The running rows of `slots` and their steps; `finish` turns hidden states into what a step gives.

    `ropes`: the positions on each device of the layers. `prefill_lengths`: of every row that will ever run,
    `num_positions`: more than the last position of any of them.
    """

    def __init__(
        self,
        model: Transformer,
        ropes: Mapping[torch.device, Rope],
        slots: Slots,
        *,
        prefill_lengths: Iterable[int],
        num_positions: int,
        kernel: str,
        finish: Finish,
        buckets: Buckets = EXACT,
        is_triton: bool = False,
        graphs: StepGraphs[StepResult] | None = None,
        pools: PrefixPools | None = None,
    ) -> None:
        self.model, self.slots, self.kernel, self.finish, self.buckets = model, slots, kernel, finish, buckets
        self.graphs, self.is_triton, self.pools = graphs, is_triton, pools
        self.num_positions, self.layer_devices = num_positions, model.layer_devices
        lengths = sorted(set(prefill_lengths))
        self._sides = {device: _Side(rope, lengths, num_positions, slots.num_slots) for device, rope in ropes.items()}
        self.tokens_B = torch.zeros(slots.num_slots, dtype=torch.long, device=model.device)
        self.rows: list[RunningRow] = []
        self._own: list[int] = []

    def arrange(self, rows: Sequence[RunningRow], tokens: Sequence[int]) -> None:
        """The rows from now on, row i in slot i, and the token that each is fed next. One transfer to the device."""
        self.rows, self._own = list(rows), [row.own_tokens for row in rows]
        self.tokens_B.zero_()
        self.tokens_B[: len(rows)].copy_(upload(torch.tensor(list(tokens)), self.tokens_B.device))
        for side in self._sides.values():
            side.arrange(rows, self.pools)

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Feed each row its token; what `finish` makes of the running rows, until the next step overwrites it."""
        shape = self.shape()
        compute = partial(self._compute, shape)
        result, tokens = compute() if self.graphs is None else self.graphs.run(shape.key, compute)
        self._own = [own + 1 for own in self._own]
        return result[: len(self.rows)], None if tokens is None else tokens[: len(self.rows)]

    def feed(self, tokens_B: Tensor) -> None:
        """The tokens of the next step; a negative one, in place of a token, feeds token 0 to a row that has ended."""
        self.tokens_B[: len(tokens_B)].copy_(tokens_B.clamp(min=0))

    def shape(self) -> StepShape:
        """Of the next step."""
        num_rows = min(self.buckets.rows(len(self.rows)), self.slots.num_slots)
        needed = max(self._own) + 1
        num_keys = min(self.buckets.keys(needed), self.slots.capacity)
        is_full = num_keys == min(self._own) + 1 and num_rows == len(self.rows)
        grown = [row.num_cached + own - row.own_tokens for row, own in zip(self.rows, self._own)]
        train_length = self.model.config.train_length
        longest = self.num_positions if max(grown) + 1 > train_length else min(train_length, self.num_positions)
        side = self._sides[self.layer_devices[0]]
        pool = None if side.pool is None else (side.pool.slots.num_slots, side.pool.slots.capacity)
        return StepShape(
            num_rows=num_rows,
            num_keys=num_keys,
            is_full=is_full,
            longest=longest,
            groups=side.groups,
            pool=pool,
            is_single=pool is not None and side.is_single,
        )

    def _compute(self, shape: StepShape) -> StepResult:
        attends, turns = {}, {}
        for device, side in self._sides.items():
            positions_B = side.positions(shape.num_rows)
            attends[device] = DecodeAttend(
                self.slots,
                side.own_B[: shape.num_rows],
                positions_B,
                shape.num_keys,
                is_full=shape.is_full,
                groups=side.groups,
                pooled=side.pooled(positions_B),
                kernel=self.kernel,
                is_triton=self.is_triton,
            )
            turns[device] = side.rotations(positions_B, shape.longest)
        rotations = [turns[device][layer] for layer, device in enumerate(self.layer_devices)]
        attend = by_layer(attends, self.layer_devices)
        hidden_BE = self.model(self.tokens_B[: shape.num_rows], rotations, attend)
        for side in self._sides.values():
            side.own_B[: shape.num_rows] += 1
        result, next_B = self.finish(hidden_BE)
        if next_B is not None:
            self.feed(next_B)
        return result, next_B
