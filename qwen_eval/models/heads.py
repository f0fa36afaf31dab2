"""Queries, keys and values of new tokens between their projection and their attention."""

# N tokens, H query heads, K key-value heads, D head channels

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwen_eval.models.fused import Norm, turn
from qwen_eval.models.rope import Rotation


@dataclass(frozen=True, kw_only=True)
class Heads:
    """As projected, beside what norms them and turns them to their positions.

    `rows`: the tokens whose queries are wanted, None for all; keys and values are those of every token.
    """

    qkv_NHD: Tensor  # [N, H + 2 K, D]
    num_queries: int
    num_keys: int
    rotation: Rotation
    norms: tuple[Norm, Norm] | None  # of queries and keys
    rows: Tensor | None = None

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N,H,D], those of `rows` only where it is given; keys and values [N,K,D]."""
        q, k, v = self.qkv_NHD.split_with_sizes((self.num_queries, self.num_keys, self.num_keys), dim=1)
        q_norm, k_norm = self.norms or (None, None)
        rotation = self.rotation
        k = turn(k, rotation.cos, rotation.sin, norm=k_norm)
        if self.rows is not None:
            q, rotation = q[self.rows], rotation.rows(self.rows)
        return turn(q, rotation.cos, rotation.sin, rotation.logn, q_norm), k, v
