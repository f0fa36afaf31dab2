"""Kernels of torch that exist on CUDA alone, as plain code on CPU tensors, with their demands.

Their sources: aten/src/ATen/native/transformers/cuda and aten/src/ATen/native/cuda/int4mm.cu of PyTorch.
"""

# B sequences, H heads, T queries, D head channels

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """As the kernels lay it out: outputs [B,T,H,D] seen as [B,H,T,D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
    scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse.clamp(min=-3e38)[..., None]) @ v
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False
) -> tuple[Any, ...]:
    assert q.dtype in (torch.float16, torch.bfloat16), f"flash attention takes no {q.dtype}"
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] % 8 == 0, "heads of a multiple of 8 channels"
    assert q.shape[-1] <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "channels lie behind one another"
    assert not causal or q.shape[2] == k.shape[2]
    assert q.shape[2] > 0, "a grid of no blocks"
    assert q.shape[1] % k.shape[1] == 0
    out, lse = _attention(q, k, v, None, causal)
    return out, lse, None, None, q.shape[2], k.shape[2], torch.zeros(2), torch.zeros(()), torch.zeros(0)


def efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    want_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
) -> tuple[Any, ...]:
    align = 16 // q.element_size()
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[1] == k.shape[1], "this kernel groups no heads"
    assert q.shape[2] > 0, "a grid of no blocks"
    for x in (q, k, v):
        assert x.stride(-1) == 1, "channels lie behind one another"
        assert all(stride % 4 == 0 for size, stride in zip(x.shape[1:3], x.stride()[1:3]) if size > 1), "alignment"
    if bias is not None:
        assert bias.dtype == q.dtype
        assert tuple(bias.shape) == (*q.shape[:3], k.shape[2])
        assert bias.stride(-1) == 1
        assert all(stride % align == 0 for size, stride in zip(bias.shape[:3], bias.stride()) if size > 1), "alignment"
        assert not causal
    out, lse = _attention(q, k, v, bias, causal)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
    return out, padded, torch.zeros(()), torch.zeros(())


def pack(pairs: Tensor, inner_tiles: int) -> Tensor:
    """The layout of tinygemm: lane 4 n + l of a tile of 8 outputs holds inputs 2 l, 2 l + 1, 2 l + 8, 2 l + 9 ..."""
    assert pairs.dtype == torch.uint8
    assert pairs.is_contiguous()
    outputs, inputs = pairs.shape[0], 2 * pairs.shape[1]
    assert outputs % 8 == 0
    assert inputs % (inner_tiles * 16) == 0
    # outputs, super tiles, words of two tiles, four groups of four bytes each
    grouped = pairs.view(outputs // 8, 8, inputs // (16 * inner_tiles), inner_tiles // 2, 4, 4).long()
    bytes_ = grouped.transpose(-1, -2)  # [..., lane, which of its four bytes]
    shifts = torch.arange(0, 16, 4)
    words = ((bytes_ >> 4) << shifts).sum(-1) | ((bytes_ & 15) << (shifts + 16)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.permute(0, 2, 1, 4, 3).reshape(outputs // 8, -1, 32, inner_tiles // 2).int()


def unpack(packed: Tensor) -> Tensor:
    """[outputs, inputs]"""
    blocks, strips, _, half = packed.shape
    words = packed.view(blocks, strips, 8, 4, half).permute(0, 2, 1, 4, 3)[..., None]  # block, n, strip, word, lane
    high, low = (words >> torch.arange(0, 16, 4)) & 15, (words >> torch.arange(16, 32, 4)) & 15
    return torch.stack([high, low], -1).transpose(4, 5).reshape(blocks * 8, -1)


def int4_product(x: Tensor, packed: Tensor, group: int, scale_zero: Tensor) -> Tensor:
    assert x.dtype == scale_zero.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert packed.is_contiguous()
    assert scale_zero.is_contiguous()
    assert len(x) > 0, "a grid of no blocks: CUDA says invalid configuration argument"
    assert group in (32, 64, 128, 256)
    weight = unpack(packed)
    assert x.shape[1] == weight.shape[1]
    assert tuple(scale_zero.shape) == (x.shape[1] // group, len(weight), 2)
    scale, zero = scale_zero.float().repeat_interleave(group, 0).unbind(-1)  # [inputs, outputs]
    return (x.float() @ ((weight.t() - 8) * scale + zero).bfloat16().float()).bfloat16()


TWINS: dict[str, Callable[..., Any]] = {
    "aten::_scaled_dot_product_flash_attention": flash,
    "aten::_scaled_dot_product_efficient_attention": efficient,
    "aten::_convert_weight_to_int4pack": pack,
    "aten::_weight_int4pack_mm": int4_product,
}
