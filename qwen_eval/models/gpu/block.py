"""Small kernels of a block: norm with its residual, SiLU product, heads turned to their positions, cache writes.

One pass over memory each, where torch would make several. Values are rounded where the plain twins in `models/fused.py`
and `models/kv_quant.py` round them: in bf16 the order of rounding is part of the model.
"""

# N tokens, H heads, K key-value heads, D head channels, R half of the rotary dimension, E hidden size, B rows

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_eval.models.kv_quant import Quantized

Norm = tuple[Tensor, float]  # weight and eps
BLOCK = 1024  # elements of a program that works element by element
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no room for a fraction, so the sum is rounded to even
LEVELS = 255


def num_warps(block: int) -> int:
    """A power of two, as `block` is: 8 elements a thread."""
    return min(max(block // 256, 1), 16)


@triton.jit
def _norm(
    x: tl.tensor, delta: tl.tensor, weight: tl.tensor, total: tl.tensor, out: tl.tensor,
    eps: tl.tensor, heads: tl.tensor, x_row: tl.tensor, x_head: tl.tensor,
    size: tl.constexpr, block: tl.constexpr, has_delta: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    is_in = at < size
    value = tl.load(x + (row // heads) * x_row + (row % heads) * x_head + at, mask=is_in, other=0.0)
    if has_delta:
        more = tl.load(delta + row * size + at, mask=is_in, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(total + row * size + at, value, mask=is_in)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * inverse).to(value.dtype).to(tl.float32)
    scale = tl.load(weight + at, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, (normed * scale).to(value.dtype), mask=is_in)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., E], over the last dimension."""
    x_NHE = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
    assert x_NHE.stride(2) == 1, "channels lie behind one another"
    num, heads, size = x_NHE.shape
    block = triton.next_power_of_2(size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _norm[(num * heads,)](
            x_NHE, x_NHE, weight, x_NHE, out, eps, heads, x_NHE.stride(0), x_NHE.stride(1),
            size=size, block=block, has_delta=False, num_warps=num_warps(block),
        )  # fmt: skip
    return out


def add_rms_norm(x_NE: Tensor, delta_NE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its norm."""
    num, size = x_NE.shape
    block = triton.next_power_of_2(size)
    x_NE, delta_NE = x_NE.contiguous(), delta_NE.contiguous()
    total, out = torch.empty_like(x_NE), torch.empty_like(x_NE)
    if num:
        _norm[(num,)](
            x_NE, delta_NE, weight_E, total, out, eps, 1, size, 0,
            size=size, block=block, has_delta=True, num_warps=num_warps(block),
        )  # fmt: skip
    return total, out


@triton.jit(do_not_specialize=["count"])
def _silu_product(gate: tl.tensor, up: tl.tensor, count: tl.tensor, block: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_in = at < count
    value = tl.load(gate + at, mask=is_in, other=0.0)
    wide = value.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(value.dtype).to(tl.float32)
    tl.store(gate + at, (opened * tl.load(up + at, mask=is_in, other=0.0).to(tl.float32)).to(value.dtype), mask=is_in)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the gate's memory."""
    gate, up = gate.contiguous(), up.contiguous()
    if gate.numel():
        _silu_product[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, gate.numel(), block=BLOCK)
    return gate


@triton.jit
def _turned(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, logn: tl.tensor, weight: tl.tensor, eps: tl.tensor,
    token: tl.tensor, at: tl.tensor,
    dim: tl.constexpr, half: tl.constexpr, has_norm: tl.constexpr, has_logn: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One head [D] at `x`, normed, turned and stretched; 0 beyond its channels."""
    is_in, is_turned, is_first = at < dim, at < 2 * half, at < half
    other = tl.where(is_first, at + half, tl.where(is_turned, at - half, at))
    pair = tl.where(is_first, at, at - half)
    own = tl.load(x + at, mask=is_in, other=0.0)
    dtype = own.dtype
    a, b = own.to(tl.float32), tl.load(x + other, mask=is_in, other=0.0).to(tl.float32)
    if has_norm:
        inverse = tl.rsqrt(tl.sum(a * a, 0) / dim + eps)
        scale_a = tl.load(weight + at, mask=is_in, other=0.0).to(tl.float32)
        scale_b = tl.load(weight + other, mask=is_in, other=0.0).to(tl.float32)
        a = ((a * inverse).to(dtype).to(tl.float32) * scale_a).to(dtype).to(tl.float32)
        b = ((b * inverse).to(dtype).to(tl.float32) * scale_b).to(dtype).to(tl.float32)
    c = tl.load(cos + token * half + pair, mask=is_turned, other=1.0)
    s = tl.load(sin + token * half + pair, mask=is_turned, other=0.0)
    value = (a * c + tl.where(is_first, -b, b) * s).to(dtype)
    if has_logn:
        value = (value.to(tl.float32) * tl.load(logn + token)).to(dtype)
    return value


@triton.jit
def _turn(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, logn: tl.tensor, weight: tl.tensor, out: tl.tensor,
    eps: tl.tensor, heads: tl.tensor, x_row: tl.tensor, x_head: tl.tensor,
    dim: tl.constexpr, block: tl.constexpr, half: tl.constexpr, has_norm: tl.constexpr, has_logn: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // heads, row % heads
    at = tl.arange(0, block)
    source = x + token * x_row + head * x_head
    value = _turned(source, cos, sin, logn, weight, eps, token, at, dim, half, has_norm, has_logn)
    tl.store(out + row * dim + at, value, mask=at < dim)


def turn(
    x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, logn_N: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    """[N,H,D]: heads normed where there is a norm, turned, stretched where there are factors."""
    num, heads, dim = x_NHD.shape
    assert x_NHD.stride(2) == 1, "channels of a head lie behind one another"
    out = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    if out.numel():
        _turn[(num * heads,)](
            x_NHD, cos_NR, sin_NR, _or(logn_N, cos_NR), norm[0] if norm else x_NHD, out,
            norm[1] if norm else 0.0, heads, x_NHD.stride(0), x_NHD.stride(1),
            dim=dim, block=triton.next_power_of_2(dim), half=cos_NR.shape[1],
            has_norm=norm is not None, has_logn=logn_N is not None, num_warps=1,
        )  # fmt: skip
    return out


@triton.jit
def _keep(
    value: tl.tensor, codes: tl.tensor, scale: tl.tensor, zero: tl.tensor, place: tl.tensor, scale_place: tl.tensor,
    grow: tl.tensor, at: tl.tensor, dim: tl.constexpr, is_int8: tl.constexpr,
) -> None:  # fmt: skip
    """A head [D], 0 beyond its channels, to its place: as it is, or as `quantize_per_token` makes it."""
    if is_int8:
        wide = value.to(tl.float32)
        low, high = tl.minimum(tl.min(wide, 0), 0.0), tl.maximum(tl.max(wide, 0), 0.0)
        step = (tl.div_rn(high - low, 254.0) * grow).to(value.dtype)
        step = tl.where(step == 0, 1.0, step.to(tl.float32))
        middle = (tl.div_rn(-low, step) + ROUNDER) - ROUNDER
        rounded = (tl.div_rn(wide, step) + ROUNDER) - ROUNDER
        code = tl.minimum(tl.maximum(rounded + middle, 0.0), 255.0)
        tl.store(codes + place * dim + at, code.to(tl.uint8), mask=at < dim)
        tl.store(scale + scale_place, step.to(value.dtype))
        tl.store(zero + scale_place, middle.to(value.dtype))
    else:
        tl.store(codes + place * dim + at, value, mask=at < dim)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _turn_and_keep(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, logn: tl.tensor, q_weight: tl.tensor, k_weight: tl.tensor,
    positions: tl.tensor, q_out: tl.tensor,
    k: tl.tensor, k_scale: tl.tensor, k_zero: tl.tensor, v: tl.tensor, v_scale: tl.tensor, v_zero: tl.tensor,
    eps: tl.tensor, grow: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, qkv_row: tl.tensor, qkv_head: tl.tensor,
    kv_row: tl.tensor, kv_head: tl.tensor, scale_row: tl.tensor, scale_head: tl.tensor,
    dim: tl.constexpr, block: tl.constexpr, half: tl.constexpr,
    has_norm: tl.constexpr, has_logn: tl.constexpr, is_int8: tl.constexpr,
) -> None:  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, block)
    source = qkv + row * qkv_row + head * qkv_head
    position = tl.load(positions + row).to(tl.int64)
    if head < heads:
        value = _turned(source, cos, sin, logn, q_weight, eps, row, at, dim, half, has_norm, has_logn)
        tl.store(q_out + (row * heads + head) * dim + at, value, mask=at < dim)
    elif head < heads + kv_heads:
        own = head - heads
        value = _turned(source, cos, sin, logn, k_weight, eps, row, at, dim, half, has_norm, False)
        place, small = row * kv_row + own * kv_head + position, row * scale_row + own * scale_head + position
        _keep(value, k, k_scale, k_zero, place, small, grow, at, dim, is_int8)
    else:
        own = head - heads - kv_heads
        value = tl.load(source + at, mask=at < dim, other=0.0)
        place, small = row * kv_row + own * kv_head + position, row * scale_row + own * scale_head + position
        _keep(value, v, v_scale, v_zero, place, small, grow, at, dim, is_int8)


def turn_and_keep(
    qkv_BHD: Tensor,
    cos_BR: Tensor,
    sin_BR: Tensor,
    logn_B: Tensor | None,
    norms: tuple[Norm, Norm] | None,
    position_B: Tensor,
    k: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
) -> Tensor:
    """Turned queries [B,H,D]; the keys, turned, and the values of row i go to `position_B[i]` of place i.

    `qkv_BHD` [B,H+2K,D], `norms` of queries and keys; `k`, `v` stored tensors [P,K,S,*], plain or (codes, scale, zero).
    """
    (batch, all_heads, dim), kv_heads = qkv_BHD.shape, k[0].shape[1]
    num_queries = all_heads - 2 * kv_heads
    assert qkv_BHD.stride(2) == 1, "channels of a head lie behind one another"
    assert k[0].stride(2) == v[0].stride(2) == dim, "tokens of a head lie behind one another"
    q_out = torch.empty(batch, num_queries, dim, dtype=qkv_BHD.dtype, device=qkv_BHD.device)
    is_int8 = len(k) == 3
    k_scale, k_zero, v_scale, v_zero = (*k[1:], *v[1:]) if is_int8 else (qkv_BHD,) * 4
    (q_weight, eps), (k_weight, _) = norms or ((qkv_BHD, 0.0),) * 2
    # strides in tokens: a token's place times D is where its channels begin, and its place where its scale is
    _turn_and_keep[(batch, all_heads)](
        qkv_BHD, cos_BR, sin_BR, _or(logn_B, cos_BR), q_weight, k_weight,
        position_B, q_out, k[0], k_scale, k_zero, v[0], v_scale, v_zero,
        eps, _grow(qkv_BHD.dtype), num_queries, kv_heads, qkv_BHD.stride(0), qkv_BHD.stride(1),
        k[0].stride(0) // dim, k[0].stride(1) // dim, k_scale.stride(0), k_scale.stride(1),
        dim=dim, block=triton.next_power_of_2(dim), half=cos_BR.shape[1],
        has_norm=norms is not None, has_logn=logn_B is not None, is_int8=is_int8, num_warps=1,
    )  # fmt: skip
    return q_out


@triton.jit(do_not_specialize=["tokens"])
def _quantize(
    x: tl.tensor, codes: tl.tensor, scale: tl.tensor, zero: tl.tensor,
    grow: tl.tensor, tokens: tl.tensor, x_head: tl.tensor, x_token: tl.tensor,
    dim: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    source = x + (row // tokens) * x_head + (row % tokens) * x_token
    value = tl.load(source + at, mask=at < dim, other=0.0)
    _keep(value, codes, scale, zero, row, row, grow, at, dim, True)


def quantize(x_BKSD: Tensor) -> Quantized:
    """`quantize_per_token`: codes uint8 [B,K,S,D], scale and zero [B,K,S,1]."""
    x_GSD = x_BKSD.flatten(0, 1)
    (groups, tokens, dim), shape = x_GSD.shape, x_BKSD.shape
    assert x_GSD.stride(2) == 1, "channels of a head lie behind one another"
    codes = torch.empty(shape, dtype=torch.uint8, device=x_BKSD.device)
    scale, zero = (torch.empty((*shape[:-1], 1), dtype=x_BKSD.dtype, device=x_BKSD.device) for _ in range(2))
    if codes.numel():
        _quantize[(groups * tokens,)](
            x_GSD, codes, scale, zero, _grow(x_BKSD.dtype), tokens, x_GSD.stride(0), x_GSD.stride(1),
            dim=dim, block=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return Quantized(codes, scale, zero)


@triton.jit
def _joined(
    a: tl.tensor, lse_a: tl.tensor, b: tl.tensor, lse_b: tl.tensor, out: tl.tensor, heads: tl.tensor,
    a_row: tl.tensor, a_head: tl.tensor, b_row: tl.tensor, b_head: tl.tensor,
    la_row: tl.tensor, la_head: tl.tensor, lb_row: tl.tensor, lb_head: tl.tensor,
    dim: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // heads, row % heads
    at = tl.arange(0, block)
    value_a = tl.load(a + token * a_row + head * a_head + at, mask=at < dim, other=0.0)
    wide_a = value_a.to(tl.float32)
    wide_b = tl.load(b + token * b_row + head * b_head + at, mask=at < dim, other=0.0).to(tl.float32)
    more = tl.load(lse_b + token * lb_row + head * lb_head) - tl.load(lse_a + token * la_row + head * la_head)
    weight = 1.0 / (1.0 + tl.exp(-more))
    step = wide_b - wide_a
    value = tl.where(weight < 0.5, wide_a + weight * step, wide_b - step * (1.0 - weight))
    tl.store(out + row * dim + at, value.to(value_a.dtype), mask=at < dim)


def joined(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """[N,H,D] of two parts [N,H,D] with their log-sum-exp [N,H]."""
    num, heads, dim = out_a.shape
    assert out_a.stride(2) == out_b.stride(2) == 1, "channels of a head lie behind one another"
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    if out.numel():
        _joined[(num * heads,)](
            out_a, lse_a, out_b, lse_b, out, heads, *out_a.stride()[:2], *out_b.stride()[:2],
            *lse_a.stride(), *lse_b.stride(), dim=dim, block=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return out


def _grow(dtype: torch.dtype) -> float:
    """What keeps a stored scale from being rounded down."""
    return 1 + float(torch.finfo(dtype).eps)


def _or(x: Tensor | None, filler: Tensor) -> Tensor:
    """A kernel takes a tensor in every place; one it does not read can be any."""
    return filler if x is None else x
