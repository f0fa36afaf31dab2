"""The kernel of an unquantized Linear: chosen by measurement, and the same product whatever is chosen."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import Tensor, nn

from qwen_eval.models import dense
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import Cost, head_copy_bytes
from qwen_eval.models.dense import (
    IS_PACKED,
    PADDED,
    PLAIN,
    PREPACKED,
    VECTOR,
    Kernel,
    Linear,
    can_prepack,
    fastest,
    measure,
    prepare,
)

needs_prepacking = pytest.mark.skipif(not can_prepack(), reason="this CPU or this torch has no prepacked bf16 product")


def linear_of(num_outputs: int = 600, num_inputs: int = 1024, *, bias: bool = False) -> Linear:
    torch.manual_seed(0)
    linear = Linear(num_inputs, num_outputs, bias=bias, dtype=torch.bfloat16)
    return linear.requires_grad_(False)


def rows_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 33])
@pytest.mark.parametrize("kernel", [
    VECTOR, pytest.param(PREPACKED, marks=needs_prepacking), pytest.param(PADDED, marks=needs_prepacking)
])  # fmt: skip
def test_every_kernel_gives_the_product(kernel: Kernel, num_rows: int, bias: bool) -> None:
    linear, x = linear_of(bias=bias), rows_of(num_rows)
    expected = linear(x)
    linear.use(kernel)
    found = linear(x)
    assert found.shape == expected.shape == (num_rows, 600)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=2**-8 * float(expected.abs().max()) if num_rows else 0)


@needs_prepacking
def test_a_prepacked_layer_holds_its_weight_once_unless_others_read_it() -> None:
    alone, shared = linear_of(), linear_of()
    expected = alone(rows_of(5))
    alone.use(PADDED)
    shared.use(PADDED, keep_weight=True)
    assert not list(alone.parameters())
    assert shared.weight.shape == (600, 1024)
    assert torch.equal(alone(rows_of(5)), shared(rows_of(5)))
    assert torch.allclose(shared(rows_of(5)).float(), expected.float(), atol=2**-8 * float(expected.abs().max()))


@needs_prepacking
def test_a_row_alone_and_among_three_others_is_the_same_product_when_padded() -> None:
    linear, x = linear_of(bias=True), rows_of(4)
    linear.use(PADDED)
    together = linear(x)
    for rows in (1, 2, 3):
        assert torch.equal(linear(x[:rows]), together[:rows])


@pytest.mark.parametrize(("times", "kernel"), [
    ({PLAIN: [2.0, 8.0], VECTOR: [1.0, 8.0], PREPACKED: [1.2, 4.0]}, PREPACKED),
    ({PLAIN: [2.0, 8.0], VECTOR: [1.0, 8.0], PREPACKED: [1.9, 8.0]}, VECTOR),
    ({PLAIN: [2.0, 8.0], VECTOR: [1.9, 8.0], PREPACKED: [1.9, 7.9]}, PLAIN),  # within noise
    ({PLAIN: [2.0, 8.0], VECTOR: [4.0, 8.0]}, PLAIN),
    ({PLAIN: [2.4, 5.0], PREPACKED: [1.4, 3.9], PADDED: [1.2, 3.9]}, PADDED),
    ({PLAIN: [2.4, 5.0], PREPACKED: [1.1, 3.9], PADDED: [1.2, 3.9]}, PREPACKED),
])  # fmt: skip
def test_the_fastest_is_taken_unless_noise_could_have_chosen_it(
    times: dict[Kernel, list[float]], kernel: Kernel
) -> None:
    assert fastest(times) == kernel


def test_each_shape_is_measured_on_this_machine() -> None:
    times = measure([linear_of().weight])
    assert set(times) == {PLAIN, VECTOR} | (set(IS_PACKED) if can_prepack() else set())
    assert all(seconds > 0 for both in times.values() for seconds in both)


def test_a_weight_that_others_read_is_kept_and_small_or_fp32_layers_are_left_alone() -> None:
    kept, small, full = linear_of(), linear_of(num_outputs=16), Linear(1024, 600, bias=False)
    counts = prepare(nn.ModuleList([kept, small, full]).modules(), keep_weight=[kept])
    assert sum(counts.values()) == 1
    assert kept.weight.shape == (600, 1024)
    assert small.kernel == full.kernel == PLAIN


SHAPE = ModelConfig.from_hf({
    "model_type": "qwen2", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 768, "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
})  # fmt: skip


@needs_prepacking
def test_a_copy_of_the_head_takes_what_the_cost_model_says() -> None:
    head = linear_of(num_outputs=SHAPE.vocab_size, num_inputs=SHAPE.hidden_size)
    head(torch.ones(4, SHAPE.hidden_size, dtype=torch.bfloat16))
    before = psutil.Process().memory_info().rss
    head.use(PADDED, keep_weight=True)
    head(torch.ones(4, SHAPE.hidden_size, dtype=torch.bfloat16))
    taken = psutil.Process().memory_info().rss - before
    assert head_copy_bytes(SHAPE, "bf16", "cpu", 2**40) == pytest.approx(taken, rel=0.1)


def test_a_copy_of_the_head_is_counted_only_where_one_may_be_made() -> None:
    table = SHAPE.vocab_size * SHAPE.hidden_size * 2
    assert head_copy_bytes(SHAPE, "bf16", "cpu", 8 * table) == table
    assert head_copy_bytes(SHAPE, "bf16", "cpu", 8 * table - 1) == 0  # it must fit into an eighth of what is left
    assert head_copy_bytes(SHAPE, "fp32", "cpu", 2**40) == head_copy_bytes(SHAPE, "bf16", "cuda", 2**40) == 0
    plain = Cost(config=SHAPE)
    copied = plain.with_head_copy("cpu", 2**40)
    assert copied.peak_bytes(2, 8, 4) == plain.peak_bytes(2, 8, 4) + table
    assert copied.read_bytes == plain.read_bytes  # it is read instead of the other one


@needs_prepacking
@pytest.mark.parametrize(("spare_bytes", "num_packed"), [(0, 0), (600 * 1024 * 2, 1), (2 * 600 * 1024 * 2, 2)])
def test_a_kept_weight_is_packed_as_well_where_the_copy_fits(
    spare_bytes: int, num_packed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {PLAIN: [2.0, 8.0], VECTOR: [2.0, 8.0], PREPACKED: [1.5, 4.0], PADDED: [1.0, 4.0]}
    monkeypatch.setitem(
        dense._measured, (600, 1024, torch.get_num_threads(), True), times
    )  # a machine where packing wins
    linears = [linear_of(), linear_of()]
    counts = prepare(linears, keep_weight=linears, spare_bytes=spare_bytes)
    assert counts.get(PADDED, 0) == num_packed
    assert [linear.packed is not None for linear in linears] == [i < num_packed for i in range(2)]
    assert all(linear.weight.shape == (600, 1024) for linear in linears)
