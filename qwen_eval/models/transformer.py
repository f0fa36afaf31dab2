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

    def added(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm; None adds nothing."""
        if delta is None:
            return x, self(x)
        return add_rms_norm(x, delta, self.weight, self.eps)


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
        self,
        x_NE: Tensor,
        delta_NE: Tensor | None,
        layer: int,
        rotation: Rotation,
        attend: Attend,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The sum of all before the MLP, and what the MLP adds: who reads the next sum adds and norms it in one pass.

        `x_NE` and `delta_NE` are those of the block before; None: nothing to add.
        """
        x_NE, normed_NE = self.attn_norm.added(x_NE, delta_NE)
        mixed: Tensor = self.attn(normed_NE, layer, rotation, attend, rows)
        x_NE, normed_NE = self.mlp_norm.added(x_NE if rows is None else x_NE[rows], mixed)
        return x_NE, self.mlp(normed_NE)


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
        """In inference mode, once its weights are loaded; notes where hidden states go from one device to another."""
        places = [self.device, *self.layer_devices, self.norm.weight.device, self.head.weight.device]
        moves = {i: there for i, (here, there) in enumerate(pairwise(places)) if here != there}
        self._moves = {0: places[1], **moves} if moves else {}
        return self.eval().requires_grad_(False)

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
        x, delta = self.embed(ids_N), None
        for i, block in enumerate(self.layers):
            if i in self._moves:
                x, delta = self._moved(i, x, delta)
            rows = last_rows if i == len(self.layers) - 1 else None
            x, delta = block(x, delta, i, rotations[i], attend, rows)
        return self._finished(x, delta)

    def _moved(self, place: int, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sum where the next block or the norm lies: one transfer."""
        whole = x if delta is None else x + delta
        return moved(whole, self._moves[place]), None

    def _finished(self, x: Tensor, delta: Tensor | None) -> Tensor:
        depth = len(self.layers)
        if depth in self._moves:
            x, delta = self._moved(depth, x, delta)
        normed = self.norm.added(x, delta)[1]
        return moved(normed, self._moves[depth + 1]) if depth + 1 in self._moves else normed

    def logits(self, hidden_RE: Tensor, out_RV: Tensor | None = None) -> Tensor:
        """[R,V] in the model's dtype, in `out_RV` if given. Keep R small: a row of Qwen's vocabulary is 0.6 MB."""
        if out_RV is not None:
            return torch.mm(hidden_RE, self.head.weight.T, out=out_RV)
        logits: Tensor = self.head(hidden_RE)
        return logits
