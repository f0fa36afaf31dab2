"""Decode attention in Triton: one new token a row over cached keys, int8 ones dequantized in the kernel.

Keys may be in several places (a prefix of many rows, a row's own slot), and long ones are split among programs; a last
kernel joins all parts by their log-sum-exp. Lengths are data: grids depend on shapes only. The plain twin is
`models/attention.py`.
"""

# B rows, H query heads, K key-value heads, G = H / K, D head channels, S keys, P parts, M rows of a tile

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 64  # of a step; FP32 has no matrix unit that keeps its precision, and takes fewer into registers
FP32_BLOCK_KEYS = 32
MIN_SPLIT = 128  # keys of a part, at least
PROGRAMS = 512  # that keep a large GPU busy: more parts are not made
MAX_SPLITS = 32
MIN_TILE, MAX_TILE = 16, 64  # query rows of one product, 16 in FP32


# Numbers that change from step to step, and rows of one tensor: a kernel is compiled once, whatever they are.
VARYING = ["num_splits", "num_parts", "first_part", "num_queries", "members"]
ROWS = ["places", "firsts", "ends"]


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Stored keys and values [P,K,S,*], and which of them row i sees: `first_B[i]` to `end_B[i]` of `place_B[i]`.

    `num_keys`: at least the greatest end. `is_shared`: all rows read the place of the first.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    place_B: Tensor
    first_B: Tensor
    end_B: Tensor
    num_keys: int
    is_shared: bool = False


@triton.jit
def _dequantized(
    codes_SD: tl.tensor, scale: tl.tensor, zero: tl.tensor, keys_S: tl.tensor, is_key: tl.tensor, dtype: tl.constexpr
) -> tl.tensor:
    """Rounded to the dtype of the model, as the plain cache is read."""
    zero_S = tl.load(zero + keys_S, mask=is_key, other=0.0).to(tl.float32)
    step_S = tl.load(scale + keys_S, mask=is_key, other=0.0).to(tl.float32)
    return ((codes_SD.to(tl.float32) - zero_S[:, None]) * step_S[:, None]).to(dtype)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS)
def _attend_heads(
    q: tl.tensor, k: tl.tensor, v: tl.tensor,
    k_scale: tl.tensor, k_zero: tl.tensor, v_scale: tl.tensor, v_zero: tl.tensor,
    places: tl.tensor, firsts: tl.tensor, ends: tl.tensor, out: tl.tensor, lse: tl.tensor,
    softmax_scale: tl.tensor, num_splits: tl.tensor, num_parts: tl.tensor, first_part: tl.tensor,
    q_row: tl.tensor, q_head: tl.tensor, kv_row: tl.tensor, kv_head: tl.tensor,
    scale_row: tl.tensor, scale_head: tl.tensor,
    dim: tl.constexpr, block_dim: tl.constexpr, block_keys: tl.constexpr, is_int8: tl.constexpr,
) -> None:  # fmt: skip
    """One query head, which alone has these keys."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    place = tl.load(places + row).to(tl.int64)
    first, end = tl.load(firsts + row).to(tl.int32), tl.load(ends + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end - first, num_splits), block_keys) * block_keys
    begin = first + split * share
    end = tl.minimum(begin + share, end)
    channels = tl.arange(0, block_dim)
    has_channel = channels < dim
    query_D = tl.load(q + row * q_row + head * q_head + channels, mask=has_channel, other=0.0)
    past, scales = place * kv_row + head * kv_head, place * scale_row + head * scale_head
    top, total = -float("inf"), 0.0
    sum_D = tl.zeros((block_dim,), tl.float32)
    for start in range(begin, end, block_keys):
        keys_S = start + tl.arange(0, block_keys)
        is_key = keys_S < end
        at_SD = past + keys_S[:, None] * dim + channels[None, :]
        mask_SD = is_key[:, None] & has_channel[None, :]
        key_SD, value_SD = tl.load(k + at_SD, mask=mask_SD, other=0), tl.load(v + at_SD, mask=mask_SD, other=0)
        if is_int8:
            key_SD = _dequantized(key_SD, k_scale + scales, k_zero + scales, keys_S, is_key, query_D.dtype)
            value_SD = _dequantized(value_SD, v_scale + scales, v_zero + scales, keys_S, is_key, query_D.dtype)
        score_S = tl.sum(query_D.to(tl.float32)[None, :] * key_SD.to(tl.float32), 1) * softmax_scale
        score_S = tl.where(is_key, score_S, -float("inf"))
        new_top = tl.maximum(top, tl.max(score_S, 0))
        weight_S, kept = tl.exp(score_S - new_top), tl.exp(top - new_top)
        total = total * kept + tl.sum(weight_S, 0)  # type: ignore[assignment]  # a plain number before the first block
        sum_D = sum_D * kept + tl.sum(weight_S[:, None] * value_SD.to(tl.float32), 0)
        top = new_top  # type: ignore[assignment]
    part = (row * num_heads + head) * num_parts + first_part + split
    is_empty = begin >= end
    divisor = tl.where(is_empty, 1.0, total)
    tl.store(out + part * dim + channels, sum_D / divisor, mask=has_channel)
    tl.store(lse + part, tl.where(is_empty, -float("inf"), top + tl.log(divisor)))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS)
def _attend_tiles(
    q: tl.tensor, k: tl.tensor, v: tl.tensor,
    k_scale: tl.tensor, k_zero: tl.tensor, v_scale: tl.tensor, v_zero: tl.tensor,
    places: tl.tensor, firsts: tl.tensor, ends: tl.tensor, out: tl.tensor, lse: tl.tensor,
    softmax_scale: tl.tensor, num_splits: tl.tensor, num_parts: tl.tensor, first_part: tl.tensor,
    num_queries: tl.tensor, group: tl.tensor, members: tl.tensor,
    q_row: tl.tensor, q_head: tl.tensor, kv_row: tl.tensor, kv_head: tl.tensor,
    scale_row: tl.tensor, scale_head: tl.tensor,
    dim: tl.constexpr, block_dim: tl.constexpr, block_keys: tl.constexpr, tile: tl.constexpr, is_int8: tl.constexpr,
) -> None:  # fmt: skip
    """`members` query rows that read the same keys: those of a key-value head in one row, or in all of them."""
    kv, split = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) * group
    lanes = tl.arange(0, tile)
    query_M = tl.program_id(0) * members + lanes
    is_query = (lanes < members) & (query_M < num_queries)
    row_M, head_M = query_M // group, kv * group + query_M % group
    place = tl.load(places + (tl.program_id(0) * members) // group).to(tl.int64)
    first_M = tl.load(firsts + row_M, mask=is_query, other=2147483647).to(tl.int32)
    end_M = tl.load(ends + row_M, mask=is_query, other=0).to(tl.int32)
    first, last = tl.min(first_M, 0), tl.max(end_M, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), num_splits), block_keys) * block_keys
    begin = first + split * share
    end = tl.minimum(begin + share, last)
    channels = tl.arange(0, block_dim)
    has_channel = channels < dim
    at_MD = row_M[:, None] * q_row + head_M[:, None] * q_head + channels[None, :]
    query_MD = tl.load(q + at_MD, mask=is_query[:, None] & has_channel[None, :], other=0.0)
    past, scales = place * kv_row + kv * kv_head, place * scale_row + kv * scale_head
    top_M = tl.full((tile,), -float("inf"), tl.float32)
    total_M = tl.zeros((tile,), tl.float32)
    sum_MD = tl.zeros((tile, block_dim), tl.float32)
    for start in range(begin, end, block_keys):
        keys_S = start + tl.arange(0, block_keys)
        is_key = keys_S < end
        at_SD = past + keys_S[:, None] * dim + channels[None, :]
        mask_SD = is_key[:, None] & has_channel[None, :]
        key_SD, value_SD = tl.load(k + at_SD, mask=mask_SD, other=0), tl.load(v + at_SD, mask=mask_SD, other=0)
        if is_int8:
            key_SD = _dequantized(key_SD, k_scale + scales, k_zero + scales, keys_S, is_key, query_MD.dtype)
            value_SD = _dequantized(value_SD, v_scale + scales, v_zero + scales, keys_S, is_key, query_MD.dtype)
        score_MS = tl.dot(query_MD, tl.trans(key_SD), input_precision="ieee") * softmax_scale
        is_seen = (keys_S[None, :] >= first_M[:, None]) & (keys_S[None, :] < end_M[:, None]) & is_key[None, :]
        score_MS = tl.where(is_seen, score_MS, -float("inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MS, 1))
        safe_M = tl.where(new_top_M == -float("inf"), 0.0, new_top_M)  # no key yet
        weight_MS, kept_M = tl.exp(score_MS - safe_M[:, None]), tl.exp(top_M - safe_M)
        total_M = total_M * kept_M + tl.sum(weight_MS, 1)
        sum_MD = sum_MD * kept_M[:, None]
        sum_MD = tl.dot(weight_MS.to(query_MD.dtype), value_SD, sum_MD, input_precision="ieee")
        top_M = new_top_M
    part_M = (row_M * num_heads + head_M) * num_parts + first_part + split
    is_empty_M = total_M == 0
    divisor_M = tl.where(is_empty_M, 1.0, total_M)
    found_MD = sum_MD / divisor_M[:, None]
    tl.store(out + part_M[:, None] * dim + channels[None, :], found_MD, mask=is_query[:, None] & has_channel[None, :])
    tl.store(lse + part_M, tl.where(is_empty_M, -float("inf"), top_M + tl.log(divisor_M)), mask=is_query)


@triton.jit(do_not_specialize=VARYING)
def _join(
    parts: tl.tensor, lses: tl.tensor, out: tl.tensor, lse: tl.tensor, num_parts: tl.tensor,
    block_parts: tl.constexpr, dim: tl.constexpr, block_dim: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    at_P, channels = tl.arange(0, block_parts), tl.arange(0, block_dim)
    is_part, has_channel = at_P < num_parts, channels < dim
    lse_P = tl.load(lses + row * num_parts + at_P, mask=is_part, other=-float("inf"))
    top = tl.max(lse_P, 0)
    weight_P = tl.exp(lse_P - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight_P, 0)
    at_PD = (row * num_parts + at_P)[:, None] * dim + channels[None, :]
    part_PD = tl.load(parts + at_PD, mask=is_part[:, None] & has_channel[None, :], other=0.0)
    sum_D = tl.sum(weight_P[:, None] * part_PD, 0)
    divisor = tl.where(total == 0, 1.0, total)
    tl.store(out + row * dim + channels, sum_D / divisor, mask=has_channel)
    tl.store(lse + row, tl.where(total == 0, -float("inf"), top + tl.log(divisor)))


def attend(q_BHD: Tensor, sources: Sequence[Keys]) -> tuple[Tensor, Tensor]:
    """Outputs [B,H,D] and log-sum-exp [B,H] fp32 over all keys that each row sees; 0 and -inf where it sees none."""
    batch, heads, dim = q_BHD.shape
    assert q_BHD.stride(2) == 1, "channels of a head lie behind one another"
    splits = [_num_splits(q_BHD, source) for source in sources]
    num_parts = sum(splits)
    dtype = q_BHD.dtype if num_parts == 1 else torch.float32
    parts = torch.empty(batch, heads, num_parts, dim, dtype=dtype, device=q_BHD.device)
    lses = torch.empty(batch, heads, num_parts, dtype=torch.float32, device=q_BHD.device)
    for i, (source, num_splits) in enumerate(zip(sources, splits)):
        _launch(q_BHD, source, parts, lses, num_splits, sum(splits[:i]))
    if num_parts == 1:
        return parts[:, :, 0], lses[:, :, 0]
    out = torch.empty(q_BHD.shape, dtype=q_BHD.dtype, device=q_BHD.device)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q_BHD.device)
    _join[(batch * heads,)](
        parts, lses, out, lse, num_parts,
        block_parts=triton.next_power_of_2(num_parts), dim=dim, block_dim=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out, lse


def _tile(batch: int, group: int, is_shared: bool, dtype: torch.dtype) -> tuple[int, int, int]:
    """(number of tiles, query rows in each, rows of its product)."""
    if not is_shared:
        return batch, group, max(MIN_TILE, triton.next_power_of_2(group))
    rows = batch * group
    most = MIN_TILE if dtype == torch.float32 else MAX_TILE
    tile = min(most, max(MIN_TILE, triton.next_power_of_2(rows)))
    return triton.cdiv(rows, tile), tile, tile


def _num_splits(q_BHD: Tensor, source: Keys) -> int:
    """Parts of the keys: more programs where few rows run, none of them with few keys."""
    (batch, heads, _), kv_heads = q_BHD.shape, source.k[0].shape[1]
    programs = _tile(batch, heads // kv_heads, source.is_shared, q_BHD.dtype)[0] * kv_heads
    return min(MAX_SPLITS, triton.cdiv(PROGRAMS, programs), triton.cdiv(source.num_keys, MIN_SPLIT))


def _launch(q: Tensor, source: Keys, parts: Tensor, lses: Tensor, num_splits: int, first_part: int) -> None:
    (batch, heads, num_parts, dim), codes = parts.shape, source.k[0]
    group, kv_heads = heads // codes.shape[1], codes.shape[1]
    assert codes.stride(2) == dim, "tokens of a head lie behind one another"
    is_int8 = len(source.k) == 3
    scales: tuple[Tensor, ...] = (*source.k[1:], *source.v[1:]) if is_int8 else (q,) * 4
    given = (
        q, codes, source.v[0], *scales, source.place_B, source.first_B, source.end_B, parts, lses,
        dim**-0.5, num_splits, num_parts, first_part,
    )  # fmt: skip
    strides = (q.stride(0), q.stride(1), codes.stride(0), codes.stride(1), scales[0].stride(0), scales[0].stride(1))
    sizes = {"dim": dim, "block_dim": triton.next_power_of_2(dim), "block_keys": BLOCK_KEYS, "is_int8": is_int8}
    if group == 1 and not source.is_shared:
        _attend_heads[(batch, heads, num_splits)](*given, *strides, **sizes)
        return
    num_tiles, members, tile = _tile(batch, group, source.is_shared, q.dtype)
    is_wide = q.dtype == torch.float32
    sizes["block_keys"] = FP32_BLOCK_KEYS if is_wide else BLOCK_KEYS
    _attend_tiles[(num_tiles, kv_heads, num_splits)](
        *given,
        batch * group,
        group,
        members,
        *strides,
        tile=tile,
        num_warps=8 if is_wide or tile == MAX_TILE else 4,
        num_stages=2,
        **sizes,
    )
