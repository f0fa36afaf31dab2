import torch
from bitsandbytes import MatmulLtState
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

class Params4bit(nn.Parameter):
    quant_state: QuantState | None
    def __new__(
        cls, data: Tensor, requires_grad: bool = ..., *, compress_statistics: bool = ..., quant_type: str = ...
    ) -> Params4bit: ...

class Int8Params(nn.Parameter):
    SCB: Tensor | None
    def __new__(cls, data: Tensor, requires_grad: bool = ..., has_fp16_weights: bool = ...) -> Int8Params: ...

class Linear4bit(nn.Linear):
    weight: Params4bit
    bias: nn.Parameter | None  # type: ignore[assignment]  # None is allowed, whatever torch says
    support_avx512bf16_for_cpu: bool
    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
    ) -> None: ...
    def __call__(self, x: Tensor) -> Tensor: ...

class Linear8bitLt(nn.Linear):
    weight: Int8Params
    bias: nn.Parameter | None  # type: ignore[assignment]  # None is allowed, whatever torch says
    state: MatmulLtState
    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
    ) -> None: ...
    def __call__(self, x: Tensor) -> Tensor: ...
