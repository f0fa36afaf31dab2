"""The GPTQ algorithm (Frantar et al., https://arxiv.org/abs/2210.17323) for one Linear at a time.

Columns are rounded one after the other; what a column loses is made good by the columns after it, weighted by the
inverse Hessian of the layer's inputs. Legend: N outputs, K inputs, G groups, R rows of calibration input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_eval.core import ModelError
from qwen_eval.models.quant import gptq

BLOCK = 128  # columns whose updates are applied to the rest in one product
MAX_DAMP_RAISES = 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The published recipe of Qwen's Int4 / Int8 checkpoints is the default. `damp` is a share of the mean diagonal."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damp: float = 0.01

    @property
    def config(self) -> gptq.GptqConfig:
        return gptq.GptqConfig(bits=self.bits, group_size=self.group_size, desc_act=self.desc_act, sym=self.sym)


class Hessian:
    """`2 / n` times the sum of outer products of the layer's inputs, in fp32 on the inputs' device."""

    def __init__(self, in_features: int) -> None:
        self.num_rows = 0
        self.sum_KK = torch.zeros(in_features, in_features)

    def add(self, x: Tensor) -> None:
        x_RK = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum_KK = self.sum_KK.to(x_RK.device).addmm_(x_RK.T, x_RK)
        self.num_rows += len(x_RK)

    @property
    def value(self) -> Tensor:
        return self.sum_KK * (2 / max(1, self.num_rows))


@dataclass(frozen=True)
class GptqResult:
    """Codes of one Linear, and the weight that any reader will make of them, fp32 [N, K]."""

    codes: gptq.Codes
    weight_NK: Tensor

    def rows(self, start: int, size: int, recipe: Recipe) -> dict[str, Tensor]:
        """The tensors to be written for the outputs `start` .. `start + size`, zero points less one (format v1)."""
        part = slice(start, start + size)
        return {
            "qweight": gptq.pack_rows(self.codes.q_KN[:, part], recipe.bits),
            "qzeros": gptq.pack_rows(self.codes.zero_GN[:, part].T - 1, recipe.bits).T.contiguous(),
            "scales": self.codes.scale_GN[:, part].contiguous(),
            "g_idx": self.codes.group_K.int(),
        }

    def tensors(self, recipe: Recipe) -> dict[str, Tensor]:
        return self.rows(0, len(self.weight_NK), recipe)


def quantize(weight_NK: Tensor, hessian_KK: Tensor, recipe: Recipe, *, name: str = "linear") -> GptqResult:
    """Quantize one weight against the Hessian of its inputs."""
    weight, hessian = weight_NK.detach().float().clone(), hessian_KK.float().clone()
    dead = hessian.diagonal() == 0  # inputs that were always zero: their weights cannot matter
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    num_inputs = weight.shape[1]
    order = torch.arange(num_inputs, device=weight.device)
    if recipe.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], recipe.damp, name)
    codes_NK, scale_GN, zero_GN = _round_columns(weight[:, order], factor, recipe)
    size = num_inputs if recipe.group_size == -1 else recipe.group_size
    group_K = torch.empty(num_inputs, dtype=torch.int64, device=weight.device)
    group_K[order] = torch.arange(num_inputs, device=weight.device) // size
    q_KN = torch.empty_like(codes_NK.T)
    q_KN[order] = codes_NK.T
    codes = gptq.Codes(q_KN, zero_GN, scale_GN, group_K)
    return GptqResult(codes, codes.weight)


def output_error(weight_NK: Tensor, quantized_NK: Tensor, hessian_KK: Tensor) -> float:
    """|x (Q - W)| / |x W| over the inputs that made the Hessian."""

    def energy(matrix_NK: Tensor) -> Tensor:
        return ((matrix_NK @ hessian_KK) * matrix_NK).sum().clamp_min(0)

    weight = weight_NK.float()
    return float((energy(quantized_NK - weight) / energy(weight).clamp_min(1e-30)).sqrt())


def _inverse_factor(hessian: Tensor, damp: float, name: str) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian; damping is raised tenfold until it exists."""
    mean = hessian.diagonal().mean()
    for raised in range(MAX_DAMP_RAISES):
        damped = hessian + torch.diag_embed((damp * 10**raised * mean).expand(len(hessian)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ModelError(
        f"{name}: the Hessian of its inputs cannot be inverted; use more calibration text or a larger damp"
    )


def _round_columns(weight_NK: Tensor, factor: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N, K], scales fp16 [G, N], zeros [G, N]) of the columns in the given order; `weight_NK` is used up.

    A group's scale is fitted when its first column is reached, on weights that carry the errors made before.
    """
    num_inputs = weight_NK.shape[1]
    size = num_inputs if recipe.group_size == -1 else recipe.group_size
    codes, scales, zeros = torch.empty_like(weight_NK, dtype=torch.int32), [], []
    for start in range(0, num_inputs, BLOCK):
        end = min(start + BLOCK, num_inputs)
        errors = torch.zeros_like(weight_NK[:, start:end])
        for i in range(start, end):
            if i % size == 0:
                # columns beyond this block do not carry its errors yet: bring them up to date for the fit
                group = weight_NK[:, i : i + size].clone()
                if i + size > end:
                    group[:, end - i :] -= errors @ factor[start:end, end : i + size]
                scale, zero = fit(group, recipe.bits, recipe.sym)
                scales.append(scale)
                zeros.append(zero)
            column = weight_NK[:, i]
            step = scale.float()
            codes[:, i] = torch.clamp(torch.round(column / step) + zero, 0, (1 << recipe.bits) - 1).int()
            error = (column - step * (codes[:, i] - zero)) / factor[i, i]
            weight_NK[:, i:end] -= torch.outer(error, factor[i, i:end])
            errors[:, i - start] = error
        weight_NK[:, end:] -= errors @ factor[start:end, end:]
    return codes, torch.stack(scales), torch.stack(zeros)


def fit(weight_Ng: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale (fp16) and zero point (int32), each [N], of one group. The range always holds 0.

    The scale is rounded to its stored width here, before it is used, so that the file holds the weights that were
    fitted. A group of zeros gets the range -1..1. Format v1 cannot store a zero point of 0: 1 is the least.
    """
    top = (1 << bits) - 1
    low, high = weight_Ng.amin(1).clamp_max(0), weight_Ng.amax(1).clamp_min(0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    is_flat = low == high
    low, high = low.masked_fill(is_flat, -1), high.masked_fill(is_flat, 1)
    scale = (high - low) / top
    zero = torch.full_like(scale, (top + 1) // 2) if sym else torch.round(-low / scale)
    scale = torch.where(zero < 1, high / (top - 1), scale)
    tiny = torch.finfo(torch.float16).smallest_normal
    return scale.clamp(tiny, torch.finfo(torch.float16).max).half(), zero.clamp(1, top).int()
