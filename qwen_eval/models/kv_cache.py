"""Keys and values: how they are stored (codec) and where (a prefix, a slot of a batch).

A `Prefix` is the cache of one token sequence that others continue; windowed layers keep only what later tokens can
see. `Slots` is the static buffer of a running batch. `attend.py` attends to both.
"""

# N packed tokens, B sequences, K key-value heads, D head channels, S keys

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen_eval.models.config import ModelConfig
from qwen_eval.models.fused import quantize
from qwen_eval.models.kv_quant import dequantize, quantize_upstream

Stored = tuple[Tensor, ...]  # tensors [B,K,S,*] that one codec understands


class KvCodec(Protocol):
    """How keys and values are kept. `is_chunked`: one scale for all tokens of a call, so prefixes cannot be shared.

    `is_exact`: what is read is what was written.
    """

    name: str
    is_chunked: bool
    is_exact: bool

    def encode(self, x_BKSD: Tensor) -> Stored: ...

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor: ...


class PlainCodec:
    """The model's dtype, as it is."""

    is_chunked = False
    is_exact = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = str(dtype).removeprefix("torch.")

    def encode(self, x_BKSD: Tensor) -> Stored:
        return (x_BKSD,)

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return stored[0]


class Int8Codec:
    """Eight bits, asymmetric. Robust: a scale per token and head, rounded. Upstream: one a call and head, truncated."""

    is_exact = False

    def __init__(self, *, upstream: bool) -> None:
        self.is_chunked = upstream
        self.name = "int8 (upstream: scale per call, truncated)" if upstream else "int8 (scale per token, rounded)"
        self._quantize = quantize_upstream if upstream else quantize

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


@dataclass(kw_only=True)
class _Block:
    """Buffers of several layers, of one prefix alone: blocks of one layer that stay among those that come and go tear
    the C heap apart.
    """

    row: dict[int, int]  # by layer
    buffers: Stored = ()
    room: int = 0  # tokens that fit in them


class Prefix:
    """The cache of one sequence of `length` tokens, immutable to its readers; `ModelRunner.extend` makes it longer.

    A layer without a window lies in buffers that `reserve` sized: tokens are added in place, behind what readers see.
    `layer_devices`: where each layer lies, if they lie on several devices; each device has buffers of its own.
    """

    def __init__(
        self, config: ModelConfig, codec: KvCodec, dtype: torch.dtype, layer_devices: Sequence[torch.device] = ()
    ) -> None:
        self.config, self.codec, self.dtype, self.layer_devices = config, codec, dtype, layer_devices
        self.length = 0
        self._reserved = 0
        self._layers: list[LayerKv | None] = [None] * config.num_layers
        self._blocks: dict[int, _Block] = {}  # of the layers without a window, one for all layers of a device
        unlimited = [layer for layer in range(config.num_layers) if config.window(layer) is None]
        for device in dict.fromkeys(layer_devices or (None,)):
            same = [layer for layer in unlimited if not layer_devices or layer_devices[layer] == device]
            block = _Block(row={layer: row for row, layer in enumerate(same)})
            self._blocks |= dict.fromkeys(same, block)

    def fork(self) -> Prefix:
        """A prefix that starts with this one's tokens and can be grown by itself (the tokens are shared until then)."""
        twin = Prefix(self.config, self.codec, self.dtype, self.layer_devices)
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

    def stored(self, layer: int) -> tuple[Stored, Stored] | None:
        """As the codec keeps them; None while empty."""
        kept = self._layers[layer]
        return None if kept is None else (kept.k, kept.v)

    def append(self, layer: int, k: Stored, v: Stored) -> None:
        """Add tokens to one layer; `advance` once all layers have them. A window forgets what no later token sees."""
        if layer in self._blocks:
            self._layers[layer] = self._write_behind(layer, k, v)
        else:
            self._layers[layer] = self._roll(layer, k, v)

    def _write_behind(self, layer: int, k: Stored, v: Stored) -> LayerKv:
        end, block = self.length + k[0].shape[2], self._blocks[layer]
        if block.room < end:
            self._make_room(block, k, max(end, self._reserved))
        buffers = tuple(whole[block.row[layer]] for whole in block.buffers)
        for buffer, part in zip(buffers, (*k, *v)):
            buffer[:, :, self.length : end] = part
        seen = tuple(buffer[:, :, :end] for buffer in buffers)
        return LayerKv(k=seen[: len(k)], v=seen[len(k) :], start=0)

    def _make_room(self, block: _Block, like: Stored, num_tokens: int) -> None:
        """New buffers [L,1,K,num_tokens,*] of the layers of a block, holding their tokens so far."""
        block.buffers = tuple(
            torch.empty((len(block.row), *t.shape[:2], num_tokens, t.shape[3]), dtype=t.dtype, device=t.device)
            for t in (*like, *like)
        )
        block.room = num_tokens
        for layer, row in block.row.items():
            kept = self._layers[layer]
            if kept is not None:
                for whole, old in zip(block.buffers, (*kept.k, *kept.v)):
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

    def ready(self, layer: int, num_heads: int, like: Tensor) -> tuple[Stored, Stored]:
        """A layer's whole buffers, made if there are none yet, for K heads as wide as the last dimension of `like`."""
        if self._layers[layer] is None:
            empty = self.codec.encode(like.new_zeros(1, num_heads, 1, like.shape[-1]))
            self._buffers(layer, empty, empty)
        return self.stored(layer, self.num_slots, self.capacity)

    def write(self, layer: int, rows_N: Tensor, positions_N: Tensor, k: Stored, v: Stored) -> None:
        """Put tokens [1,K,N,*] into the slots `rows_N` at `positions_N`."""
        for buffers, parts in zip(self._buffers(layer, k, v), (k, v)):
            for buffer, part in zip(buffers, parts):
                buffer[rows_N, :, positions_N] = part[0].transpose(0, 1)

    @torch.inference_mode()
    def put(self, row: int, prefix: Prefix) -> None:
        """Copy what each layer of a prefix keeps to the beginning of a slot."""
        for layer in range(self.config.num_layers):
            kept = prefix.stored(layer)
            if kept is not None:
                for buffers, parts in zip(self._buffers(layer, *kept), kept):
                    for buffer, part in zip(buffers, parts):
                        buffer[row, :, : part.shape[2]] = part[0]

    def stored(self, layer: int, num_rows: int, num_keys: int) -> tuple[Stored, Stored]:
        """The first keys and values of the first slots, as the codec keeps them."""
        held = self._layers[layer]
        assert held is not None, "read before the first write"
        k, v = (tuple(t[:num_rows, :, :num_keys] for t in part) for part in held)
        return k, v

    def read(self, layer: int, num_rows: int, num_keys: int) -> tuple[Tensor, Tensor]:
        k, v = self.stored(layer, num_rows, num_keys)
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
