"""The kernel of an unquantized Linear: chosen by measurement, and the same product whatever is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen_eval.models.dense import PLAIN, PREPACKED, VECTOR, Kernel, Linear, can_prepack, fastest, measure, prepare


def linear_of(num_outputs: int = 600, num_inputs: int = 1024, *, bias: bool = False) -> Linear:
    torch.manual_seed(0)
    linear = Linear(num_inputs, num_outputs, bias=bias, dtype=torch.bfloat16)
    return linear.requires_grad_(False)


def rows_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
@pytest.mark.parametrize("kernel", [VECTOR, PREPACKED])
def test_every_kernel_gives_the_product(kernel: Kernel, num_rows: int, bias: bool) -> None:
    if kernel == PREPACKED and not can_prepack():
        pytest.skip("this CPU or this torch has no prepacked bf16 product")
    linear, x = linear_of(bias=bias), rows_of(num_rows)
    expected = linear(x)
    linear.use(kernel)
    found = linear(x)
    assert found.shape == expected.shape == (num_rows, 600)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=2**-8 * float(expected.abs().max()) if num_rows else 0)


def test_a_prepacked_layer_holds_its_weight_once() -> None:
    if not can_prepack():
        pytest.skip("this CPU or this torch has no prepacked bf16 product")
    linear = linear_of()
    linear.use(PREPACKED)
    assert not list(linear.parameters())


@pytest.mark.parametrize(("times", "kernel"), [
    ({PLAIN: [2.0, 8.0], VECTOR: [1.0, 8.0], PREPACKED: [1.2, 4.0]}, PREPACKED),
    ({PLAIN: [2.0, 8.0], VECTOR: [1.0, 8.0], PREPACKED: [1.9, 8.0]}, VECTOR),
    ({PLAIN: [2.0, 8.0], VECTOR: [1.9, 8.0], PREPACKED: [1.9, 7.9]}, PLAIN),  # within noise
    ({PLAIN: [2.0, 8.0], VECTOR: [4.0, 8.0]}, PLAIN),
])  # fmt: skip
def test_the_fastest_is_taken_unless_noise_could_have_chosen_it(
    times: dict[Kernel, list[float]], kernel: Kernel
) -> None:
    assert fastest(times) == kernel


def test_each_shape_is_measured_on_this_machine() -> None:
    times = measure([linear_of().weight])
    assert set(times) == {PLAIN, VECTOR} | ({PREPACKED} if can_prepack() else set())
    assert all(seconds > 0 for both in times.values() for seconds in both)


def test_a_weight_that_others_read_is_kept_and_small_or_fp32_layers_are_left_alone() -> None:
    kept, small, full = linear_of(), linear_of(num_outputs=16), Linear(1024, 600, bias=False)
    counts = prepare(nn.ModuleList([kept, small, full]).modules(), keep_weight=[kept])
    assert sum(counts.values()) == 1
    assert kept.weight.shape == (600, 1024)
    assert small.kernel == full.kernel == PLAIN
