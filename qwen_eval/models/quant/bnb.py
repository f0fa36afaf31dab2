"""NF4 and LLM.int8 through bitsandbytes: unquantized weights are quantized while they are loaded.

NF4 (QLoRA, https://arxiv.org/abs/2305.14314): 4-bit normal-float blocks of 64 with double quantization of the scales.
LLM.int8 (https://arxiv.org/abs/2208.07339): int8 per output row; input columns beyond the threshold stay in full width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from qwen_eval.core import EngineError

if TYPE_CHECKING:
    from bitsandbytes import MatmulLtState
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

FUSED = "support_avx512bf16_for_cpu"  # the library's own switch on a 4-bit layer
FUSED_BLOCK = 32  # outputs packed together by the fused kernel
NF4_BLOCK = 64  # weights that share a scale
OUTLIER_THRESHOLD = 6.0  # the paper's; inputs beyond it are not quantized
Quant = Literal["nf4", "int8"]


class BnbLinear(nn.Module):
    """A Linear held by bitsandbytes. Input and output are of the compute dtype it was built with."""

    def __init__(self, inner: Linear4bit | Linear8bitLt, shape: tuple[int, int], kernel: str) -> None:
        super().__init__()
        self.inner = inner
        self.out_features, self.in_features = shape
        self.kernel = kernel

    @property
    def weight_bytes(self) -> int:
        """Codes, scales and the tables of the double quantization."""
        # of LLM.int8: on the weight, and from the first forward on in the state
        scales: Tensor | None = getattr(self.inner.weight, "SCB", None)
        state: MatmulLtState | None = getattr(self.inner, "state", None)
        if scales is None and state is not None:
            scales = state.SCB
        return _nbytes(self.inner.weight) + (0 if scales is None else scales.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # the library's fused CPU kernel divides by the number of rows: SIGFPE
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.inner(x)


def build_linear(
    weight: Tensor, bias: Tensor | None, quant: Quant, *, dtype: torch.dtype, device: torch.device | str
) -> BnbLinear:
    """Quantize `weight` [out, in] for computing in `dtype`. EngineError when bitsandbytes is not installed."""
    _need_bitsandbytes()
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    # bitsandbytes quantizes when the parameter is moved to its device, from the dtype it has at that moment
    source = weight.detach().to("cpu", dtype).contiguous()
    inner = (_nf4 if quant == "nf4" else _int8)(source, bias is not None)
    inner.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    inner = inner.to(device).eval()
    return BnbLinear(inner, (out_features, in_features), f"bitsandbytes {bnb.__version__} {_kernel(inner, quant)}")


def _nf4(source: Tensor, has_bias: bool) -> Linear4bit:
    from bitsandbytes.nn import Linear4bit, Params4bit

    inner = Linear4bit(
        source.shape[1],
        source.shape[0],
        has_bias,
        compute_dtype=source.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    inner.weight = Params4bit(source, requires_grad=False, compress_statistics=True, quant_type="nf4")
    allow_fused(inner, source.dtype)
    return inner


def _int8(source: Tensor, has_bias: bool) -> Linear8bitLt:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    inner = Linear8bitLt(
        source.shape[1], source.shape[0], has_bias, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
    )
    inner.weight = Int8Params(source, requires_grad=False, has_fp16_weights=False)
    return inner


def allow_fused(layer: nn.Module, dtype: torch.dtype) -> None:
    """Let the library repack a 4-bit layer for its fused kernel only where that kernel is right.

    On a CPU with AVX512-BF16 the first forward repacks every NF4 layer and computes in bf16 whatever was asked, with
    bf16 scales; it asserts that the outputs come in blocks of 32. In bf16 it is ten times as fast at one row.
    """
    if isinstance(layer, nn.Linear) and getattr(layer, FUSED, False):
        fits = layer.out_features % FUSED_BLOCK == 0 and layer.in_features % NF4_BLOCK == 0
        setattr(layer, FUSED, dtype == torch.bfloat16 and fits)


def _kernel(inner: Linear4bit | Linear8bitLt, quant: Quant) -> str:
    if quant == "int8":
        return f"LLM.int8, outliers beyond {OUTLIER_THRESHOLD:g}"
    is_fused = getattr(inner, FUSED, False) and inner.weight.device.type == "cpu"
    return "NF4, fused for AVX512-BF16" if is_fused else "NF4, double quantized"


def builder(
    quant: Quant, *, dtype: torch.dtype, device: torch.device | str
) -> Callable[[str, Tensor, Tensor | None], nn.Module]:
    """(name, weight, bias) -> Linear, for quantizing a whole checkpoint while it loads."""

    def build(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return build_linear(weight, bias, quant, dtype=dtype, device=device)

    return build


def _need_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise EngineError("model.quant=nf4|int8 needs bitsandbytes: pip install qwen_eval[bnb]") from error
    # it logs a line at every single call that is not in fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _nbytes(weight: Tensor) -> int:
    total = weight.data.nbytes
    state: QuantState | None = getattr(weight, "quant_state", None)
    while state is not None:
        total += state.absmax.nbytes + state.code.nbytes
        state = getattr(state, "state2", None)  # the fused kernel's layout has no second level
    return total
