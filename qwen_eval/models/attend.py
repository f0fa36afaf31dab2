"""The two `Attend`s of `transformer.py`: packed sequences after their prefixes, and one token for each running slot.

Lengths are known to Python and lie on the device too, so nothing here reads a tensor back or indexes with a mask.
"""

# N packed tokens, B sequences, T their longest length, K key-value heads, H query heads, D head channels, S keys

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from qwen_eval.models.attention import merge, partial
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.heads import Heads
from qwen_eval.models.kv_cache import KvCodec, Prefix, Slots, Stored
from qwen_eval.models.prefix_pool import Pooled
from qwen_eval.models.transfer import upload


@dataclass(frozen=True, kw_only=True)
class PrefixRun:
    """Consecutive packed sequences that continue one prefix, as slices of the sequences and of the packed tokens."""

    prefix: Prefix | None
    sequences: slice
    tokens: slice


def prefix_runs(prefixes: Sequence[Prefix | None], lengths: Sequence[int]) -> Iterator[PrefixRun]:
    sequence, token = 0, 0
    for _, members in groupby(prefixes, key=id):
        same = list(members)
        num_tokens = sum(lengths[sequence : sequence + len(same)])
        yield PrefixRun(
            prefix=same[0],
            sequences=slice(sequence, sequence + len(same)),
            tokens=slice(token, token + num_tokens),
        )
        sequence, token = sequence + len(same), token + num_tokens


class PackedAttend:
    """Attention of several new sequences, packed one behind another; each continues a prefix of its own, or nothing.

    `sinks` (a prefix for each sequence) or `sink_slots` = (slots, row of each sequence) keeps the new keys and values.
    `last_B`: the last token of each sequence; in the last layer queries may be these only.
    """

    def __init__(
        self,
        config: ModelConfig,
        codec: KvCodec,
        lengths: Sequence[int],
        *,
        kernel: str,
        device: torch.device,
        prefixes: Sequence[Prefix | None] = (),
        sinks: Sequence[Prefix] = (),
        sink_slots: tuple[Slots, Sequence[int]] | None = None,
    ) -> None:
        self.config, self.codec, self.kernel, self.lengths = config, codec, kernel, list(lengths)
        self.sinks, self.slots = sinks, sink_slots[0] if sink_slots else None
        prefixes = prefixes or [None] * len(lengths)
        self.runs = list(prefix_runs(prefixes, self.lengths))
        bases = [prefix.length if prefix is not None else 0 for prefix in prefixes]
        self.longest = max(self.lengths)
        self.end = max(base + length for base, length in zip(bases, self.lengths))  # of all positions
        lengths_B, steps_T = torch.tensor(self.lengths), torch.arange(self.longest)
        offsets_B = lengths_B.cumsum(0) - lengths_B
        own_N = torch.arange(sum(self.lengths)) - offsets_B.repeat_interleave(lengths_B)
        self.positions_N = upload(own_N + torch.tensor(bases).repeat_interleave(lengths_B), device)
        self.last_B = upload(offsets_B + lengths_B - 1, device)
        self.lengths_B = upload(lengths_B, device)
        self.steps_T = upload(steps_T, device)
        if len(lengths) > 1:
            self.pad_BT = upload(offsets_B[:, None] + torch.minimum(steps_T, lengths_B[:, None] - 1), device)
            starts_B = torch.arange(len(lengths)) * self.longest
            self.unpad_N = upload(own_N + starts_B.repeat_interleave(lengths_B), device)
        if sink_slots is not None:
            rows_N = torch.tensor(list(sink_slots[1])).repeat_interleave(lengths_B)
            self.slot_rows_N, self.slot_positions_N = upload(rows_N, device), upload(own_N, device)

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        q_NHD, k_NKD, v_NKD = heads.turned()
        # read before the sinks grow: they may be the prefixes
        pasts = [None if run.prefix is None else run.prefix.read(layer) for run in self.runs]
        k_NKD, v_NKD = self._keep(layer, k_NKD, v_NKD)
        if len(q_NHD) == 0:
            return q_NHD
        is_last_only = len(q_NHD) != len(k_NKD)
        own = self._own_last(layer, q_NHD, k_NKD, v_NKD) if is_last_only else self._own(layer, q_NHD, k_NKD, v_NKD)
        positions = self.positions_N[self.last_B] if is_last_only else self.positions_N
        parts = []
        for run, past in zip(self.runs, pasts):
            rows = run.sequences if is_last_only else run.tokens
            part = own[0][rows], own[1][rows]
            if past is None:
                parts.append(part[0])
                continue
            seen = attend_past(q_NHD[rows], past, positions[rows], self.config.window(layer), self.kernel)
            parts.append(merge(seen, part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _keep(self, layer: int, k_NKD: Tensor, v_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens; what is attended to is what was stored (after quantization)."""
        if self.codec.is_exact and not self.sinks and self.slots is None:
            return k_NKD, v_NKD
        k, v = self._encode(k_NKD), self._encode(v_NKD)
        if self.slots is not None:
            self.slots.write(layer, self.slot_rows_N, self.slot_positions_N, k, v)
        for sink, part in zip(self.sinks, token_slices(self.lengths)):
            sink.append(layer, tuple(t[:, :, part] for t in k), tuple(t[:, :, part] for t in v))
        if self.codec.is_exact:
            return k_NKD, v_NKD
        return self._decode(k, k_NKD.dtype), self._decode(v, v_NKD.dtype)

    def _encode(self, x_NKD: Tensor) -> Stored:
        """[1,K,N,*]; a codec with one scale a call sees one sequence at a time."""
        x_1KND = x_NKD.transpose(0, 1).unsqueeze(0)
        if not self.codec.is_chunked or len(self.lengths) == 1:
            return self.codec.encode(x_1KND)
        parts = [self.codec.encode(part) for part in torch.split(x_1KND, self.lengths, dim=2)]
        return tuple(torch.cat(same, dim=2) for same in zip(*parts))

    def _decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(stored, dtype)[0].transpose(0, 1)

    def _pad(self, x_NHD: Tensor) -> Tensor:
        x_BTHD = x_NHD.unsqueeze(0) if len(self.lengths) == 1 else x_NHD[self.pad_BT]
        return x_BTHD.transpose(1, 2)

    def _unpad(self, x_BHTx: Tensor) -> Tensor:
        x_BTHx = x_BHTx.transpose(1, 2)
        return x_BTHx[0] if len(self.lengths) == 1 else x_BTHx.flatten(0, 1)[self.unpad_N]

    def _own(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each sequence over itself: padding on the right is never seen by a causal query."""
        window = self.config.window(layer)
        mask = None if window is None or window >= self.longest else band(self.longest, window, q.device)
        out, lse = partial(self._pad(q), self._pad(k), self._pad(v), causal=mask is None, mask=mask, kernel=self.kernel)
        return self._unpad(out), self._unpad(lse)

    def _own_last(self, layer: int, q_BHD: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        visible_BT = self.steps_T < self.lengths_B[:, None]
        window = self.config.window(layer)
        if window is not None:
            visible_BT = visible_BT & (self.steps_T >= self.lengths_B[:, None] - window)
        mask = visible_BT[:, None, None, :]
        out, lse = partial(q_BHD.unsqueeze(2), self._pad(k), self._pad(v), mask=mask, kernel=self.kernel)
        return out.squeeze(2), lse.squeeze(2)


class LayerAttend:
    """The `Attend` of a model on several devices: for each layer that of its device."""

    def __init__(self, by_layer: Sequence[PackedAttend | DecodeAttend]) -> None:
        self.by_layer = by_layer

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        return self.by_layer[layer](layer, heads)


def by_layer(
    attends: Mapping[torch.device, PackedAttend] | Mapping[torch.device, DecodeAttend],
    layer_devices: Sequence[torch.device],
) -> LayerAttend | PackedAttend | DecodeAttend:
    """One `Attend` out of one for each device."""
    by_device = [attends[device] for device in layer_devices]
    return by_device[0] if len(attends) == 1 else LayerAttend(by_device)


def token_slices(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


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


@dataclass(frozen=True, kw_only=True)
class PrefixGroup:
    """Rows of a running batch that continue one prefix; `rows_G` None when all of them do."""

    prefix: Prefix
    rows_G: Tensor | None

    def of(self, x_B: Tensor) -> Tensor:
        return x_B if self.rows_G is None else x_B[self.rows_G]


class DecodeAttend:
    """Attention of one new token in each of the first B rows of `slots`.

    `own_B`: tokens already in each slot; `num_keys`: how many are looked at, more than the longest has. `is_full`: all
    rows see all of them, so that no mask is needed. Prefixes: `groups`, each read where it lies, or `pooled`.
    """

    def __init__(
        self,
        slots: Slots,
        own_B: Tensor,
        positions_B: Tensor,
        num_keys: int,
        *,
        is_full: bool = False,
        groups: Sequence[PrefixGroup] = (),
        pooled: Pooled | None = None,
        kernel: str,
        is_triton: bool = False,
    ) -> None:
        self.slots, self.kernel, self.groups, self.is_triton = slots, kernel, groups, is_triton
        self.pooled = pooled
        self.own_B, self.positions_B, self.num_keys, self.is_full = own_B, positions_B, num_keys, is_full
        self.rows_B = torch.arange(len(own_B), device=own_B.device)
        self._masks: dict[int | None, Tensor | None] = {}
        self._spans: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._prefix_masks: dict[int | None, Tensor] = {}
        self._prefix_spans: dict[int | None, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        window = self.slots.config.window(layer)
        if self.is_triton:
            q_BHD, out, lse = self._in_kernels(layer, heads, window)
        else:
            q_BHD, k_BKD, v_BKD = heads.turned()
            self.slots.write(layer, self.rows_B, self.own_B, self._encoded(k_BKD), self._encoded(v_BKD))
            out, lse = self._own(layer, q_BHD, window)
            if self.pooled is not None:
                out = merge(self._pooled(layer, q_BHD, window, self.pooled), (out, lse))
        for group in self.groups:
            past = group.prefix.read(layer)
            if past is None:
                continue
            seen = attend_past(group.of(q_BHD), past, group.of(self.positions_B), window, self.kernel)
            joined = merge(seen, (group.of(out), group.of(lse)))
            if group.rows_G is None:
                out = joined
            else:
                out[group.rows_G] = joined
        return out

    def _encoded(self, x_BKD: Tensor) -> Stored:
        """[1,K,B,*]; every row is a call of its own to a codec that has one scale a call."""
        return tuple(t.transpose(0, 2) for t in self.slots.codec.encode(x_BKD.unsqueeze(2)))

    def _in_kernels(self, layer: int, heads: Heads, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries [B,H,D]; outputs and log-sum-exp over the row's own keys and those of its pooled prefix."""
        from qwen_eval.models.gpu.attention import Keys, attend
        from qwen_eval.models.gpu.block import turn_and_keep

        slots = self.slots
        k, v = slots.ready(layer, heads.num_keys, heads.qkv_NHD)
        if slots.codec.is_chunked:
            q_BHD, k_BKD, v_BKD = heads.turned()
            slots.write(layer, self.rows_B, self.own_B, self._encoded(k_BKD), self._encoded(v_BKD))
        else:
            turns = heads.rotation
            q_BHD = turn_and_keep(heads.qkv_NHD, turns.cos, turns.sin, turns.logn, heads.norms, self.own_B, k, v)
        first_B, end_B = self._own_span(window)
        sources = [Keys(k=k, v=v, place_B=self.rows_B, first_B=first_B, end_B=end_B, num_keys=self.num_keys)]
        if self.pooled is not None:
            pool, (first_B, end_B) = self.pooled.slots, self._prefix_span(window, self.pooled)
            k, v = pool.stored(layer, pool.num_slots, pool.capacity)
            sources.append(
                Keys(
                    k=k,
                    v=v,
                    place_B=self.pooled.place_B,
                    first_B=first_B,
                    end_B=end_B,
                    num_keys=pool.capacity,
                    is_shared=self.pooled.is_single,
                )
            )
        return q_BHD, *attend(q_BHD, sources)

    def _own(self, layer: int, q_BHD: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        keys, values = self.slots.read(layer, len(q_BHD), self.num_keys)
        out, lse = partial(q_BHD.unsqueeze(2), keys, values, mask=self._mask(window), kernel=self.kernel)
        return out.squeeze(2), lse.squeeze(2)

    def _own_span(self, window: int | None) -> tuple[Tensor, Tensor]:
        """[B] first and end of the keys that each row sees in its slot; the same for every layer of one window."""
        if window not in self._spans:
            end_B = self.own_B + 1
            first_B = torch.zeros_like(end_B) if window is None else (end_B - window).clamp(min=0)
            self._spans[window] = first_B, end_B
        return self._spans[window]

    def _prefix_span(self, window: int | None, pooled: Pooled) -> tuple[Tensor, Tensor]:
        """[B] first and end of the keys that each row sees in its prefix."""
        if window not in self._prefix_spans:
            self._prefix_spans[window] = pooled.span(window)
        return self._prefix_spans[window]

    def _pooled(self, layer: int, q_BHD: Tensor, window: int | None, pooled: Pooled) -> tuple[Tensor, Tensor]:
        """Outputs [B,H,D] and log-sum-exp [B,H] over the row's prefix: 0 and -inf where it has none."""
        slots, size = pooled.slots, pooled.slots.capacity
        if window not in self._prefix_masks:
            self._prefix_masks[window] = pooled.mask(window)
        mask_BS = self._prefix_masks[window]
        if pooled.is_single:  # one dense product of all rows
            k, v = slots.read(layer, 1, size)
            out, lse = partial(q_BHD.transpose(0, 1).unsqueeze(0), k, v, mask=mask_BS[None, None], kernel=self.kernel)
            return out[0].transpose(0, 1), lse[0].transpose(0, 1)
        stored = slots.stored(layer, slots.num_slots, size)
        k, v = (slots.codec.decode(tuple(t[pooled.place_B] for t in part), slots.dtype) for part in stored)
        out, lse = partial(q_BHD.unsqueeze(2), k, v, mask=mask_BS[:, None, None, :], kernel=self.kernel)
        return out.squeeze(2), lse.squeeze(2)

    def _mask(self, window: int | None) -> Tensor | None:
        """[B,1,1,S]; the same for every layer of one window."""
        if window is not None and window >= self.num_keys:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        if window is None and self.is_full:
            return None
        steps_S = torch.arange(self.num_keys, device=self.own_B.device)
        visible_BS = steps_S <= self.own_B[:, None]
        if window is not None:
            visible_BS &= steps_S > self.own_B[:, None] - window
        return visible_BS[:, None, None, :]
