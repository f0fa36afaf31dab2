"""The Qwen v1 block in its plainest trainable form, with the tensor names of the published checkpoints.

Small on purpose: no cache, no padding, one full-length causal forward. `qwen_eval` reads what it writes through its
ordinary loader, and the tests hold the two forwards against each other.
"""

# B batch, T tokens, D hidden, H heads, K head dim, V vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Shape:
    """`mlp_size` is the width of one MLP branch; config.json says twice that."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 3
    head_size: int = 32
    mlp_size: int = 512
    seq_length: int = 256
    rotary_base: float = 10000.0

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_size


def ntk_alpha(length: int, seq_length: int) -> float:
    """Qwen's dynamic NTK factor: 1 up to the training length, then 3, 7, 15 for every doubling."""
    return max(2.0 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1.0)


def rotary_table(length: int, head_size: int, base: float, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, head_size], fp32."""
    base = base * alpha ** (head_size / (head_size - 2))
    inverse = base ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat((-second, first), dim=-1) * sin_TK


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.c_attn = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)  # q | k | v, the only bias of the model
        self.c_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, logn_T: Tensor | None) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (part.view(B, T, self.num_heads, -1).transpose(1, 2) for part in self.c_attn(x_BTD).split(D, dim=-1))
        q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        if logn_T is not None:
            q = q * logn_T[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(B, T, D))
        return projected


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.w2 = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)  # the gate, despite its name
        self.c_proj = nn.Linear(shape.mlp_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.w1(x) * F.silu(self.w2(x)))
        return out


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(shape.hidden_size)
        self.attn = Attention(shape)
        self.ln_2 = RMSNorm(shape.hidden_size)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin, logn)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Qwen(nn.Module):
    """`state_dict()` has the names and shapes of a published Qwen v1 checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "h": nn.ModuleList(Block(shape) for _ in range(shape.num_layers)),
                "ln_f": RMSNorm(shape.hidden_size),
            }
        )
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)

    def hidden(self, ids_BT: Tensor, *, alpha: float = 1.0, logn: bool = False) -> Tensor:
        """Final normalised states [B, T, D]. `alpha` and `logn` are Qwen's tricks for long inputs."""
        T, shape = ids_BT.shape[1], self.shape
        cos, sin = rotary_table(T, shape.head_size, shape.rotary_base, alpha)
        factors = None
        if logn and shape.seq_length < T:
            factors = (torch.arange(1, T + 1).float().log() / math.log(shape.seq_length)).clamp(min=1.0)
        x: Tensor = self.transformer["wte"](ids_BT)
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x, cos, sin, factors)
        out: Tensor = self.transformer["ln_f"](x)
        return out

    def forward(self, ids_BT: Tensor, *, alpha: float = 1.0, logn: bool = False) -> Tensor:
        logits: Tensor = self.lm_head(self.hidden(ids_BT, alpha=alpha, logn=logn))
        return logits
