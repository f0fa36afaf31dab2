"""The int8 key/value cache: Qwen's own quantizer, exactly, and a better one that is our default.

Legend: B batch, H heads, S tokens, D head size. Codes are asymmetric uint8, `value = scale * (code - zero)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 255


class Quantized(NamedTuple):
    """`codes` uint8 [B, H, S, D]; `scale` and `zero` [B, H, S, 1] in the dtype of the values."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize_upstream(x_BHSD: Tensor) -> Quantized:
    """The released Qwen code's quantizer, bit for bit: one range per batch row and head over the WHOLE chunk, codes
    truncated (half a step of bias), all in the dtype of `x`. A constant chunk divides by zero and gives NaN, and the
    codes of a token depend on what else is in its chunk; both belong to the protocol.
    """
    low = x_BHSD.amin((-2, -1), keepdim=True)
    high = x_BHSD.amax((-2, -1), keepdim=True)
    scale = (high - low) / LEVELS
    zero = -low / scale
    codes = torch.clamp(x_BHSD / scale + zero, 0, LEVELS).to(torch.uint8)
    shape = (*x_BHSD.shape[:-1], 1)
    return Quantized(codes, scale.expand(shape).contiguous(), zero.expand(shape).contiguous())


def quantize_per_token(x_BHSD: Tensor) -> Quantized:
    """Our default: one range per token and head that holds 0, an integer zero point, codes rounded to nearest.

    A token's codes depend on that token alone: not on how a prompt was cut into chunks, on padding or on the batch. No
    value is off by more than half a step, constant vectors included. Same bytes per token as upstream's.
    """
    x = x_BHSD.float()
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    # one level is spent on rounding the zero point, and the scale is stored in the dtype of x never rounded down: so
    # both ends fit. An integer zero of at most 255 and every `code - zero` are exact in bf16 too.
    stored = x_BHSD.dtype
    scale = ((high - low) / (LEVELS - 1) * (1 + torch.finfo(stored).eps)).to(stored)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale.float())
    codes = torch.clamp(torch.round(x / scale.float()) + zero, 0, LEVELS).to(torch.uint8)
    return Quantized(codes, scale, zero.to(stored))


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`scale * (codes - zero)` [B, H, S, D], computed in the dtype of the scale, as upstream does."""
    return scale * (codes.to(scale.dtype) - zero)
