"""Fine-tuning a native model: LoRA (https://arxiv.org/abs/2106.09685) with and without embeddings, Q-LoRA
(https://arxiv.org/abs/2305.14314), all parameters. One sequence a micro-batch, as the Qwen authors measured it.

Position rules for long contexts (dynamic NTK, LogN) are off, as in the original while training.
"""

# T tokens, E hidden size, V vocabulary, R rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qwen_eval.models.heads import Heads
from qwen_eval.models.rope import Rope, Rotation
from qwen_eval.models.training_cost import LOSS_CHUNK, lora_parts
from qwen_eval.models.transformer import MLP, Block, Transformer

LEARNING_RATE, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 0.1  # of the published script


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The published settings. `dropout` is on the adapters' input."""

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05


class LoraLinear(nn.Module):
    """base(x) + alpha / rank * up(down(dropout(x))), a pair of matrices for each stored part of a joined linear."""

    def __init__(self, base: nn.Module, inputs: int, outputs: Sequence[int], lora: Lora, like: Tensor) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, lora.alpha / lora.rank, lora.dropout
        self.down = nn.ParameterList(nn.Parameter(like.new_empty(lora.rank, inputs)) for _ in outputs)
        self.up = nn.ParameterList(nn.Parameter(like.new_zeros(size, lora.rank)) for size in outputs)
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        parts = [F.linear(F.linear(dropped, down), up) for down, up in zip(self.down, self.up)]
        out: Tensor = self.base(x) + (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]) * self.scale
        return out


def make_trainable(model: Transformer, method: str, lora: Lora | None = None) -> list[nn.Parameter]:
    """Put adapters in, free what `method` trains, and return it: lora, lora_emb, qlora or full."""
    lora = lora or Lora()
    if method == "full":
        model.requires_grad_(True)
        return list(model.parameters())
    model.requires_grad_(False)
    like = model.norm.weight
    for name, (inputs, outputs) in lora_parts(model.config).items():
        for layer in model.layers:
            assert isinstance(layer, Block)
            layer.set_submodule(name, LoraLinear(layer.get_submodule(name), inputs, outputs, lora, like))
    if method == "lora_emb":
        model.embed.requires_grad_(True)
        model.head.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Tuner:
    """Forward, backward and optimizer step of `model`, whose `parameters` are trained.

    With 16-bit weights the optimizer keeps fp32 copies of what it trains, as mixed-precision training does.
    """

    def __init__(
        self,
        model: Transformer,
        parameters: Sequence[nn.Parameter],
        *,
        checkpointing: bool = True,
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        self.model, self.parameters, self.checkpointing = model.train(), list(parameters), checkpointing
        self._rope = Rope(replace(model.config, dynamic_ntk=False, logn=False), model.device)
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        # one optimizer a tensor: fp32 gradients exist for one at a time
        self._optimizers = [
            torch.optim.AdamW([master], lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=False)
            for master in self._masters
        ]

    def step(self, batches: Sequence[Tensor]) -> float:
        """One optimizer step over micro-batches of token ids [T]; the mean loss in nats a token."""
        total = 0.0
        for ids_T in batches:
            loss = self.loss(ids_T) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self._update()
        return total

    def loss(self, ids_T: Tensor) -> Tensor:
        """Mean negative log-likelihood of every token but the first."""
        model = self.model
        positions = torch.arange(len(ids_T), device=ids_T.device)
        rotations = self._rope.rotations(positions, len(ids_T), len(ids_T))
        x_TE: Tensor = model.embed(ids_T)
        for i, block in enumerate(model.layers):
            x_TE = self._maybe_checkpointed(_block, block, x_TE, rotations[i])
        hidden_TE: Tensor = model.norm(x_TE)[:-1]
        sums = [
            # the logits of a chunk are made again in the backward pass: a row of Qwen's vocabulary is 0.6 MB
            checkpoint(_chunk_loss, model.head, hidden, targets, use_reentrant=False)
            for hidden, targets in zip(torch.split(hidden_TE, LOSS_CHUNK), torch.split(ids_T[1:], LOSS_CHUNK))
        ]
        return torch.stack(sums).sum() / (len(ids_T) - 1)

    def _maybe_checkpointed(self, work: object, *args: object) -> Tensor:
        assert callable(work)
        out: Tensor = checkpoint(work, *args, use_reentrant=False) if self.checkpointing else work(*args)
        return out

    @torch.no_grad()
    def _update(self) -> None:
        for parameter, master, optimizer in zip(self.parameters, self._masters, self._optimizers):
            if parameter.grad is None:
                continue
            if master is not parameter:
                master.grad = parameter.grad.float()
            optimizer.step()
            if master is not parameter:
                parameter.copy_(master)
                master.grad = None
            parameter.grad = None


def _block(block: Block, x_TE: Tensor, rotation: Rotation) -> Tensor:
    """A block on one sequence, out of place: what the engine does in place, the backward pass still needs."""
    x_TE = x_TE + block.attn(block.attn_norm(x_TE), 0, rotation, _attend, None)
    return x_TE + _mlp(block.mlp, block.mlp_norm(x_TE))


def _mlp(mlp: MLP, x_TE: Tensor) -> Tensor:
    out: Tensor = mlp.down(F.silu(mlp.gate(x_TE)) * mlp.up(x_TE))
    return out


def _attend(layer: int, heads: Heads) -> Tensor:
    q_THD, k_TKD, v_TKD = heads.turned()
    group = q_THD.shape[1] // k_TKD.shape[1]
    if group > 1:
        k_TKD, v_TKD = k_TKD.repeat_interleave(group, dim=1), v_TKD.repeat_interleave(group, dim=1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_TKD, v_TKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(0).transpose(0, 1)


def _chunk_loss(head: nn.Module, hidden_TE: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_TE).float(), targets_T, reduction="sum")
