"""Muon for the matrices of the blocks, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the orthogonalised momentum. Matrices of one shape are
stacked and orthogonalised together; the fused q | k | v matrix counts as three.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_NRC: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrices, rows <= columns."""
    a, b, c = COEFFICIENTS
    x = matrices_NRC / (matrices_NRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                for part, target in zip(_square_parts(update), _square_parts(parameter)):
                    wide = part if part.shape[0] <= part.shape[1] else part.mT
                    target = target if part.shape[0] <= part.shape[1] else target.mT
                    stacks[tuple(wide.shape)].append((wide, target))
            for (rows, columns), pairs in stacks.items():
                updates = orthogonalise(torch.stack([wide for wide, _ in pairs]))
                scale = group["lr"] * (columns / rows) ** 0.5
                for (_, target), update in zip(pairs, updates):
                    target.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def _square_parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """The fused q | k | v matrix [3h, h] as three; others whole."""
    rows, columns = matrix.shape
    return tuple(matrix.detach().split(columns)) if rows == 3 * columns else (matrix.detach(),)


def optimizers(model: nn.Module, *, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """`muon_lr=0`: AdamW for all."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    table = {id(p) for p in blocks} if muon_lr else set()
    rest = [p for p in model.parameters() if id(p) not in table]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.02},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-10, fused=True)
    return [adam, Muon(blocks, lr=muon_lr)] if muon_lr else [adam]
