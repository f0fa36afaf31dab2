"""The product of one row with a weight in Triton: it reads the weight once, as fast as memory gives it."""

# N outputs, K inputs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = ((2, 1024), (4, 512), (8, 512), (16, 256))  # outputs and inputs of a program's step: the fastest is measured


@triton.jit
def _vector_product(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor,
    num_outputs: tl.tensor, num_inputs: tl.tensor,
    block_n: tl.constexpr, block_k: tl.constexpr, has_bias: tl.constexpr,
) -> None:  # fmt: skip
    outputs_N = tl.program_id(0) * block_n + tl.arange(0, block_n)
    is_output = outputs_N < num_outputs
    rows_N = outputs_N.to(tl.int64) * num_inputs
    sum_NK = tl.zeros((block_n, block_k), tl.float32)
    for start in range(0, num_inputs, block_k):
        inputs_K = start + tl.arange(0, block_k)
        is_input = inputs_K < num_inputs
        x_K = tl.load(x + inputs_K, mask=is_input, other=0.0).to(tl.float32)
        at_NK, mask_NK = rows_N[:, None] + inputs_K[None, :], is_output[:, None] & is_input[None, :]
        weight_NK = tl.load(weight + at_NK, mask=mask_NK, other=0.0, eviction_policy="evict_first")
        sum_NK += weight_NK.to(tl.float32) * x_K[None, :]
    y_N = tl.sum(sum_NK, 1)
    if has_bias:
        y_N += tl.load(bias + outputs_N, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + outputs_N, y_N, mask=is_output)


def vector_product(x_1K: Tensor, weight_NK: Tensor, bias_N: Tensor | None, block: tuple[int, int]) -> Tensor:
    """[1,N], summed in fp32, with the bias, and rounded once."""
    (num_outputs, num_inputs), (block_n, block_k) = weight_NK.shape, block
    x_1K = x_1K.contiguous()
    assert weight_NK.is_contiguous(), "inputs of an output lie behind one another"
    out = torch.empty(1, num_outputs, dtype=x_1K.dtype, device=x_1K.device)
    _vector_product[(triton.cdiv(num_outputs, block_n),)](
        x_1K, weight_NK, weight_NK if bias_N is None else bias_N, out, num_outputs, num_inputs,
        block_n=block_n, block_k=block_k, has_bias=bias_N is not None,
    )  # fmt: skip
    return out
