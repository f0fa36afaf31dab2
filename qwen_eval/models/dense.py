"""The product of rows with an unquantised weight, by the kernel that measures best."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def has_bf16_units() -> bool:
    """False where the CPU multiplies bf16 by widening it; elsewhere torch's own choice of kernel is left alone."""
    asked = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch we take
    found = {"architecture": "unknown"} if asked is None else asked()
    return found["architecture"] != "x86_64" or bool(found["avx512_bf16"] or found["amx_bf16"])


def product(x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """[R,N] = x weight^T + bias. One bf16 row on a CPU without bf16 units is a matrix-vector product.

    `linear` is slower there: 14.1 tokens/s against 8.7, decoding 8 layers of the 1.8B's width on two AVX-512 cores
    (`tools/bench_generation.py --dtype bf16 --hidden 2048 --layers 8`).
    """
    if len(x_RK) != 1 or x_RK.dtype != torch.bfloat16 or x_RK.device.type != "cpu" or has_bf16_units():
        return F.linear(x_RK, weight_NK, bias_N)
    row_K = x_RK[0]
    product_N = weight_NK.mv(row_K) if bias_N is None else torch.addmv(bias_N, weight_NK, row_K)
    return product_N[None]
