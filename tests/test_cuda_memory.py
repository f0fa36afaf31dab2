"""What the cost model says of memory against bytes that are counted, at the real sizes: tensors on "meta" have none."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache

import pytest
import torch
from counted_bytes import CountedBytes
from test_spread import config_of

from qwen_eval.core import Sampling
from qwen_eval.engines.native.sampling import Draw, TokenChoice
from qwen_eval.engines.native.workspace import Need, Workspace, make_workspace
from qwen_eval.models import cost
from qwen_eval.models.decode import RunningRow
from qwen_eval.models.kv_cache import Int8Codec
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.transformer import Transformer

NEAR = 0.025
GIB = 2**30
SAMPLINGS = {
    "greedy": Sampling(),
    "penalised": Sampling(repetition_penalty=1.1),
    "drawn": Sampling(temperature=0.9),
    "cut": Sampling(temperature=0.9, top_p=0.8, top_k=20, repetition_penalty=1.1),
}


@cache
def model_of(name: str) -> Transformer:
    """Four layers: caches grow with them, the rest does not."""
    with torch.device("meta"):
        return Transformer(replace(config_of(name), num_layers=4)).to(torch.bfloat16).settled()


def running(runner: ModelRunner, rows: int, length: int, sampling: Sampling) -> Workspace:
    """`rows` rows of `length - 16` tokens, ready for a step."""
    kind = TokenChoice.kind_of([sampling])
    need = Need(num_slots=rows, capacity=length, num_positions=length, alphas=frozenset(), choice=kind)
    workspace = make_workspace(runner, need, [length - 16], [sampling], lambda device: None)
    workspace.choice.admit(0, [Draw(sampling=sampling, prompt=[1, 2])] * rows)
    cached = RunningRow(prefill_tokens=length - 16, own_tokens=length - 16)
    workspace.decoding.arrange([cached] * rows, [1] * rows)
    return workspace


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("name", "kv_cache"), [("qwen-7b", "auto"), ("qwen-7b", "int8"), ("qwen2.5-7b", "auto")])
def test_a_decode_step_takes_the_predicted_bytes(name: str, kv_cache: str, sampling: str) -> None:
    """Slots, positions, the mask of the penalty, the step and the choice of its tokens; 64 rows of 2,048 tokens."""
    rows, length = 64, 2048
    codec = Int8Codec(upstream=False) if kv_cache == "int8" else None
    runner = ModelRunner(model_of(name), codec=codec)
    with CountedBytes("meta") as counted:
        workspace = running(runner, rows, length, SAMPLINGS[sampling])
        workspace.decoding.step()
        gc.collect()
    config = runner.config
    is_sampled, is_cut, is_penalised = TokenChoice.kind_of([SAMPLINGS[sampling]])
    chosen = cost.choice_bytes(config, "bf16", is_sampled=is_sampled, is_cut=is_cut, is_penalised=is_penalised)
    step = cost.decode_bytes(config, rows, length, "bf16", kv_cache=kv_cache, row_bytes=chosen)
    cache_bytes = rows * length * cost.kv_token_bytes(config, kv_cache, "bf16")
    assert counted.peak == pytest.approx(cache_bytes + step, rel=NEAR)


def test_a_kernel_that_reads_the_int8_cache_as_it_is_takes_no_copy() -> None:
    config = config_of("qwen-7b")
    copied, read = (
        cost.decode_bytes(config, 64, 2048, "bf16", kv_cache="int8", is_copied=is_copied) for is_copied in (True, False)
    )
    assert copied > 100 * read
    assert read == cost.decode_bytes(config, 64, 2048, "bf16")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_choosing_tokens_takes_the_predicted_bytes(sampling: str) -> None:
    config, rows = config_of("qwen-7b"), 64
    is_sampled, is_cut, is_penalised = TokenChoice.kind_of([SAMPLINGS[sampling]])
    with CountedBytes("meta") as counted:
        choice = TokenChoice([SAMPLINGS[sampling]], rows, config.vocab_size, torch.device("meta"))
        choice.admit(0, [Draw(sampling=SAMPLINGS[sampling], prompt=[1, 2])] * rows)
        choice(torch.empty(rows, config.vocab_size, dtype=torch.bfloat16, device="meta"))
    wanted = cost.choice_bytes(config, "bf16", is_sampled=is_sampled, is_cut=is_cut, is_penalised=is_penalised)
    assert counted.peak == pytest.approx(rows * wanted, rel=NEAR)


@pytest.mark.parametrize("name", ["qwen-7b", "qwen2.5-7b"])
@pytest.mark.parametrize(("num_tokens", "num_sequences"), [(1024, 1), (4096, 4), (16384, 4)])
def test_a_prefill_takes_the_predicted_bytes(name: str, num_tokens: int, num_sequences: int) -> None:
    runner, length = ModelRunner(model_of(name)), num_tokens // num_sequences
    with CountedBytes("meta") as counted:
        runner.packed([[1] * length] * num_sequences, [length] * num_sequences, last_only=True)
    wanted = cost.prefill_bytes(runner.config, num_tokens, "bf16", num_sequences=num_sequences)
    assert counted.peak == pytest.approx(wanted, rel=NEAR)


@pytest.mark.parametrize("name", ["qwen-7b", "qwen2.5-7b"])
@pytest.mark.parametrize("num_sequences", [32, 128])
def test_sequences_after_a_prefix_take_the_predicted_bytes(name: str, num_sequences: int) -> None:
    """16,384 tokens that all continue one prefix: the most that is joined at a time."""
    runner, length = ModelRunner(model_of(name)), 16384 // num_sequences
    prefix = runner.grown(None, [1] * 700, 700)
    with CountedBytes("meta") as counted:
        owners = [prefix] * num_sequences
        runner.packed([[1] * length] * num_sequences, [length] * num_sequences, prefixes=owners, last_only=True)
    wanted = cost.prefill_bytes(runner.config, 16384, "bf16", past=700, num_sequences=num_sequences, is_grown=False)
    assert counted.peak == pytest.approx(wanted, rel=NEAR)


@pytest.mark.parametrize("free", [3 * GIB, 20 * GIB, 60 * GIB])
def test_the_parts_of_the_free_memory_are_no_more_than_it(free: int) -> None:
    """Activations and logits, graphs, prefixes and their copies, slots."""
    config = config_of("qwen-7b")
    limits = cost.batch_limits(
        config, "auto", "bf16", free, max_tokens=16384, head_bytes=GIB // 2, is_captured=True
    )  # fmt: skip
    forward = cost.prefill_bytes(config, limits.packed_tokens, "bf16", past=1, num_sequences=2, is_grown=False)
    parts = [forward + GIB // 2, limits.graph_bytes, 2 * limits.pool_bytes, limits.cached_tokens * limits.token_bytes]
    assert 0.9 * free < free // 3 + sum(parts[1:]) <= free
    assert sum(parts) <= free
    assert limits.graph_bytes <= cost.MAX_GRAPH_BYTES
    plain = cost.batch_limits(config, "auto", "bf16", free, max_tokens=16384)
    assert plain.cached_tokens > limits.cached_tokens
    assert (free < 20 * GIB) == (limits.chunk_tokens < 1024)
    assert limits.chunk_tokens <= cost.MAX_CHUNK


def test_the_counter_counts_what_lives_and_the_most_that_lived() -> None:
    with CountedBytes("meta") as counted:
        kept = torch.empty(1024, dtype=torch.uint8, device="meta")
        passing = kept.float()
        assert counted.live == 1024 + 4096
        view = passing[:10]
        assert counted.live == 1024 + 4096
        del passing, view
        assert counted.live == 1024
    assert counted.peak == 1024 + 4096
