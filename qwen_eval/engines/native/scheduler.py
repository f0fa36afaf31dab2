"""What scoring and generation share: the walk over the prefix tree, token counts, running out of memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_eval.engines.native.prefix_tree import MIN_SAVED_TOKENS, Node, build
from qwen_eval.models.kv_cache import Prefix
from qwen_eval.models.runner import ModelRunner

NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "status_alloc_failed",
)


@dataclass(kw_only=True)
class Counters:
    """Work so far: tokens of prompts as asked, tokens that were computed, tokens that were generated, failures."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    num_oom: int = 0


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How work is put together for a device: many small kernels cost a GPU more than some work done twice."""

    wave_tokens: int | None = None  # new tokens of prefixes computed together; None: a chunk
    kept_tokens: int = 2**31  # tokens of the prefixes of a wave, with those they continue, which are copied
    min_saved: int = MIN_SAVED_TOKENS  # tokens, below which a prefix is not worth its kernels
    fills_batches: bool = False  # what a wave leaves over waits for the next
    by_prefix: bool = False  # sequences of about one length are packed by their prefixes, not by their exact lengths
    free_slots: float = 0.0  # share of the slots of a running batch that is free before others are admitted


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Sequences, by their index, that continue right after one prefix (None: from the beginning)."""

    members: tuple[int, ...]
    prefix: Prefix | None

    @property
    def depth(self) -> int:
        return self.prefix.length if self.prefix else 0


@dataclass(frozen=True, kw_only=True)
class _Step:
    node: Node
    parent: Prefix | None
    members: Sequence[int]  # sequences that the node's leaves count in
    total_length: int  # any length of the members: gives their NTK alpha


def walk(
    runner: ModelRunner,
    sequences: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    lengths: Sequence[int],
    counters: Counters,
    packing: Packing,
    wave_tokens: int = 1,
    min_part: float = 0.0,
) -> Iterator[list[Branch]]:
    """All sequences, in waves of branches whose prefixes are computed together when the wave is asked for.

    At most the first `limits[i]` tokens of sequence i are shared; `lengths[i]` decides its NTK alpha: sequences of
    different alphas share nothing. A wave holds prefixes of up to `wave_tokens` new tokens, as far as `packing`
    allows, at least one prefix. `min_part`: of `build`.
    """
    options = {"min_saved": packing.min_saved, "min_part": min_part}
    pending = [_root(sequences, limits, lengths, members, options) for members in _by_alpha(runner, lengths)]
    while pending:
        wave = _next_wave(pending, min(wave_tokens, packing.wave_tokens or runner.chunk), packing.kept_tokens)
        yield _branches(runner, wave, pending, counters)  # in no variable here: the next wave needs the memory


def _branches(runner: ModelRunner, wave: Sequence[_Step], pending: list[_Step], counters: Counters) -> list[Branch]:
    """Compute the prefixes of a wave, and add what continues them to `pending`."""
    branches = []
    for step, prefix in zip(wave, _grown(runner, wave, counters)):
        if step.node.leaves:
            branches.append(Branch(members=tuple(step.members[i] for i in step.node.leaves), prefix=prefix))
        pending.extend(
            _Step(node=child, parent=prefix, members=step.members, total_length=step.total_length)
            for child in step.node.children
        )
    return branches


def _by_alpha(runner: ModelRunner, lengths: Sequence[int]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        groups[runner.rope.key(length)].append(i)
    return list(reversed(groups.values()))


def _root(
    sequences: Sequence[Sequence[int]],
    limits: Sequence[int],
    lengths: Sequence[int],
    members: Sequence[int],
    options: Mapping[str, Any],
) -> _Step:
    root = build([sequences[i] for i in members], [limits[i] for i in members], **options)
    return _Step(node=root, parent=None, members=members, total_length=lengths[members[0]])


def _next_wave(pending: list[_Step], wave_tokens: int, kept_tokens: int) -> list[_Step]:
    """Steps off the end of `pending` while their new tokens fit, and all tokens of their prefixes, which are copies."""
    wave = [pending.pop()]
    room, kept = wave_tokens - len(wave[0].node.ids), kept_tokens - wave[0].node.end
    while pending and len(pending[-1].node.ids) <= room and pending[-1].node.end <= kept:
        room, kept = room - len(pending[-1].node.ids), kept - pending[-1].node.end
        wave.append(pending.pop())
    return wave


def _grown(runner: ModelRunner, wave: Sequence[_Step], counters: Counters) -> list[Prefix | None]:
    growing = [step for step in wave if step.node.ids]
    counters.computed_tokens += sum(len(step.node.ids) for step in growing)
    fresh: Iterator[Prefix] | None = None
    if len(growing) > 1:
        fresh = _together(runner, growing, counters)
    if fresh is None:
        fresh = (runner.grown(step.parent, step.node.ids, step.total_length) for step in growing)
    return [next(fresh) if step.node.ids else step.parent for step in wave]


def _together(runner: ModelRunner, growing: Sequence[_Step], counters: Counters) -> Iterator[Prefix] | None:
    """None where memory does not hold the forward of all of them."""
    try:
        parts = [step.node.ids for step in growing]
        return iter(runner.grown_together([s.parent for s in growing], parts, [s.total_length for s in growing]))
    except RuntimeError as error:
        halved(error, len(growing), len(growing), counters)
        return None


def halved(error: RuntimeError, size: int, num_sequences: int, counters: Counters) -> int:
    """Half of a size that memory did not hold, counted; any other error, or one with a single sequence, is raised."""
    if not is_out_of_memory(error) or num_sequences == 1:
        raise error
    counters.num_oom += 1
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return max(1, size // 2)


def is_out_of_memory(error: BaseException) -> bool:
    """The ways in which CUDA, cuBLAS, Triton and the CPU allocator say it."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in said for words in NO_MEMORY)
