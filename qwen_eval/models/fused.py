"""Small functions of the block that one kernel can do: compiled by torch.compile on CUDA, as written elsewhere.

`engine.kernels`: auto compiles where torch can, plain never does. Compiled or not, values are rounded where the code
says so: in bf16 the order of rounding is part of the model.
"""

# N tokens, H heads, D head channels, R half of the rotary dimension

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from qwen_eval.core import ConfigError

P = ParamSpec("P")
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}  # of inductor: keep the rounding between fused operations
_is_plain = [False]


def choose(kernels: str) -> None:
    """For all models of this process; ConfigError where compiled kernels are asked for and cannot be made."""
    if kernels == "triton" and not can_compile():
        raise ConfigError("engine.kernels=triton needs CUDA and the triton package; use auto")
    _is_plain[0] = kernels == "plain"


@functools.cache
def can_compile() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def name(device: torch.device) -> str:
    """How the small functions run on this device, for the result."""
    return "torch.compile" if device.type == "cuda" and can_compile() and not _is_plain[0] else "plain"


def fused(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """`function` as one kernel on CUDA; its first argument is a tensor of the device."""
    compiled: list[Callable[P, Tensor]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        x = args[0]
        assert isinstance(x, Tensor)
        if not x.is_cuda or name(x.device) == "plain":
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=True, options=OPTIONS))
        return compiled[0](*args, **kwargs)

    return run


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised in fp32, cast back, then weighted (the order of the original; it matters in bf16)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@fused
def rotate(heads_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Rotate-half on the leading 2R channels, in fp32, back to the input's dtype (as the original)."""
    half = cos_NR.shape[-1]
    cos, sin = cos_NR[:, None, :], sin_NR[:, None, :]
    x1, x2 = heads_NHD[..., :half].float(), heads_NHD[..., half : 2 * half].float()
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(heads_NHD.dtype)
    if 2 * half == heads_NHD.shape[-1]:
        return turned
    return torch.cat((turned, heads_NHD[..., 2 * half :]), dim=-1)


@fused
def stretch(q_NHD: Tensor, logn_N: Tensor) -> Tensor:
    """Queries times their LogN factors, in fp32."""
    return (q_NHD.float() * logn_N[:, None, None]).to(q_NHD.dtype)


@fused
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. The gate's memory may be used for it."""
    if gate.is_cuda:
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.silu(gate, inplace=True).mul_(up)
