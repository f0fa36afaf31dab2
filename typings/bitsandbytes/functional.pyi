from torch import Tensor

class QuantState:
    absmax: Tensor
    code: Tensor
    state2: QuantState | None  # absent in the layout of the fused kernel
