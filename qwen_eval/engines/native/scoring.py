"""Scoring: log-probabilities of given tokens, each shared prefix computed once, logits only where they are needed.

The plain twin is `share=False, max_batch_tokens=1`: one sequence at a time, whole. Both give the same answers in fp32
up to rounding, whatever the batch size or order.
"""

# R scored rows, E hidden size, V vocabulary, C choices, B sequences, N packed tokens

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_eval.core import EngineError
from qwen_eval.engines.native.prefix_tree import Node, build
from qwen_eval.models.kv_cache import Prefix
from qwen_eval.models.runner import ModelRunner

HEAD_BYTES = 48 * 2**20  # of logits at a time, fp32 copy included; 64 took 44 MiB more, 32 a third more time
NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence to score. Either `choices` (token ids) at its last token, or every token after `first` tokens."""

    ids: tuple[int, ...]
    choices: tuple[int, ...] = ()
    first: int = 1
    num_fed: int | None = None

    @property
    def length(self) -> int:
        """Of the sequence as the protocol feeds it: decides the NTK alpha."""
        return len(self.ids) if self.num_fed is None else self.num_fed

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model has to read: the last token of a scored text is only ever a target."""
        return self.ids if self.choices else self.ids[:-1]

    @property
    def first_row(self) -> int:
        """Index of the first input whose hidden state is needed: no prefix may be shared beyond it."""
        return len(self.ids) - 1 if self.choices else self.first - 1


@dataclass(frozen=True, kw_only=True)
class Scores:
    """fp32, on the CPU. `logits` [C] at the last row, or [R] of each row's target; `logsumexp` [1] or [R]."""

    logits: Tensor
    logsumexp: Tensor
    num_greedy: int = 0  # targets that were the most likely token

    @property
    def logprobs(self) -> Tensor:
        return self.logits - self.logsumexp


class Scorer:
    """Runs jobs over a `ModelRunner`. `max_batch_tokens` halves when memory runs out, and stays so."""

    def __init__(
        self,
        forward: ModelRunner,
        *,
        share: bool = True,
        max_batch_tokens: int = 4096,
        max_batch_size: int | None = None,
        model_dtype_logits: bool = False,
    ) -> None:
        self.forward = forward
        self.share = share and not forward.codec.is_chunked
        self.max_batch_tokens, self.max_batch_size = max_batch_tokens, max_batch_size
        self.model_dtype_logits = model_dtype_logits  # the original's: choice logits rounded to the model's dtype
        self.computed_tokens = 0
        self.prompt_tokens = 0
        self.num_oom = 0
        self.on_hidden: Callable[[int, Tensor], None] | None = None  # (job, final hidden states of its scored rows)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Scores]]:
        """(index of the job, its scores), in the order in which they are computed."""
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, job in enumerate(jobs):
            # sequences of different NTK alpha cannot share keys; last-row jobs have a cheaper last layer
            groups[(*self.forward.rope.key(job.length), bool(job.choices))].append(i)
            self.prompt_tokens += len(job.inputs)
        for members in groups.values():
            yield from self._run_group(jobs, members)

    def _run_group(self, jobs: Sequence[Job], members: Sequence[int]) -> Iterator[tuple[int, Scores]]:
        sequences = [jobs[i].inputs for i in members]
        limits = [jobs[i].first_row if self.share else 0 for i in members]
        total_length = jobs[members[0]].length  # any length of the group gives its alpha
        pending: list[tuple[Node, Prefix | None]] = [(build(sequences, limits), None)]
        while pending:
            node, parent = pending.pop()
            prefix = self._grow(parent, node, total_length)
            yield from self._run_leaves(jobs, [members[i] for i in node.leaves], node.end, prefix)
            pending.extend((child, prefix) for child in node.children)

    def _grow(self, parent: Prefix | None, node: Node, total_length: int) -> Prefix | None:
        if not node.ids:
            return parent
        self.computed_tokens += len(node.ids)
        return self.forward.grown(parent, node.ids, total_length)

    def _run_leaves(
        self, jobs: Sequence[Job], leaves: Sequence[int], depth: int, prefix: Prefix | None
    ) -> Iterator[tuple[int, Scores]]:
        queue = sorted(leaves, key=lambda i: len(jobs[i].inputs))
        while queue:
            batch = self._next_batch([len(jobs[i].inputs) - depth for i in queue])
            chosen = queue[-batch:]
            try:
                results = self._run_batch(jobs, chosen, depth, prefix)
            except RuntimeError as error:
                self._shrink(error, batch)
                continue
            del queue[-batch:]
            yield from results

    def _next_batch(self, lengths: Sequence[int]) -> int:
        """How many of the longest sequences (at the end) fit the token budget, padding counted; at least one."""
        most = len(lengths) if self.max_batch_size is None else min(len(lengths), self.max_batch_size)
        return max(1, min(most, self.max_batch_tokens // max(lengths[-1], 1)))

    def _shrink(self, error: RuntimeError, batch: int) -> None:
        if not is_out_of_memory(error):
            raise error
        if batch == 1:
            raise EngineError(
                "out of memory with a single sequence; use a smaller engine.prefill_chunk or model"
            ) from None
        self.num_oom += 1
        self.max_batch_tokens = max(1, self.max_batch_tokens // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run_batch(
        self, jobs: Sequence[Job], chosen: Sequence[int], depth: int, prefix: Prefix | None
    ) -> list[tuple[int, Scores]]:
        suffixes = [jobs[i].inputs[depth:] for i in chosen]
        if len(chosen) == 1 and len(suffixes[0]) > self.forward.chunk:
            return [(chosen[0], self._run_long(chosen[0], jobs[chosen[0]], depth, prefix))]
        self.computed_tokens += sum(map(len, suffixes))
        is_last_only = bool(jobs[chosen[0]].choices)
        lengths = [jobs[i].length for i in chosen]
        hidden = self.forward.packed(suffixes, lengths, prefix=prefix, last_only=is_last_only)
        if is_last_only:
            return list(zip(chosen, self._choice_scores([jobs[i] for i in chosen], hidden)))
        results = []
        for i, part in zip(chosen, torch.split(hidden, [len(s) for s in suffixes])):
            rows = part[jobs[i].first_row - depth :]
            results.append((i, self._token_scores(i, rows, jobs[i].ids[jobs[i].first :])))
        return results

    def _run_long(self, index: int, job: Job, depth: int, prefix: Prefix | None) -> Scores:
        """A sequence beyond one chunk: prefilled chunk by chunk, scored as it goes, nothing kept but the cache."""
        grown = self.forward.empty_prefix() if prefix is None else prefix.fork()
        suffix, position, num_greedy = job.inputs[depth:], depth, 0
        self.computed_tokens += len(suffix)
        if job.choices:
            for _ in self.forward.extend(grown, suffix[:-1], job.length):
                pass
            hidden = self.forward.packed([suffix[-1:]], [job.length], prefix=grown, last_only=True)
            return self._choice_scores([job], hidden)[0]
        logits, logsumexp = torch.empty(len(job.inputs) - job.first_row), torch.empty(len(job.inputs) - job.first_row)
        for hidden in self.forward.extend(grown, suffix, job.length, want_hidden=True):
            rows = hidden[max(0, job.first_row - position) :]
            first = position + len(hidden) - len(rows)
            part = self._token_scores(index, rows, job.ids[first + 1 : first + 1 + len(rows)])
            place = slice(first - job.first_row, first - job.first_row + len(rows))
            logits[place], logsumexp[place] = part.logits, part.logsumexp
            num_greedy += part.num_greedy
            position += len(hidden)
        return Scores(logits=logits, logsumexp=logsumexp, num_greedy=num_greedy)

    def _rows_at_a_time(self) -> int:
        vocab = self.forward.config.vocab_size
        return max(1, HEAD_BYTES // (vocab * (4 + self.forward.model.dtype.itemsize)))

    @torch.inference_mode()
    def _choice_scores(self, jobs: Sequence[Job], hidden_BE: Tensor) -> list[Scores]:
        results = []
        for jobs_part, rows in zip(
            _chunks(jobs, self._rows_at_a_time()), torch.split(hidden_BE, self._rows_at_a_time())
        ):
            logits_BV = self.forward.model.logits(rows)
            lse_B = logits_BV.float().logsumexp(-1).cpu()
            for b, job in enumerate(jobs_part):
                chosen = (
                    logits_BV[b, list(job.choices)] if self.model_dtype_logits else self._exact(rows[b], job.choices)
                )
                results.append(Scores(logits=chosen.float().cpu(), logsumexp=lse_B[b : b + 1]))
        return results

    def _exact(self, hidden_E: Tensor, choices: Sequence[int]) -> Tensor:
        """[C] logits in fp32 from the hidden state: in bf16 two letters tie in several percent of the items."""
        return self.forward.model.head.weight[list(choices)].float() @ hidden_E.float()

    @torch.inference_mode()
    def _token_scores(self, index: int, hidden_RE: Tensor, targets: Sequence[int]) -> Scores:
        if self.on_hidden is not None:
            self.on_hidden(index, hidden_RE)
        targets_R = torch.tensor(targets, device=hidden_RE.device)
        logits_R, lse_R, num_greedy = torch.empty(len(targets)), torch.empty(len(targets)), 0
        model, size = self.forward.model, min(self._rows_at_a_time(), max(len(targets), 1))
        # one buffer for all slices: blocks of 32 MB that come and go among small ones that stay tear the C heap apart
        raw_RV = torch.empty(size, model.config.vocab_size, dtype=model.dtype, device=hidden_RE.device)
        fp32_RV = raw_RV if model.dtype == torch.float32 else torch.empty_like(raw_RV, dtype=torch.float32)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            wanted = targets_R[part]
            model.logits(hidden_RE[part], raw_RV[: len(wanted)])
            logits_RV = fp32_RV[: len(wanted)]
            if fp32_RV is not raw_RV:
                logits_RV.copy_(raw_RV[: len(wanted)])
            num_greedy += int((logits_RV.argmax(-1) == wanted).sum())
            logits_R[part] = logits_RV.gather(1, wanted[:, None])[:, 0].cpu()
            top_R = logits_RV.amax(-1)
            lse_R[part] = (logits_RV.sub_(top_R[:, None]).exp_().sum(-1).log() + top_R).cpu()
        return Scores(logits=logits_R, logsumexp=lse_R, num_greedy=num_greedy)


def _chunks(items: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def is_out_of_memory(error: BaseException) -> bool:
    """The ways in which CUDA, cuBLAS and the CPU allocator say it."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in said for words in NO_MEMORY)
