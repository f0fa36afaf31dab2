"""Attention over a past and its own tokens, joined by log-sum-exp: one primitive for scoring, prefill and decode.

`partial` computes softmax(q k^T / sqrt(D)) v over one set of keys and the log-sum-exp of its scores; `merge` joins two
such results into the attention over the union of the keys (exact up to rounding). So a prefix that many sequences
share is attended to once, as one dense product, and chunks of a long prefill are causal by construction.
"""

# B sequences, H query heads, K key-value heads, G = H / K, T queries, S keys, D head channels

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_eval.core import ConfigError
from qwen_eval.models.fused import joined


def partial(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, causal: bool = False, mask: Tensor | None = None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Attention output [B,H,T,D] and log-sum-exp [B,H,T] fp32 over these keys.

    `causal` needs T == S. `mask` [B|1, 1, T|1, S] bool, True = attend; a query without any key gets output 0, lse -inf.
    `kernel`: "eager" (the plain twin) or "fused".
    """
    group = q_BHTD.shape[1] // k_BKSD.shape[1]
    if kernel == "eager":
        return _eager(q_BHTD, _repeat(k_BKSD, group), _repeat(v_BKSD, group), causal, mask)
    if group > 1 and not causal and (mask is None or mask.shape[2] == 1):
        return _folded(q_BHTD, k_BKSD, v_BKSD, mask, group)
    return _fused(q_BHTD, _repeat(k_BKSD, group), _repeat(v_BKSD, group), causal, mask)


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """The attention over both sets of keys, in the dtype of the outputs."""
    return joined(*a, *b)


def _repeat(x_BKSD: Tensor, group: int) -> Tensor:
    return x_BKSD if group == 1 else x_BKSD.repeat_interleave(group, dim=1)


def _folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """Grouped heads as further query rows of their key-value head: no copy of the keys."""
    batch, heads, rows, dim = q.shape
    out, lse = _fused(q.reshape(batch, heads // group, group * rows, dim), k, v, False, mask)
    return out.reshape(batch, heads, rows, dim), lse.reshape(batch, heads, rows)


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores: Tensor = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(torch.float32).min).unsqueeze(-1))
    return weights.to(v.dtype) @ v, lse


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return _cpu(q, k, v, causal, mask)
    is_flash = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and _has_flash(q.device)
    if is_flash and mask is None:
        return _cuda_flash(q, k, v, causal)
    return _cuda_efficient(q, k, v, causal, mask)


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        bias = bias.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = _pair(flash(q, k, v, 0.0, causal, attn_mask=bias))
    if mask is None:
        return out, lse.float()
    return out, lse.float().masked_fill(~mask.any(-1), float("-inf"))  # the kernel says 0 where there is no key


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """GPUs before Ampere (T4, V100) have the other kernel only."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = _pair(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False))
    return out, lse.float()[..., : q.shape[2]]


def _cuda_efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    bias = None
    if mask is not None:
        # the kernel wants rows aligned to 8 elements: pad the keys' axis of the storage, not of the view; heads, and
        # rows that see the same, share what is in memory once
        keys = k.shape[2]
        bias = torch.zeros((*mask.shape[:3], (keys + 7) // 8 * 8), dtype=q.dtype, device=q.device)[..., :keys]
        bias = bias.masked_fill_(~mask, float("-inf")).expand(*q.shape[:3], keys)
    out, lse = _pair(torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal))
    return out, lse.float()[..., : q.shape[2]]


def _pair(results: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp, which every kernel gives first."""
    return results[0], results[1]


def choose_kernel(attention: str, device: torch.device) -> str:
    """The kernel behind `model.attention`: auto and sdpa take the fused one, flash needs CUDA, eager is the twin."""
    if attention == "flash" and device.type != "cuda":
        raise ConfigError("model.attention=flash needs a CUDA device; use sdpa (also fused on CPU) or auto")
    return "eager" if attention == "eager" else "fused"
