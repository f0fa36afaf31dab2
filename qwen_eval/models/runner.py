"""Running a `Transformer` over token sequences: prefixes, packed suffixes, decode steps.

This is where positions, NTK alphas, caches and the model meet; engines schedule, this computes.
"""

# N packed tokens, B sequences, E hidden size

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from qwen_eval.models import fused
from qwen_eval.models.attend import PackedAttend, by_layer
from qwen_eval.models.attention import choose_kernel
from qwen_eval.models.cost import MAX_POOL_BYTES
from qwen_eval.models.decode import Buckets, Decoding, Finish, StepResult, buckets_for
from qwen_eval.models.graph import StepGraphs
from qwen_eval.models.kv_cache import KvCodec, PlainCodec, Prefix, Slots
from qwen_eval.models.prefix_pool import GATHERED_BYTES, PrefixPools
from qwen_eval.models.rope import Rope
from qwen_eval.models.transfer import upload
from qwen_eval.models.transformer import Residual, Transformer

NO_ROWS: list[int] = []


class ModelRunner:
    """A model with its positions, cache format and attention kernel."""

    def __init__(
        self,
        model: Transformer,
        *,
        codec: KvCodec | None = None,
        attention: str = "auto",
        prefill_chunk: int = 1024,
        decode_kernel: str | None = None,
    ) -> None:
        self.model, self.config = model, model.config
        self.codec: KvCodec = codec or PlainCodec(model.dtype)
        self.kernel = choose_kernel(attention, model.device)
        self.layer_devices = model.layer_devices
        self.ropes = {device: Rope(model.config, device) for device in dict.fromkeys(self.layer_devices)}
        self.rope = self.ropes[self.layer_devices[0]]  # all have the same alphas
        self.prefill_chunk = prefill_chunk
        self.long_chunk = prefill_chunk  # of a prompt alone, which fills a GPU only with more tokens than a CPU
        self.pool_bytes = MAX_POOL_BYTES
        self.decode_kernel = decode_kernel or choose_decode_kernel(model, self.kernel, self.codec)

    @property
    def device(self) -> torch.device:
        """Where tokens go in; `head_device` is where hidden states come out."""
        return self.model.device

    @property
    def head_device(self) -> torch.device:
        return self.model.head_device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Of the layers, in their order."""
        return tuple(self.ropes)

    @property
    def is_spread(self) -> bool:
        """Some part of the model lies on another device than the rest; the embeddings or the head count too."""
        return len(set(self.model.places)) > 1

    @property
    def chunk(self) -> int:
        """Tokens of a prompt beyond which it is prefilled alone, in chunks of `long_chunk`.

        The original's int8 cache has one scale a call: then a prompt is one call.
        """
        return 2**31 if self.codec.is_chunked else self.prefill_chunk

    def use_long_chunk(self, num_tokens: int) -> None:
        """On a GPU, read a prompt beyond one chunk in chunks of so many tokens, if that is more."""
        if self.device.type == "cuda":
            self.long_chunk = max(self.prefill_chunk, num_tokens)

    def empty_prefix(self) -> Prefix:
        return Prefix(self.config, self.codec, self.model.dtype, self.layer_devices)

    def slots(self, num_slots: int, capacity: int) -> Slots:
        return Slots(self.config, self.codec, self.model.dtype, num_slots, capacity)

    @torch.inference_mode()
    def extend(
        self, prefix: Prefix, ids: Sequence[int], total_length: int, *, want_hidden: bool = False
    ) -> Iterator[Tensor]:
        """Grow `prefix` by `ids`, chunk by chunk; yields each chunk's hidden states [n,E] ([0,E] unless wanted).

        `total_length`: prefill tokens of the whole sequence this belongs to; it decides the NTK alpha.
        """
        prefix.reserve(prefix.length + len(ids))
        size = max(self.chunk, self.long_chunk)
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            attends = self._attends([len(part)], prefixes=[prefix], sinks=[prefix])
            hidden = self._run(part, total_length, attends, None if want_hidden else self._no_rows())
            prefix.advance(len(part))
            yield hidden

    @torch.inference_mode()
    def first_non_finite(self, ids: Sequence[int]) -> str:
        """The first module whose output for these tokens holds NaN or infinity: "layers.3 in float16"."""
        found: list[str] = []

        def look(name: str, output: Tensor | Residual) -> None:
            whole = output.whole_NE if isinstance(output, Residual) else output
            if not found and not bool(torch.isfinite(whole).all()):
                found.append(f"{name} in {str(whole.dtype).removeprefix('torch.')}")

        watched = {"embed": self.model.embed, "norm": self.model.norm}
        watched |= {f"layers.{i}": layer for i, layer in enumerate(self.model.layers)}
        hooks = [m.register_forward_hook(lambda _m, _i, out, n=n: look(n, out)) for n, m in watched.items()]
        try:
            for hidden in self.extend(self.empty_prefix(), ids, len(ids), want_hidden=True):
                look("head", self.model.logits(hidden[-1:]))
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else f"after the prompt, in {str(self.model.dtype).removeprefix('torch.')}"

    def grown(self, parent: Prefix | None, ids: Sequence[int], total_length: int) -> Prefix:
        """A new prefix: the parent's tokens, then `ids`."""
        prefix = self.empty_prefix() if parent is None else parent.fork()
        for _ in self.extend(prefix, ids, total_length):
            pass
        return prefix

    @torch.inference_mode()
    def grown_together(
        self, parents: Sequence[Prefix | None], parts: Sequence[Sequence[int]], total_lengths: Sequence[int]
    ) -> list[Prefix]:
        """`grown` for several prefixes in one forward; the caller keeps it within a chunk."""
        prefixes = [self.empty_prefix() if parent is None else parent.fork() for parent in parents]
        lengths = [len(ids) for ids in parts]
        for prefix, length in zip(prefixes, lengths):
            prefix.reserve(prefix.length + length)
        attends = self._attends(lengths, prefixes=parents, sinks=prefixes)
        self._run(_joined(parts), self._token_lengths(total_lengths, lengths), attends, self._no_rows())
        for prefix, length in zip(prefixes, lengths):
            prefix.advance(length)
        return prefixes

    @torch.inference_mode()
    def packed(
        self,
        sequences: Sequence[Sequence[int]],
        total_lengths: Sequence[int],
        *,
        prefixes: Sequence[Prefix | None] = (),
        last_only: bool = False,
        sink: tuple[Slots, Sequence[int]] | None = None,
    ) -> Tensor:
        """Hidden states of several sequences, each after its own prefix, packed [N,E]; with `last_only` [B,E]."""
        lengths = [len(s) for s in sequences]
        attends = self._attends(lengths, prefixes=prefixes, sink_slots=sink)
        rows = attends[self.layer_devices[-1]].last_B if last_only else None
        return self._run(_joined(sequences), self._token_lengths(total_lengths, lengths), attends, rows)

    def decoding(
        self,
        slots: Slots,
        *,
        prefill_lengths: Iterable[int],
        num_positions: int,
        finish: Finish = lambda hidden: (hidden, None),
        buckets: Buckets | None = None,
        graphs: StepGraphs[StepResult] | None = None,
        is_pooled: bool = False,
    ) -> Decoding:
        """Decode steps over `slots`; see `Decoding`. Where steps are captured, prefixes are read from pools."""
        buckets = buckets or buckets_for(self.device)
        return Decoding(
            self.model,
            self.ropes,
            slots,
            prefill_lengths=prefill_lengths,
            num_positions=num_positions,
            kernel=self.kernel,
            finish=finish,
            is_triton=self.decode_kernel == "triton",
            buckets=buckets,
            graphs=graphs,
            pools=self._pools(buckets) if graphs is not None or is_pooled else None,
        )

    def _pools(self, buckets: Buckets) -> PrefixPools:
        layer_bytes = 2 * self.config.num_kv_heads * self.config.head_dim * self.model.dtype.itemsize
        return PrefixPools(
            self.slots,
            buckets.rows,
            buckets.keys,
            max_tokens=self.pool_bytes // (layer_bytes * self.config.num_layers),
            max_gathered=None if self.decode_kernel == "triton" else GATHERED_BYTES // layer_bytes,
        )

    def _token_lengths(self, total_lengths: Sequence[int], lengths: Sequence[int]) -> int | list[int]:
        """Prefill length of each token's sequence; one number where all have the same alphas."""
        if len({self.rope.key(n) for n in set(total_lengths)}) == 1:
            return total_lengths[0]
        return [total for total, length in zip(total_lengths, lengths) for _ in range(length)]

    def _attends(self, lengths: Sequence[int], **options: Any) -> dict[torch.device, PackedAttend]:
        """One for each device."""
        return {
            device: PackedAttend(self.config, self.codec, lengths, kernel=self.kernel, device=device, **options)
            for device in self.ropes
        }

    def _no_rows(self) -> Tensor:
        return torch.tensor(NO_ROWS, dtype=torch.long, device=self.layer_devices[-1])

    def _run(
        self,
        ids: Sequence[int],
        lengths: int | Sequence[int],
        attends: dict[torch.device, PackedAttend],
        rows: Tensor | None,
    ) -> Tensor:
        tokens = upload(torch.tensor(ids), self.device)
        turns = {d: self.ropes[d].rotations(a.positions_N, lengths, a.end) for d, a in attends.items()}
        rotations = [turns[device][layer] for layer, device in enumerate(self.layer_devices)]
        hidden: Tensor = self.model(tokens, rotations, by_layer(attends, self.layer_devices), rows)
        return hidden


def choose_decode_kernel(model: Transformer, kernel: str, codec: KvCodec) -> str:
    """ "triton" on CUDA where it is there and gives the plain twin's numbers, else "plain", with the reason."""
    if kernel == "eager" or fused.name(model.device, model.dtype) == "plain":
        return "plain"
    from qwen_eval.models.gpu.check import flaw

    for device in dict.fromkeys(model.layer_devices):
        if fused.name(device, model.dtype) == "plain":
            return f"plain (layers lie on {device})"
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # where Triton launches its kernels
            found = flaw(device, model.dtype, model.config, is_int8=not codec.is_exact)
        if found is not None:
            fused.distrust(device, model.dtype, found)
            return f"plain ({found})"
    return "triton"


def _joined(sequences: Sequence[Sequence[int]]) -> list[int]:
    return [token for sequence in sequences for token in sequence]
