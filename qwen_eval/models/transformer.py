"""The Qwen block, all dense generations, over packed tokens.

The model never sees batches, padding, caches or masks: it turns N packed tokens into N hidden states, and asks an
`Attend` (see kv_cache.py) for the attention of each layer. So scoring, chunked prefill and decoding share this file.
"""

# N tokens, H query heads, K key-value heads, D head channels, E hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from qwen_eval.models.block import block_linears
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.dense import Linear
from qwen_eval.models.fused import Norm, add_rms_norm, rms_norm, silu_product
from qwen_eval.models.heads import Heads
from qwen_eval.models.rope import Rotation

MakeLinear = Callable[[str, int, int, bool], nn.Module]  # (name, in features, out features, bias)


class Attend(Protocol):
    def __call__(self, layer: int, heads: Heads) -> Tensor:
        """Attention outputs [Q,H,D] of the queries; keys and values of this forward's tokens are stored on the way."""
        ...


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: weights are loaded, and drawing them on the meta device imports torch's compiler (2 to 6 s)."""


def dense_linear(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
    return Linear(in_features, out_features, bias=bias)


class RMSNorm(nn.Module):
    """Normalised in fp32, cast back, then weighted (the order of the original; it matters in bf16)."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Residual:
    """What blocks add to: the sum so far, and the last part, which is added in one pass with the next norm.

    Nothing else holds the two tensors, so that each is freed as soon as it is added.
    """

    def __init__(self, x_NE: Tensor) -> None:
        self.x_NE = x_NE
        self.delta_NE: Tensor | None = None

    @property
    def whole_NE(self) -> Tensor:
        return self.x_NE if self.delta_NE is None else self.x_NE + self.delta_NE

    def normed(self, norm: RMSNorm) -> Tensor:
        if self.delta_NE is None:
            return norm(self.x_NE)
        self.x_NE, normed_NE = add_rms_norm(self.x_NE, self.delta_NE, norm.weight, norm.eps)
        self.delta_NE = None
        return normed_NE

    def add(self, delta_NE: Tensor) -> None:
        self.x_NE, self.delta_NE = self.whole_NE, delta_NE

    def keep(self, rows: Tensor) -> None:
        self.x_NE, self.delta_NE = self.whole_NE[rows], None

    def move(self, device: torch.device) -> None:
        self.x_NE, self.delta_NE = moved(self.whole_NE, device), None


class SplitLinear(nn.Module):
    """q, k and v as separate (quantized) linears, concatenated."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def _made(config: ModelConfig, block: str, names: Sequence[str], make_linear: MakeLinear) -> list[nn.Module]:
    """The Linears of a block ("layers.3") as `block.py` describes them."""
    shapes = [block_linears(config)[name].shape for name in names]
    return [make_linear(f"{block}.{n}", s.inputs, s.outputs, s.bias) for n, s in zip(names, shapes)]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, name: str, make_linear: MakeLinear) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv, self.o = _made(config, name, ("attn.qkv", "attn.o"), make_linear)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_NE: Tensor, layer: int, rotation: Rotation, attend: Attend, rows: Tensor | None) -> Tensor:
        qkv_NHD: Tensor = self.qkv(x_NE).view(len(x_NE), -1, self.dim)
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = Norm(self.q_norm.weight, self.q_norm.eps), Norm(self.k_norm.weight, self.k_norm.eps)
        heads = Heads(
            qkv_NHD=qkv_NHD,
            num_queries=self.heads,
            num_keys=self.kv_heads,
            rotation=rotation,
            norms=norms,
            rows=rows,
        )
        out: Tensor = self.o(attend(layer, heads).flatten(1))
        return out


class MLP(nn.Module):
    """down(up(x) * silu(gate(x))); in v1's names up is w1 and the gate is w2."""

    def __init__(self, config: ModelConfig, name: str, make_linear: MakeLinear) -> None:
        super().__init__()
        self.up, self.gate, self.down = _made(config, name, ("mlp.up", "mlp.gate", "mlp.down"), make_linear)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(silu_product(self.gate(x), self.up(x)))
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig, name: str, make_linear: MakeLinear) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config, name, make_linear)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, name, make_linear)

    def forward(
        self, residual: Residual, layer: int, rotation: Rotation, attend: Attend, rows: Tensor | None
    ) -> Residual:
        """Add attention and MLP to `residual`, for `rows` only if they are given."""
        mixed: Tensor = self.attn(residual.normed(self.attn_norm), layer, rotation, attend, rows)
        if rows is not None:
            residual.keep(rows)
        residual.add(mixed)
        del mixed
        residual.add(self.mlp(residual.normed(self.mlp_norm)))
        return residual


def moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, which is the current one from now on: Triton launches its kernels there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return x.to(device)


class Transformer(nn.Module):
    """Embeddings, blocks, final norm and head. Inference only; built on any device, weights loaded by checkpoint.py."""

    def __init__(self, config: ModelConfig, make_linear: MakeLinear = dense_linear) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, f"layers.{i}", make_linear) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._moves: dict[int, torch.device] = {}

    def settled(self) -> Transformer:
        """In inference mode, once its weights are loaded; notes where hidden states go from one device to another.

        On CUDA a forward starts on the device of its layers: another model may have been there since.
        """
        moves = {i: there for i, (here, there) in enumerate(pairwise(self.places)) if here != there}
        self._moves = {0: self.places[1], **moves} if moves or self.device.type == "cuda" else {}
        return self.eval().requires_grad_(False)

    @property
    def places(self) -> tuple[torch.device, ...]:
        """The device of the embeddings, of each layer, of the norm, of the head."""
        return (self.device, *self.layer_devices, self.norm.weight.device, self.head.weight.device)

    @property
    def device(self) -> torch.device:
        """That of the tokens: of the embeddings."""
        return self.embed.weight.device

    @property
    def head_device(self) -> torch.device:
        """That of the hidden states that a forward gives."""
        where: torch.device = self.head.weight.device
        return where

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        return tuple(block.get_parameter("attn_norm.weight").device for block in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def forward(
        self, ids_N: Tensor, rotations: Sequence[Rotation], attend: Attend, last_rows: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [N,E] after the last norm, or [len(last_rows),E] of those tokens only; beside the head.

        Layers may lie on several devices; what `rotations` and `attend` hold for a layer lies on its device.
        Naming the rows saves the last layer's queries, attention and MLP for all others; keys and values of every
        token are always made.
        """
        residual = Residual(self.embed(ids_N))
        for i, block in enumerate(self.layers):
            if i in self._moves:
                residual.move(self._moves[i])
            block(residual, i, rotations[i], attend, last_rows if i == len(self.layers) - 1 else None)
        return self._finished(residual)

    def _finished(self, residual: Residual) -> Tensor:
        depth = len(self.layers)
        if depth in self._moves:
            residual.move(self._moves[depth])
        normed = residual.normed(self.norm)
        return moved(normed, self._moves[depth + 1]) if depth + 1 in self._moves else normed

    def logits(self, hidden_RE: Tensor, out_RV: Tensor | None = None) -> Tensor:
        """[R,V] in the model's dtype, in `out_RV` if given. Keep R small: a row of Qwen's vocabulary is 0.6 MB."""
        if out_RV is not None:
            return torch.mm(hidden_RE, self.head.weight.T, out=out_RV)
        logits: Tensor = self.head(hidden_RE)
        return logits
