"""What models/quant/bnb.py uses of bitsandbytes 0.45 and later, whose own annotations are partial."""

from torch import Tensor

__version__: str

class MatmulLtState:
    SCB: Tensor | None
