"""Small functions of the block: as written here, or as one Triton kernel each on CUDA.

`engine.kernels`: auto takes the kernels where they are there and right, plain never does. What is written here is the
twin of each kernel; values are rounded where it says so: in bf16 the order of rounding is part of the model.
"""

# N tokens, H heads, D head channels, R half of the rotary dimension, E hidden size, B rows

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from qwen_eval.core import ConfigError
from qwen_eval.models.kv_quant import Quantized, quantize_per_token

P = ParamSpec("P")
T = TypeVar("T")


class Norm(NamedTuple):
    """An RMSNorm of the heads of queries or keys."""

    weight: Tensor
    eps: float


_wanted = ["auto"]  # `engine.kernels`, for all models of this process
_flaws: dict[tuple[torch.device, torch.dtype], str] = {}  # why kernels that are there are not used


def choose(kernels: str) -> None:
    """For all models of this process; ConfigError where Triton's kernels are asked for and cannot run."""
    if kernels == "triton" and not can_launch():
        raise ConfigError("engine.kernels=triton needs CUDA and the triton package; use auto")
    _wanted[0] = kernels


def distrust(device: torch.device, dtype: torch.dtype, flaw: str) -> None:
    """Use no kernel of Triton there any more: one was tried and failed."""
    _flaws[device, dtype] = flaw


def can_launch() -> bool:
    """On a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1), which is for tests."""
    return _has_triton() and (torch.cuda.is_available() or _is_interpreted())


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def name(device: torch.device, dtype: torch.dtype) -> str:
    """How the small functions run on this device, for the result."""
    is_asked = device.type == "cuda" and _wanted[0] != "plain" and _has_triton()
    if not (is_asked or _wanted[0] == "triton"):
        return "plain"
    flaw = _flaws.get((device, dtype))
    return "triton" if flaw is None else f"plain ({flaw})"


def uses_triton(x: Tensor) -> bool:
    """Whether `x` goes through a kernel: not in training, since kernels have no gradients."""
    if x.device.type != "cuda" and _wanted[0] != "triton":
        return False
    return not torch.is_grad_enabled() and name(x.device, x.dtype) == "triton"


def has_kernel(plain: Callable[P, T]) -> Callable[P, T]:
    """`plain`, or the kernel of its name in `gpu/block.py` where its first argument lies on a device that takes it."""

    @functools.wraps(plain)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        x = args[0]
        assert isinstance(x, Tensor)
        if not uses_triton(x):
            return plain(*args, **kwargs)
        from qwen_eval.models.gpu import block

        return cast("Callable[P, T]", getattr(block, plain.__name__))(*args, **kwargs)

    return run


@has_kernel
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised in fp32, cast back, then weighted (the order of the original; it matters in bf16)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@has_kernel
def add_rms_norm(x_NE: Tensor, delta_NE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its norm."""
    total_NE = x_NE + delta_NE
    return total_NE, rms_norm(total_NE, weight_E, eps)


@has_kernel
def turn(
    heads_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, logn_N: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    """Heads normed, turned to their positions, and times their LogN factors: what is given of these."""
    normed_NHD = heads_NHD if norm is None else rms_norm(heads_NHD, norm.weight, norm.eps)
    turned_NHD = rotate(normed_NHD, cos_NR, sin_NR)
    return turned_NHD if logn_N is None else stretch(turned_NHD, logn_N)


def rotate(heads_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Rotate-half on the leading 2R channels, in fp32, back to the input's dtype (as the original)."""
    half = cos_NR.shape[-1]
    cos, sin = cos_NR[:, None, :], sin_NR[:, None, :]
    x1, x2 = heads_NHD[..., :half].float(), heads_NHD[..., half : 2 * half].float()
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(heads_NHD.dtype)
    if 2 * half == heads_NHD.shape[-1]:
        return turned
    return torch.cat((turned, heads_NHD[..., 2 * half :]), dim=-1)


def stretch(q_NHD: Tensor, logn_N: Tensor) -> Tensor:
    """Queries times their LogN factors, in fp32."""
    return (q_NHD.float() * logn_N[:, None, None]).to(q_NHD.dtype)


@has_kernel
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. The gate's memory may be used for it."""
    return torch.nn.functional.silu(gate, inplace=True).mul_(up)


@has_kernel
def joined(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention [*,D] over two sets of keys out of that over each, by their log-sum-exp [*]."""
    weight_b = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)  # exp(b) / (exp(a) + exp(b))
    return torch.lerp(out_a.float(), out_b.float(), weight_b).to(out_a.dtype)


@has_kernel
def quantize(x_BKSD: Tensor) -> Quantized:
    """The int8 cache's own codes."""
    return quantize_per_token(x_BKSD)
