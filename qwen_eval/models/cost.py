"""What a model costs before anything is loaded: parameters, bytes, FLOPs, the batch that fits. No torch here.

Two accounts are kept apart: what *our* engine holds and moves (`Cost`), and the law that the published memory cells
follow (`published_peak_bytes`), which is that of the original code on an A100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen_eval.models.block import LinearShape, block_linears
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.quant.formats import ELEMENT_BYTES, quant_format

CUDA_CONTEXT_BYTES = 600 * 2**20  # driver, kernels and cuBLAS workspace beside the tensors; an assumption, said as such
CUDA_HEAD_BYTES = 512 * 2**20  # of logits of scoring at a time
PREFILL_CHUNK = 1024  # tokens of a prompt that are read together with other prompts; of a longer one at a time
MAX_CHUNK = 8192  # tokens of a prompt in one forward: more make no product faster
MAX_GRAPH_BYTES = 2 * 2**30  # that captured decode steps keep
MAX_POOL_BYTES = 4 * 2**30  # of copies of prefixes for them
MEASURED_BYTES = 1 << 20  # a bf16 weight on a CPU from which on kernels are measured: models/dense.py
HEAD_COPY_SHARE = 1 / 8  # of the memory beside the weights: what a packed copy of the head may take on a CPU
GENERATE_EXTRA_BYTES = int(0.05 * 2**30)  # of the published law


def stored_linears(config: ModelConfig) -> list[LinearShape]:
    """The Linears of one layer in the parts in which a checkpoint stores them."""
    return [shape for linear in block_linears(config).values() for shape in linear.stored_shapes]


def num_linear_weights(config: ModelConfig) -> int:
    """Weights of all linears of all blocks: what quantization shrinks, and what every token is multiplied with."""
    return config.num_layers * sum(linear.num_weights for linear in stored_linears(config))


def num_other_parameters(config: ModelConfig) -> int:
    """Embeddings, head (once when tied) and norms: never quantized."""
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    norms = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    return tables + config.num_layers * norms + config.hidden_size


def num_parameters(config: ModelConfig) -> int:
    """Exactly the elements of the model's tensors (tied embeddings once)."""
    blocks = config.num_layers * sum(linear.num_parameters for linear in stored_linears(config))
    return blocks + num_other_parameters(config)


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_bytes(config: ModelConfig, quant: str, dtype: str, *, is_packed: bool = True) -> int:
    """All weights as our engine holds them."""
    return sum(unit_bytes(config, quant, dtype, is_packed=is_packed).values())


def unit_bytes(config: ModelConfig, quant: str, dtype: str, *, is_packed: bool = True) -> dict[str, int]:
    """Weights of what is never split over devices, in the order of a forward: embed, layers.0 ..., norm, head.

    A tied head is the embedding's table: it has no bytes of its own.
    """
    found, element = quant_format(quant), ELEMENT_BYTES[dtype]
    linears = [each.shape for each in block_linears(config).values()] if found.is_made_here else stored_linears(config)
    norms = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    block = sum(found.held_bytes(linear, dtype, is_packed) for linear in linears) + norms * element
    table = config.vocab_size * config.hidden_size * element
    layers = {f"layers.{i}": block for i in range(config.num_layers)}
    head = 0 if config.tie_embeddings else table
    return {"embed": table, **layers, "norm": config.hidden_size * element, "head": head}


def head_copy_bytes(config: ModelConfig, dtype: str, device: str, left_bytes: int) -> int:
    """The most that the head takes a second time, packed for oneDNN, on a CPU in bf16: the rows of choices and a tied
    embedding read the plain one. Whether it is made is measured at load. `left_bytes`: free beside the weights.
    """
    table = config.vocab_size * config.hidden_size * ELEMENT_BYTES[dtype]
    is_made = device == "cpu" and dtype == "bf16" and MEASURED_BYTES <= table <= HEAD_COPY_SHARE * left_bytes
    return table if is_made else 0


def checkpoint_bytes(config: ModelConfig, quant: str) -> int:
    """The tensors of a published checkpoint; that of a format made while loading is the plain one, in bf16."""
    stored = quant_format(quant).file_bytes or quant_format("none").file_bytes
    assert stored is not None
    return int(config.num_layers * sum(map(stored, stored_linears(config)))) + 2 * num_other_parameters(config)


# --- key-value cache -------------------------------------------------------------------------------------------------


def kv_token_bytes(config: ModelConfig, kv_cache: str, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers: `kv_cache` is auto (as the model) or int8 (with scales)."""
    element = ELEMENT_BYTES[dtype]
    head = config.head_dim + 2 * element if kv_cache == "int8" else config.head_dim * element
    return 2 * config.num_layers * config.num_kv_heads * head


# --- activations -----------------------------------------------------------------------------------------------------


def prefill_bytes(
    config: ModelConfig,
    num_tokens: int,
    dtype: str,
    *,
    past: int = 0,
    num_sequences: int = 1,
    kv_cache: str = "auto",
    is_grown: bool = True,
) -> int:
    """The largest set of activations alive at once while `num_tokens` packed tokens go through a layer.

    `past`: tokens before them in the cache, which they lengthen if `is_grown`. Weights and cache are not included,
    logits (`logits_bytes`) neither.
    """
    element = ELEMENT_BYTES[dtype]
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    stream, qkv = config.hidden_size * element, (heads + 2 * kv_heads) * element
    is_half = element == 2
    # rows of the sum: what is held, then what the step itself makes; per token
    norm = 3 * stream + config.hidden_size * (8 + element * is_half)
    turn = 2 * stream + qkv + kv_heads * element + heads * (12 if is_half else 8)
    attend = 2 * stream + qkv + (heads + kv_heads) * element + heads * element
    own = 2 * heads * element if config.kv_group > 1 else 0  # causal kernels want keys for every query head
    own += qkv + heads * element if num_sequences > 1 else 0  # padded copies; all are freed before
    joined = heads * (12 + element) if past else 0  # two partial results are joined in fp32
    attend += max(own, joined) + (3 * kv_heads * 4 if kv_cache == "int8" else 0)
    mlp = 2 * stream + 2 * config.mlp_size * element
    # growing a prefix copies one layer's cache
    grown = (
        (past + num_tokens) * kv_token_bytes(config, kv_cache, dtype) // config.num_layers if past and is_grown else 0
    )
    return num_tokens * max(norm, turn, attend, mlp) + grown


def decode_bytes(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: str,
    *,
    kv_cache: str = "auto",
    is_copied: bool = True,
    row_bytes: int | None = None,
) -> int:
    """Activations of one decode step. `row_bytes`: `choice_bytes` of how tokens are chosen; None: greedily.

    `is_copied`: an int8 cache is read through a copy of one layer's keys and values; a Triton kernel needs none.
    """
    chosen = logits_bytes(config, batch, dtype) if row_bytes is None else batch * row_bytes
    layer = 3 * batch * length * config.num_kv_heads * config.head_dim * ELEMENT_BYTES[dtype]
    return prefill_bytes(config, batch, dtype) + max(chosen, layer if kv_cache == "int8" and is_copied else 0)


def choice_bytes(config: ModelConfig, dtype: str, *, is_sampled: bool, is_cut: bool, is_penalised: bool) -> int:
    """Of one row while its token is chosen from the logits: they, what is made of them, and the mask of seen tokens."""
    element = ELEMENT_BYTES[dtype]
    scores = 4 if element == 2 or is_penalised else 0  # in fp32
    if is_cut:  # scaled, sorted with their order, cut, as probabilities, summed up
        chosen = scores + 4 + 4 + 8 + 4 + 4 + 4
    elif is_sampled:
        chosen = scores + 4 + 4 + 8
    else:
        chosen = 17 if is_penalised and element == 2 else 13 if is_penalised else 0
    return config.vocab_size * (element + chosen + is_penalised)


def logits_bytes(config: ModelConfig, num_rows: int, dtype: str) -> int:
    return num_rows * config.vocab_size * ELEMENT_BYTES[dtype]


# --- one cell --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A model as it is run, with the memory and the work of a `batch` of equal sequences."""

    config: ModelConfig
    quant: str = "none"
    dtype: str = "bf16"
    kv_cache: str = "auto"
    is_packed: bool = True
    is_copied: bool = True  # an int8 cache is read through a copy; False where a kernel reads it as it is
    prefill_chunk: int = PREFILL_CHUNK
    max_batch_tokens: int = 4096  # tokens of one packed prefill
    head_copy_bytes: int = 0  # of the head's packed copy beside it

    def with_head_copy(self, device: str, free_bytes: int) -> Cost:
        """With the most that a copy of the head may take on this kind of device."""
        left = free_bytes - self.weight_bytes
        return replace(self, head_copy_bytes=head_copy_bytes(self.config, self.dtype, device, left))

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.config, self.quant, self.dtype, is_packed=self.is_packed)

    @property
    def held_bytes(self) -> int:
        """Weights and what is made of them at load."""
        return self.weight_bytes + self.head_copy_bytes

    @property
    def kv_token_bytes(self) -> int:
        return kv_token_bytes(self.config, self.kv_cache, self.dtype)

    def kv_bytes(self, batch: int, tokens: int) -> int:
        return batch * tokens * self.kv_token_bytes

    def prefill_activation_bytes(self, batch: int, prompt_tokens: int) -> int:
        """Of the largest packed forward of the prefill."""
        if prompt_tokens > self.prefill_chunk:  # one sequence at a time, chunk by chunk
            past = (prompt_tokens - 1) // self.prefill_chunk * self.prefill_chunk
            packed, sequences = self.prefill_chunk, 1
        else:
            sequences = max(1, min(batch, self.max_batch_tokens // prompt_tokens))
            past, packed = 0, sequences * prompt_tokens
        peak = prefill_bytes(
            self.config, packed, self.dtype, kv_cache=self.kv_cache, past=past, num_sequences=sequences
        )
        return peak + logits_bytes(self.config, sequences, self.dtype)

    def activation_bytes(self, batch: int, prompt_tokens: int, new_tokens: int) -> int:
        length = prompt_tokens + new_tokens
        prefill = self.prefill_activation_bytes(batch, prompt_tokens)
        if new_tokens <= 1:
            return prefill
        cache, is_copied = self.kv_cache, self.is_copied
        step = decode_bytes(self.config, batch, length, self.dtype, kv_cache=cache, is_copied=is_copied)
        return max(prefill, step)

    def peak_bytes(self, batch: int, prompt_tokens: int, new_tokens: int) -> int:
        """Weights, cache at its longest and activations; the memory of a CUDA context is not included."""
        cache = self.kv_bytes(batch, prompt_tokens + new_tokens)
        return self.held_bytes + cache + self.activation_bytes(batch, prompt_tokens, new_tokens)

    def max_batch(self, memory_bytes: int, prompt_tokens: int, new_tokens: int) -> int:
        """The largest batch whose peak fits; 0 when not even one sequence does."""
        return largest(lambda batch: self.peak_bytes(batch, prompt_tokens, new_tokens) <= memory_bytes)

    # work

    def prefill_flops(self, batch: int, prompt_tokens: int) -> float:
        """Multiplications and additions of a prefill; the head runs on the last token only."""
        c = self.config
        dense = 2.0 * num_linear_weights(c) * prompt_tokens
        attention = 2.0 * c.num_layers * c.num_heads * c.head_dim * prompt_tokens * (prompt_tokens + 1)
        return batch * (dense + attention + 2.0 * c.vocab_size * c.hidden_size)

    def decode_flops(self, batch: int, length: float) -> float:
        """Of one step with `length` tokens in view."""
        c = self.config
        dense = 2.0 * (num_linear_weights(c) + c.vocab_size * c.hidden_size)
        return batch * (dense + 4.0 * c.num_layers * c.num_heads * c.head_dim * length)

    @property
    def read_bytes(self) -> int:
        """Weights that every forward reads whole: all but the embedding table, of which it picks rows."""
        table = ELEMENT_BYTES[self.dtype] * self.config.vocab_size * self.config.hidden_size
        return self.weight_bytes - (0 if self.config.tie_embeddings else table)

    def prefill_traffic_bytes(self, batch: int, prompt_tokens: int) -> float:
        """The least that must move: weights once, the cache written once."""
        return float(self.read_bytes + self.kv_bytes(batch, prompt_tokens))

    def decode_traffic_bytes(self, batch: int, length: float) -> float:
        """The least that one step must move: weights once, the cache of every sequence once."""
        return self.read_bytes + batch * (length + 1) * self.kv_token_bytes


def largest(fits: Callable[[int], bool], limit: int = 1 << 20) -> int:
    """The largest n in 0..limit with `fits(n)`, which holds up to some n and not beyond."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Tokens of one packed forward, and tokens that fit into the key-value cache of all sequences; at least 1.

    `chunk_tokens`: of one forward of a long prompt. `token_bytes` of that cache. `graph_bytes`: what captured steps may
    keep; `pool_bytes`: copies of prefixes for them.
    """

    packed_tokens: int
    cached_tokens: int
    chunk_tokens: int
    token_bytes: int
    graph_bytes: int = 0
    pool_bytes: int = 0


def batch_limits(
    config: ModelConfig,
    kv_cache: str,
    dtype: str,
    free_bytes: int,
    *,
    max_tokens: int,
    head_bytes: int = 0,
    is_captured: bool = False,
) -> BatchLimits:
    """For the memory that the weights leave free: a third is for activations. At most `max_tokens` in one forward.

    `head_bytes`: logits of scoring, of which a part exists at a time. With `is_captured` steps a part is for their
    graphs, and a part for prefixes and the copies of them that the graphs read.
    """
    activations = free_bytes // 3

    def fits(tokens: int) -> bool:
        peak = prefill_bytes(config, tokens, dtype, past=1, num_sequences=2, kv_cache=kv_cache, is_grown=False)
        return peak + min(head_bytes, logits_bytes(config, tokens, "fp32")) <= activations

    def fits_long(tokens: int) -> bool:
        peak = prefill_bytes(config, tokens, dtype, past=config.max_length or config.train_length, kv_cache=kv_cache)
        return peak + min(head_bytes, logits_bytes(config, tokens, "fp32")) <= activations

    cache = free_bytes - activations
    graphs, pool = (min(MAX_GRAPH_BYTES, cache // 8), min(MAX_POOL_BYTES, cache // 8)) if is_captured else (0, 0)
    token_bytes = kv_token_bytes(config, kv_cache, dtype)
    return BatchLimits(
        packed_tokens=max(1, largest(fits, max_tokens)),
        cached_tokens=max(1, (cache - graphs - 2 * pool) // token_bytes),
        chunk_tokens=max(1, largest(fits_long, MAX_CHUNK)),
        token_bytes=token_bytes,
        graph_bytes=graphs,
        pool_bytes=pool,
    )


def spread_limits(
    config: ModelConfig, kv_cache: str, dtype: str, rooms: Sequence[tuple[int, int]], **options: Any
) -> BatchLimits:
    """`batch_limits` for a model on several devices, each with (its number of layers, its free bytes): the smallest."""
    parts = [(replace(config, num_layers=num_layers, windows=()), free) for num_layers, free in rooms]
    limits = [batch_limits(part, kv_cache, dtype, free, **options) for part, free in parts]
    tightest = min(limits, key=lambda limit: limit.cached_tokens)
    return replace(
        tightest,
        packed_tokens=min(limit.packed_tokens for limit in limits),
        chunk_tokens=min(limit.chunk_tokens for limit in limits),
    )


# --- the published tables --------------------------------------------------------------------------------------------


def published_peak_bytes(config: ModelConfig, quant: str, length: int, mode: str) -> int:
    """The law that the published memory cells follow (fitted to them; A100, the original code, 16-bit cache).

    generate: weights + twice the cache (old and new live together) + 0.05 GiB; encode: weights + twice the cache (views
    keep the fused qkv) + the logits of every position.
    """
    peak = checkpoint_bytes(config, quant) + 2 * length * kv_token_bytes(config, "auto", "bf16")
    return peak + (GENERATE_EXTRA_BYTES if mode == "generate" else 2 * length * config.vocab_size)
