"""Keys and values: how they are stored (codec), where (a prefix, a slot of a batch), how they are attended to.

A `Prefix` is the cache of one token sequence that others continue; windowed layers keep only what later tokens can
see. `Slots` is the static buffer of a running batch. `PackedAttend` and `DecodeAttend` are the two `Attend`s of
`transformer.py`: several sequences at once after one prefix, and one token for each of several slots.
"""

# N packed tokens, B sequences, T their longest length, K key-value heads, H query heads, D head channels, S keys

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen_eval.models.attention import merge, partial
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.kv_quant import dequantize, quantize_per_token, quantize_upstream

Stored = tuple[Tensor, ...]  # tensors [B,K,S,*] that one codec understands


class KvCodec(Protocol):
    """How keys and values are kept. `is_chunked`: one scale for all tokens of a call, so prefixes cannot be shared."""

    name: str
    is_chunked: bool

    def encode(self, x_BKSD: Tensor) -> Stored: ...

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor: ...


class PlainCodec:
    """The model's dtype, as it is."""

    is_chunked = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = str(dtype).removeprefix("torch.")

    def encode(self, x_BKSD: Tensor) -> Stored:
        return (x_BKSD,)

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return stored[0]


class Int8Codec:
    """Eight bits, asymmetric. Robust: a scale per token and head, rounded. Upstream: one a call and head, truncated."""

    def __init__(self, *, upstream: bool) -> None:
        self.is_chunked = upstream
        self.name = "int8 (upstream: scale per call, truncated)" if upstream else "int8 (scale per token, rounded)"
        self._quantize = quantize_upstream if upstream else quantize_per_token

    def encode(self, x_BKSD: Tensor) -> Stored:
        return self._quantize(x_BKSD)

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return dequantize(*stored).to(dtype)


def stored_bytes(stored: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in stored)


@dataclass(frozen=True, kw_only=True)
class LayerKv:
    """Keys and values of one layer; the first of them stands at position `start`."""

    k: Stored
    v: Stored
    start: int


class Prefix:
    """The cache of one sequence of `length` tokens, immutable to its readers; `ModelRunner.extend` makes it longer.

    A layer without a window lies in buffers that `reserve` sized: tokens are added in place, behind what readers see.
    """

    def __init__(self, config: ModelConfig, codec: KvCodec, dtype: torch.dtype) -> None:
        self.config, self.codec, self.dtype = config, codec, dtype
        self.length = 0
        self._reserved = 0
        self._layers: list[LayerKv | None] = [None] * config.num_layers
        unlimited = (layer for layer in range(config.num_layers) if config.window(layer) is None)
        self._row = {layer: row for row, layer in enumerate(unlimited)}
        self._buffers: Stored = ()  # of this prefix alone
        self._room = 0  # tokens that fit in them

    def fork(self) -> Prefix:
        """A prefix that starts with this one's tokens and can be grown by itself (the tokens are shared until then)."""
        twin = Prefix(self.config, self.codec, self.dtype)
        twin.length, twin._layers = self.length, list(self._layers)
        return twin

    def reserve(self, num_tokens: int) -> None:
        """Let the next `append` find room for `num_tokens` in all: one allocation instead of one a chunk."""
        self._reserved = num_tokens

    def read(self, layer: int) -> tuple[Tensor, Tensor, int] | None:
        """Keys and values [1,K,S,D] in the compute dtype and the position of the first; None while empty."""
        kept = self._layers[layer]
        if kept is None:
            return None
        return self.codec.decode(kept.k, self.dtype), self.codec.decode(kept.v, self.dtype), kept.start

    def append(self, layer: int, k: Stored, v: Stored) -> None:
        """Add tokens to one layer; `advance` once all layers have them. A window forgets what no later token sees."""
        if layer in self._row:
            self._layers[layer] = self._write_behind(layer, k, v)
        else:
            self._layers[layer] = self._roll(layer, k, v)

    def _write_behind(self, layer: int, k: Stored, v: Stored) -> LayerKv:
        end = self.length + k[0].shape[2]
        if self._room < end:
            self._make_room(k, max(end, self._reserved))
        buffers = tuple(whole[self._row[layer]] for whole in self._buffers)
        for buffer, part in zip(buffers, (*k, *v)):
            buffer[:, :, self.length : end] = part
        seen = tuple(buffer[:, :, :end] for buffer in buffers)
        return LayerKv(k=seen[: len(k)], v=seen[len(k) :], start=0)

    def _make_room(self, like: Stored, num_tokens: int) -> None:
        """New buffers [L,1,K,num_tokens,*] of the layers without a window, holding their tokens so far.

        One block, not one a layer: blocks that stay among those that come and go tear the C heap apart.
        """
        self._buffers = tuple(
            torch.empty((len(self._row), *t.shape[:2], num_tokens, t.shape[3]), dtype=t.dtype, device=t.device)
            for t in (*like, *like)
        )
        self._room = num_tokens
        for layer, row in self._row.items():
            kept = self._layers[layer]
            if kept is not None:
                for whole, old in zip(self._buffers, (*kept.k, *kept.v)):
                    whole[row, :, :, : self.length] = old

    def _roll(self, layer: int, k: Stored, v: Stored) -> LayerKv:
        kept, window = self._layers[layer], self.config.window(layer)
        assert window is not None
        start = self.length if kept is None else kept.start
        if kept is not None:
            k = tuple(torch.cat(pair, dim=2) for pair in zip(kept.k, k))
            v = tuple(torch.cat(pair, dim=2) for pair in zip(kept.v, v))
        excess = k[0].shape[2] - (window - 1)
        if excess > 0:
            k = tuple(t[:, :, excess:].clone() for t in k)
            v = tuple(t[:, :, excess:].clone() for t in v)
            start += excess
        return LayerKv(k=k, v=v, start=start)

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens

    @property
    def num_bytes(self) -> int:
        return sum(stored_bytes(kept.k) + stored_bytes(kept.v) for kept in self._layers if kept is not None)


class Slots:
    """Static key-value buffers of a batch: `capacity` tokens in each of `num_slots` rows, one set a layer."""

    def __init__(self, config: ModelConfig, codec: KvCodec, dtype: torch.dtype, num_slots: int, capacity: int) -> None:
        self.config, self.codec, self.dtype = config, codec, dtype
        self.num_slots, self.capacity = num_slots, capacity
        self._layers: list[tuple[Stored, Stored] | None] = [None] * config.num_layers

    def _buffers(self, layer: int, k: Stored, v: Stored) -> tuple[Stored, Stored]:
        held = self._layers[layer]
        if held is None:
            held = self._layers[layer] = (self._allocate(k), self._allocate(v))
        return held

    def _allocate(self, like: Stored) -> Stored:
        # zeros, not empty: a masked key still multiplies its value, and 0 * NaN is NaN
        return tuple(
            torch.zeros((self.num_slots, t.shape[1], self.capacity, t.shape[3]), dtype=t.dtype, device=t.device)
            for t in like
        )

    def write_prompt(self, layer: int, slot: int, k: Stored, v: Stored) -> None:
        """Put [1,K,T,*] at the beginning of a slot."""
        for buffers, parts in zip(self._buffers(layer, k, v), (k, v)):
            for buffer, part in zip(buffers, parts):
                buffer[slot, :, : part.shape[2]] = part[0]

    def write_step(self, layer: int, rows: Tensor, positions: Tensor, k: Stored, v: Stored) -> None:
        """Put one token [B,K,1,*] of each of the slots `rows` at `positions`."""
        for buffers, parts in zip(self._buffers(layer, k, v), (k, v)):
            for buffer, part in zip(buffers, parts):
                buffer[rows, :, positions] = part[:, :, 0]

    def read(self, layer: int, num_rows: int, num_keys: int) -> tuple[Tensor, Tensor]:
        held = self._layers[layer]
        assert held is not None, "read before the first write"
        k, v = (tuple(t[:num_rows, :, :num_keys] for t in part) for part in held)
        return self.codec.decode(k, self.dtype), self.codec.decode(v, self.dtype)

    @torch.inference_mode()
    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of a slot over another, to keep the running slots in front."""
        for held in self._layers:
            if held is not None:
                for buffer in (*held[0], *held[1]):
                    buffer[target, :, :num_tokens] = buffer[source, :, :num_tokens]

    @property
    def num_bytes(self) -> int:
        return sum(stored_bytes(held[0]) + stored_bytes(held[1]) for held in self._layers if held is not None)


class PackedAttend:
    """Attention of several new sequences, packed one behind another, that all continue `prefix` (or nothing).

    `sink_prefix` (one sequence) or `sink_slots` = (slots, row of each sequence) keeps the new keys and values.
    `last_only`: in the last layer each sequence asks for its last token only.
    """

    def __init__(
        self,
        config: ModelConfig,
        codec: KvCodec,
        lengths: Sequence[int],
        *,
        kernel: str,
        device: torch.device,
        prefix: Prefix | None = None,
        sink_prefix: Prefix | None = None,
        sink_slots: tuple[Slots, Sequence[int]] | None = None,
    ) -> None:
        assert sink_prefix is None or len(lengths) == 1, "a prefix grows by one sequence"
        self.config, self.codec, self.kernel, self.lengths = config, codec, kernel, list(lengths)
        self.prefix, self.sink_prefix, self.sink_slots = prefix, sink_prefix, sink_slots
        self.base = prefix.length if prefix is not None else 0
        self.longest = max(self.lengths)
        lengths_B = torch.tensor(self.lengths, device=device)
        steps_T = torch.arange(self.longest, device=device)
        self.valid_BT = steps_T < lengths_B[:, None]
        offsets_B = lengths_B.cumsum(0) - lengths_B
        self.pad_BT = offsets_B[:, None] + torch.minimum(steps_T, lengths_B[:, None] - 1)
        self.own_position_N = steps_T.expand(len(self.lengths), -1)[self.valid_BT]
        self.last_B = offsets_B + lengths_B - 1

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        past = None if self.prefix is None else self.prefix.read(layer)  # before the sink grows: it may be the prefix
        k_NKD, v_NKD = self._keep(layer, k_NKD, v_NKD)
        if len(q_NHD) == 0:
            return q_NHD
        is_last_only = len(q_NHD) != len(k_NKD)
        own = self._own_last(layer, q_NHD, k_NKD, v_NKD) if is_last_only else self._own(layer, q_NHD, k_NKD, v_NKD)
        if past is None:
            return own[0]
        positions = self.base + (self.own_position_N[self.last_B] if is_last_only else self.own_position_N)
        return merge(attend_past(q_NHD, past, positions, self.config.window(layer), self.kernel), own)

    def _keep(self, layer: int, k_NKD: Tensor, v_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens; what is attended to is what was stored (after quantisation)."""
        is_plain = isinstance(self.codec, PlainCodec)
        if is_plain and self.sink_prefix is None and self.sink_slots is None:
            return k_NKD, v_NKD
        kept = [
            self._keep_one(layer, i, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0))
            for i, (k, v) in enumerate(zip(torch.split(k_NKD, self.lengths), torch.split(v_NKD, self.lengths)))
        ]
        if is_plain:
            return k_NKD, v_NKD
        decoded = [[self.codec.decode(x, k_NKD.dtype)[0].transpose(0, 1) for x in pair] for pair in kept]
        return torch.cat([k for k, _ in decoded]), torch.cat([v for _, v in decoded])

    def _keep_one(self, layer: int, i: int, k_1KTD: Tensor, v_1KTD: Tensor) -> tuple[Stored, Stored]:
        k, v = self.codec.encode(k_1KTD), self.codec.encode(v_1KTD)
        if self.sink_slots is not None:
            self.sink_slots[0].write_prompt(layer, self.sink_slots[1][i], k, v)
        if self.sink_prefix is not None:
            self.sink_prefix.append(layer, k, v)
        return k, v

    def _pad(self, x_NHD: Tensor) -> Tensor:
        if len(self.lengths) == 1:
            return x_NHD.unsqueeze(0).transpose(1, 2)
        return x_NHD[self.pad_BT].transpose(1, 2)

    def _own(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each sequence over itself: padding on the right is never seen by a causal query."""
        window = self.config.window(layer)
        mask = None if window is None or window >= self.longest else band(self.longest, window, q.device)
        out, lse = partial(self._pad(q), self._pad(k), self._pad(v), causal=mask is None, mask=mask, kernel=self.kernel)
        return out.transpose(1, 2)[self.valid_BT], lse.transpose(1, 2)[self.valid_BT]

    def _own_last(self, layer: int, q_BHD: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        visible_BT = self.valid_BT
        window = self.config.window(layer)
        if window is not None:
            lengths_B = visible_BT.sum(1, keepdim=True)
            visible_BT = visible_BT & (torch.arange(self.longest, device=q_BHD.device) >= lengths_B - window)
        mask = visible_BT[:, None, None, :]
        out, lse = partial(q_BHD.unsqueeze(2), self._pad(k), self._pad(v), mask=mask, kernel=self.kernel)
        return out.squeeze(2), lse.squeeze(2)


def band(length: int, window: int, device: torch.device) -> Tensor:
    """[1,1,T,T] bool: causal, and no further back than `window` tokens (the token itself included)."""
    steps = torch.arange(length, device=device)
    distance = steps[:, None] - steps[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def attend_past(
    q_NHD: Tensor, past: tuple[Tensor, Tensor, int], positions_N: Tensor, window: int | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """All packed queries over one shared past: outputs [N,H,D], log-sum-exp [N,H]."""
    k, v, start = past
    mask = None
    if window is not None:
        key_positions = start + torch.arange(k.shape[2], device=k.device)
        mask = (key_positions > positions_N[:, None] - window)[None, None]
    out, lse = partial(q_NHD.transpose(0, 1).unsqueeze(0), k, v, mask=mask, kernel=kernel)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


class DecodeAttend:
    """Attention of one new token in each of the first rows of `slots`.

    `own_lengths` [B]: tokens already in each slot. `groups`: (prefix, row indices) for rows that continue a prefix.
    """

    def __init__(
        self,
        slots: Slots,
        own_lengths: Tensor,
        groups: Sequence[tuple[Prefix, Tensor]],
        base_lengths: Tensor,
        *,
        kernel: str,
    ) -> None:
        self.slots, self.kernel, self.groups = slots, kernel, groups
        self.own_lengths = own_lengths
        self.positions = base_lengths + own_lengths
        self.num_keys = int(own_lengths.max()) + 1
        self.rows = torch.arange(len(own_lengths), device=own_lengths.device)
        steps = torch.arange(self.num_keys, device=own_lengths.device)
        self.visible = steps <= own_lengths[:, None]
        self.all_visible = bool(self.visible.all())

    def __call__(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        codec = self.slots.codec
        self.slots.write_step(
            layer, self.rows, self.own_lengths, codec.encode(k_BKD.unsqueeze(2)), codec.encode(v_BKD.unsqueeze(2))
        )
        k, v = self.slots.read(layer, len(q_BHD), self.num_keys)
        out, lse = partial(q_BHD.unsqueeze(2), k, v, mask=self._mask(layer), kernel=self.kernel)
        out, lse = out.squeeze(2), lse.squeeze(2)
        for prefix, rows in self.groups:
            past = prefix.read(layer)
            if past is not None:
                window = self.slots.config.window(layer)
                seen = attend_past(q_BHD[rows], past, self.positions[rows], window, self.kernel)
                out[rows] = merge(seen, (out[rows], lse[rows]))
        return out

    def _mask(self, layer: int) -> Tensor | None:
        window = self.slots.config.window(layer)
        if window is None or window >= self.num_keys:
            return None if self.all_visible else self.visible[:, None, None, :]
        steps = torch.arange(self.num_keys, device=self.visible.device)
        return (self.visible & (steps > self.own_lengths[:, None] - window))[:, None, None, :]
