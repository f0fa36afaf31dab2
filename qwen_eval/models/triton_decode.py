"""Decode attention over a slot's own keys as one Triton kernel: int8 keys are dequantized in it, long ones are split.

Lengths are data: the grid depends on the batch, the heads and the splits only. The plain twin is `attention.partial`.
Needs the triton package; on a CPU it runs in the interpreter (TRITON_INTERPRET=1), for tests.
"""

# B rows, H query heads, K key-value heads, D head channels, S keys, P splits of the keys

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_eval.models.attention import partial
from qwen_eval.models.fused import fused

BLOCK_KEYS = 64
KEYS_PER_SPLIT = 512
MAX_SPLITS = 16


@triton.jit
def _split_attention(
    q: tl.tensor, k: tl.tensor, v: tl.tensor,
    k_scale: tl.tensor, k_zero: tl.tensor, v_scale: tl.tensor, v_zero: tl.tensor,
    places: tl.tensor, firsts: tl.tensor, ends: tl.tensor, out: tl.tensor, lse: tl.tensor,
    softmax_scale: tl.tensor, group: tl.tensor, num_splits: tl.tensor,
    q_row: tl.tensor, q_head: tl.tensor, kv_row: tl.tensor, kv_head: tl.tensor,
    scale_row: tl.tensor, scale_head: tl.tensor,
    dim: tl.constexpr, block_dim: tl.constexpr, block_keys: tl.constexpr, is_int8: tl.constexpr,
) -> None:  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    place = tl.load(places + row).to(tl.int64)
    first, length = tl.load(firsts + row).to(tl.int32), tl.load(ends + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length - first, num_splits), block_keys) * block_keys
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    channels = tl.arange(0, block_dim)
    has_channel = channels < dim
    query_D = tl.load(q + row * q_row + head * q_head + channels, mask=has_channel, other=0.0)
    past = place * kv_row + (head // group) * kv_head
    scales = place * scale_row + (head // group) * scale_head
    top, total = -float("inf"), 0.0
    sum_D = tl.zeros((block_dim,), tl.float32)
    for start in range(begin, end, block_keys):
        keys_S = start + tl.arange(0, block_keys)
        is_key = keys_S < end
        at_SD = past + keys_S[:, None] * dim + channels[None, :]
        mask_SD = is_key[:, None] & has_channel[None, :]
        key_SD = tl.load(k + at_SD, mask=mask_SD, other=0).to(tl.float32)
        value_SD = tl.load(v + at_SD, mask=mask_SD, other=0).to(tl.float32)
        if is_int8:  # rounded to the dtype of the model, as the plain cache is read
            zero_S = tl.load(k_zero + scales + keys_S, mask=is_key, other=0.0).to(tl.float32)
            step_S = tl.load(k_scale + scales + keys_S, mask=is_key, other=0.0).to(tl.float32)
            key_SD = ((key_SD - zero_S[:, None]) * step_S[:, None]).to(query_D.dtype).to(tl.float32)
            zero_S = tl.load(v_zero + scales + keys_S, mask=is_key, other=0.0).to(tl.float32)
            step_S = tl.load(v_scale + scales + keys_S, mask=is_key, other=0.0).to(tl.float32)
            value_SD = ((value_SD - zero_S[:, None]) * step_S[:, None]).to(query_D.dtype).to(tl.float32)
        score_S = tl.sum(query_D.to(tl.float32)[None, :] * key_SD, 1) * softmax_scale
        score_S = tl.where(is_key, score_S, -float("inf"))
        new_top = tl.maximum(top, tl.max(score_S, 0))
        weight_S, kept = tl.exp(score_S - new_top), tl.exp(top - new_top)
        total = total * kept + tl.sum(weight_S, 0)  # type: ignore[assignment]  # a plain number before the first block
        sum_D = sum_D * kept + tl.sum(weight_S[:, None] * value_SD, 0)
        top = new_top  # type: ignore[assignment]
    part = (row * num_heads + head) * num_splits + split
    is_any = end > begin
    tl.store(out + part * dim + channels, sum_D / tl.where(is_any, total, 1.0), mask=has_channel)
    tl.store(lse + part, tl.where(is_any, top + tl.log(tl.where(is_any, total, 1.0)), -float("inf")))


def attend_rows(
    q_BHD: Tensor,
    k: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    place_B: Tensor,
    first_B: Tensor,
    end_B: Tensor,
    num_keys: int,
) -> tuple[Tensor, Tensor]:
    """Outputs [B,H,D] and log-sum-exp [B,H] of one new token a row over the keys `first_B` to `end_B` of `place_B`.

    `k`, `v`: stored tensors [P,K,S,*] as their codec keeps them, plain or (codes, scale, zero). A row without keys gets
    0 and -inf. `num_keys`: at least the longest `end_B`.
    """
    batch, heads, dim = q_BHD.shape
    is_int8 = len(k) == 3
    num_splits = min(MAX_SPLITS, -(-num_keys // KEYS_PER_SPLIT))
    out = torch.empty(batch, heads, num_splits, dim, dtype=torch.float32, device=q_BHD.device)
    lse = torch.empty(batch, heads, num_splits, dtype=torch.float32, device=q_BHD.device)
    scales: tuple[Tensor, ...] = (k[1], k[2], v[1], v[2]) if is_int8 else (q_BHD,) * 4
    codes, scale = k[0], scales[0]
    assert q_BHD.stride(2) == 1, "channels of a head lie behind one another"
    assert codes.stride(2) == dim, "tokens of a head lie behind one another"
    _split_attention[(batch, heads, num_splits)](
        q_BHD, codes, v[0], *scales, place_B, first_B, end_B, out, lse,
        dim**-0.5, heads // codes.shape[1], num_splits,
        q_BHD.stride(0), q_BHD.stride(1), codes.stride(0), codes.stride(1), scale.stride(0), scale.stride(1),
        dim=dim, block_dim=triton.next_power_of_2(dim), block_keys=BLOCK_KEYS, is_int8=is_int8,
    )  # fmt: skip
    joined_BH = lse.logsumexp(-1)
    return _joined(out, lse, joined_BH).to(q_BHD.dtype), joined_BH


def attend_own(
    q_BHD: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...], own_B: Tensor, num_keys: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """`attend_rows` over the first `own_B + 1` keys of each row's own slot."""
    end_B = own_B + 1
    first_B = torch.zeros_like(end_B) if window is None else (end_B - window).clamp(min=0)
    return attend_rows(q_BHD, k, v, torch.arange(len(q_BHD), device=q_BHD.device), first_B, end_B, num_keys)


@fused
def _joined(out_BHPD: Tensor, lse_BHP: Tensor, joined_BH: Tensor) -> Tensor:
    share_BHP = (lse_BHP - joined_BH[..., None].clamp(min=torch.finfo(torch.float32).min)).exp()
    return (out_BHPD * share_BHP[..., None]).sum(2)


def why_not(device: torch.device, dtype: torch.dtype, *, heads: int, kv_heads: int, dim: int) -> str | None:
    """Why this kernel is not used here: it is tried once against its plain twin. None where it is right."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}"
    own_B = torch.tensor([0, 70], device=device)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 80, dim, generator=draw).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    mask = torch.arange(80, device=device) <= own_B[:, None]
    try:
        found, _ = attend_own(q[:, :, 0].contiguous(), (k,), (v,), own_B, 80, None)
    except Exception as error:  # a compiler's, a driver's: each has classes of its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    wanted, _ = partial(q[:, :, :1], k, v, mask=mask[:, None, None, :], kernel="eager")
    difference = float((found.float() - wanted[:, :, 0].float()).abs().max())
    return None if difference < (1e-4 if dtype == torch.float32 else 5e-2) else f"off by {difference:.2g}"
