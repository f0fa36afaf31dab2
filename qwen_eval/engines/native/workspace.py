"""The static memory of a running batch: slots, the choice of tokens, the decode steps and their captured graphs."""

# B rows

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen_eval.activity import stage
from qwen_eval.core import Sampling
from qwen_eval.engines.native.sampling import TokenChoice
from qwen_eval.models.decode import Decoding, StepResult
from qwen_eval.models.graph import StepGraphs, cuda_graphs
from qwen_eval.models.kv_cache import Slots
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.transformer import Transformer

MakeGraphs = Callable[[torch.device], "StepGraphs[StepResult] | None"]


@dataclass(frozen=True, kw_only=True)
class Need:
    """What rows ask of a workspace: one that was made for the same need can be used again, graphs included."""

    num_slots: int
    capacity: int
    num_positions: int
    alphas: frozenset[tuple[int, ...]]
    choice: tuple[bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Workspace:
    need: Need
    slots: Slots
    choice: TokenChoice
    decoding: Decoding
    graphs: StepGraphs[StepResult] | None


def make_workspace(
    runner: ModelRunner,
    need: Need,
    lengths: Sequence[int],
    samplings: Sequence[Sampling],
    make_graphs: MakeGraphs = cuda_graphs,
) -> Workspace:
    """`lengths`: of the prompts, `samplings`: of all rows that will run."""
    slots = runner.slots(need.num_slots, need.capacity)
    choice = TokenChoice(samplings, need.num_slots, runner.config.vocab_size, runner.head_device)
    graphs = make_graphs(runner.device) if len(runner.devices) == 1 else None  # a graph is of one device
    with stage("warming up", is_brief=True):
        decoding = runner.decoding(
            slots,
            prefill_lengths=lengths,
            num_positions=need.num_positions,
            finish=partial(_chosen, runner.model, choice),
            graphs=graphs,
        )
    return Workspace(need=need, slots=slots, choice=choice, decoding=decoding, graphs=graphs)


def _chosen(model: Transformer, choice: TokenChoice, hidden_BE: Tensor) -> StepResult:
    tokens_B = choice(model.logits(hidden_BE))
    return tokens_B, tokens_B
