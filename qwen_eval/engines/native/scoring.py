"""Scoring: log-probabilities of given tokens, each shared prefix computed once, logits only where they are needed.

The plain twin is `share=False, max_batch_tokens=1`: one sequence at a time, whole. Both give the same answers in fp32
up to rounding, whatever the batch size or order.
"""

# R scored rows, E hidden size, V vocabulary, C choices, B sequences, N packed tokens

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, takewhile

import torch
from torch import Tensor

from qwen_eval.engines.native.scheduler import Branch, Counters, Packing, halved, walk
from qwen_eval.models.cost import CUDA_HEAD_BYTES
from qwen_eval.models.kv_cache import Prefix
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.transfer import Fetched, upload

HEAD_BYTES = 48 * 2**20  # of logits at a time, fp32 copy included; 64 took 44 MiB more, 32 a third more time
BATCHES_UNDER_WAY = 4  # on a GPU, before the scores of the first are fetched


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
    def num_inputs(self) -> int:
        return len(self.ids) if self.choices else len(self.ids) - 1

    @property
    def targets(self) -> tuple[int, ...]:
        """Tokens to score, one for each row."""
        return self.ids[self.first :]

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


OnHidden = Callable[[int, Tensor], None]  # (job, final hidden states of its next scored rows)


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
        packing: Packing | None = None,
    ) -> None:
        self.forward = forward
        self.share = share and not forward.codec.is_chunked
        self.max_batch_tokens, self.max_batch_size = max_batch_tokens, max_batch_size
        self.model_dtype_logits = model_dtype_logits  # the original's: choice logits rounded to the model's dtype
        self.packing = packing or Packing()
        self.counters = Counters()

    def run(self, jobs: Sequence[Job], *, on_hidden: OnHidden | None = None) -> Iterator[tuple[int, Scores]]:
        """(index of the job, its scores), in the order in which they are computed."""
        self.counters.prompt_tokens += sum(job.num_inputs for job in jobs)
        for is_choice in (True, False):  # jobs of a last row have a cheaper last layer
            members = [i for i, job in enumerate(jobs) if bool(job.choices) == is_choice]
            yield from self._run_kind(jobs, members, on_hidden)

    def _run_kind(
        self, jobs: Sequence[Job], members: Sequence[int], on_hidden: OnHidden | None
    ) -> Iterator[tuple[int, Scores]]:
        """A few batches are under way on a GPU before the first is fetched: the host never waits for one alone."""
        waves = walk(
            self.forward,
            [jobs[i].inputs for i in members],
            limits=[jobs[i].first_row if self.share else 0 for i in members],
            lengths=[jobs[i].length for i in members],
            counters=self.counters,
            packing=self.packing,
            wave_tokens=self.max_batch_tokens,
        )
        under_way: deque[_BatchScores] = deque()
        for found in self._batches(waves, jobs, members, on_hidden):
            under_way.append(_BatchScores(found))
            if len(under_way) > self._batches_under_way:
                yield from under_way.popleft().scores()
        for flight in under_way:
            yield from flight.scores()

    def _batches(
        self, waves: Iterator[list[Branch]], jobs: Sequence[Job], members: Sequence[int], on_hidden: OnHidden | None
    ) -> Iterator[list[_Found]]:
        """Sequences of all prefixes of a wave side by side, on a GPU with what earlier waves left over."""
        queue: list[_Suffix] = []
        for wave in waves:
            queue += [_Suffix(index=members[m], job=jobs[members[m]], prefix=b.prefix) for b in wave for m in b.members]
            wave.clear()  # so that a prefix is freed with the last sequence that continues it
            queue.sort(key=self._order)
            yield from self._run_queue(queue, on_hidden, may_wait=self.packing.fills_batches)
        yield from self._run_queue(queue, on_hidden, may_wait=False)

    @property
    def _batches_under_way(self) -> int:
        return 0 if self.forward.device.type == "cpu" else BATCHES_UNDER_WAY

    def _order(self, suffix: _Suffix) -> tuple[int, int]:
        """The longest last, or those of about one length (up to twice) by their prefixes."""
        if self.packing.by_prefix:
            return suffix.num_tokens.bit_length(), id(suffix.prefix)
        return suffix.num_tokens, 0

    def _run_queue(self, queue: list[_Suffix], on_hidden: OnHidden | None, *, may_wait: bool) -> Iterator[list[_Found]]:
        """Batches off the end of `queue`; with `may_wait` it keeps what more sequences could join."""
        while queue:
            batch = self._next_batch([suffix.num_tokens for suffix in queue])
            if may_wait and batch == len(queue) and self._may_keep(queue):
                return
            try:
                found = self._run_batch(queue[-batch:], on_hidden)
            except RuntimeError as error:
                self._shrink(error, batch)
                continue
            del queue[-batch:]
            yield found

    def _may_keep(self, queue: Sequence[_Suffix]) -> bool:
        """Whether memory holds their prefixes beside those of the next wave."""
        prefixes = {id(suffix.prefix): suffix.depth for suffix in queue}
        return sum(prefixes.values()) <= self.packing.kept_tokens // 2

    def _next_batch(self, lengths: Sequence[int]) -> int:
        """How many sequences at the end fit the token budget, padding counted; at least one."""
        most = len(lengths) if self.max_batch_size is None else min(len(lengths), self.max_batch_size)
        longest = accumulate(reversed(lengths), max)
        fitting = takewhile(lambda it: it[0] * it[1] <= self.max_batch_tokens, enumerate(islice(longest, most), 1))
        return max(1, sum(1 for _ in fitting))

    def _shrink(self, error: RuntimeError, batch: int) -> None:
        self.max_batch_tokens = halved(error, self.max_batch_tokens, batch, self.counters)

    def _run_batch(self, chosen: Sequence[_Suffix], on_hidden: OnHidden | None) -> list[_Found]:
        if len(chosen) == 1 and chosen[0].num_tokens > self.forward.chunk:
            return [self._run_long(chosen[0], on_hidden)]
        chosen = sorted(chosen, key=lambda suffix: id(suffix.prefix))  # those of one prefix attend to it together
        tokens = [suffix.tokens for suffix in chosen]
        self.counters.computed_tokens += sum(map(len, tokens))
        is_last_only = bool(chosen[0].job.choices)
        hidden = self.forward.packed(
            tokens,
            [suffix.job.length for suffix in chosen],
            prefixes=[suffix.prefix for suffix in chosen],
            last_only=is_last_only,
        )
        if is_last_only:
            return self._choice_scores(chosen, hidden)
        parts = torch.split(hidden, list(map(len, tokens)))
        rows = [part[suffix.job.first_row - suffix.depth :] for suffix, part in zip(chosen, parts)]
        for suffix, part in zip(chosen, rows):
            if on_hidden is not None:
                on_hidden(suffix.index, part)
        scores = self._token_scores(torch.cat(rows), [t for suffix in chosen for t in suffix.job.targets])
        pieces = zip(*(torch.split(score, list(map(len, rows))) for score in scores))
        return [_Found(s.index, logits, lse, hits) for s, (logits, lse, hits) in zip(chosen, pieces)]

    def _run_long(self, suffix: _Suffix, on_hidden: OnHidden | None) -> _Found:
        """A sequence beyond one chunk: prefilled chunk by chunk, scored as it goes, nothing kept but the cache."""
        grown = self.forward.empty_prefix() if suffix.prefix is None else suffix.prefix.fork()
        job, tokens, position = suffix.job, suffix.tokens, suffix.depth
        self.counters.computed_tokens += len(tokens)
        if job.choices:
            for _ in self.forward.extend(grown, tokens[:-1], job.length):
                pass
            hidden = self.forward.packed([tokens[-1:]], [job.length], prefixes=[grown], last_only=True)
            return self._choice_scores([suffix], hidden)[0]
        parts = []
        for hidden in self.forward.extend(grown, tokens, job.length, want_hidden=True):
            rows = hidden[max(0, job.first_row - position) :]
            first = position + len(hidden) - len(rows)
            if on_hidden is not None and len(rows):
                on_hidden(suffix.index, rows)
            parts.append(self._token_scores(rows, job.ids[first + 1 : first + 1 + len(rows)]))
            position += len(hidden)
        return _Found(suffix.index, *(torch.cat(same) for same in zip(*parts)))

    def _rows_at_a_time(self) -> int:
        vocab = self.forward.config.vocab_size
        room = HEAD_BYTES if self.forward.device.type == "cpu" else CUDA_HEAD_BYTES
        return max(1, room // (vocab * (4 + self.forward.model.dtype.itemsize)))

    @torch.inference_mode()
    def _choice_scores(self, chosen: Sequence[_Suffix], hidden_BE: Tensor) -> list[_Found]:
        widest = max(len(suffix.job.choices) for suffix in chosen)
        padded = [[*s.job.choices, *s.job.choices[:1] * (widest - len(s.job.choices))] for s in chosen]
        choices_BC = upload(torch.tensor(padded), hidden_BE.device)
        found: list[_Found] = []
        parts = (torch.split(x, self._rows_at_a_time()) for x in (hidden_BE, choices_BC))
        for rows_BE, part_BC in zip(*parts):
            logits_BV = self.forward.model.logits(rows_BE)
            lse_B = logits_BV.float().logsumexp(-1)
            exact = logits_BV.gather(1, part_BC).float() if self.model_dtype_logits else self._exact(rows_BE, part_BC)
            for logits_C, lse in zip(exact, lse_B):
                suffix = chosen[len(found)]
                found.append(_Found(suffix.index, logits_C[: len(suffix.job.choices)], lse[None], None))
        return found

    def _exact(self, hidden_BE: Tensor, choices_BC: Tensor) -> Tensor:
        """[B,C] logits in fp32 from the hidden state: in bf16 two letters tie in several percent of the items."""
        head_BCE = self.forward.model.head.weight[choices_BC].float()
        return (head_BCE @ hidden_BE.float().unsqueeze(-1)).squeeze(-1)

    @torch.inference_mode()
    def _token_scores(self, hidden_RE: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Per row, on the device: the target's logit, the log-sum-exp, whether the target was the most likely token."""
        targets_R = upload(torch.tensor(targets, dtype=torch.long), hidden_RE.device)
        model, size = self.forward.model, min(self._rows_at_a_time(), max(len(targets), 1))
        logits_R, lse_R, hits_R = (torch.empty(len(targets), device=hidden_RE.device) for _ in range(3))
        # one buffer for all slices: blocks of 32 MB that come and go among small ones that stay tear the C heap apart
        raw_RV = torch.empty(size, model.config.vocab_size, dtype=model.dtype, device=hidden_RE.device)
        fp32_RV = raw_RV if model.dtype == torch.float32 else torch.empty_like(raw_RV, dtype=torch.float32)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            wanted = targets_R[part]
            model.logits(hidden_RE[part], raw_RV[: len(wanted)])
            rows_RV = fp32_RV[: len(wanted)]
            if fp32_RV is not raw_RV:
                rows_RV.copy_(raw_RV[: len(wanted)])
            hits_R[part] = (rows_RV.argmax(-1) == wanted).float()
            logits_R[part] = rows_RV.gather(1, wanted[:, None])[:, 0]
            top_R = rows_RV.amax(-1)
            lse_R[part] = rows_RV.sub_(top_R[:, None]).exp_().sum(-1).log() + top_R
        return logits_R, lse_R, hits_R


@dataclass(frozen=True, kw_only=True)
class _Suffix:
    """A job and the prefix after which it is computed."""

    index: int
    job: Job
    prefix: Prefix | None

    @property
    def depth(self) -> int:
        return self.prefix.length if self.prefix else 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.job.inputs[self.depth :]

    @property
    def num_tokens(self) -> int:
        return self.job.num_inputs - self.depth


@dataclass(frozen=True)
class _Found:
    """Scores of one job, still on the device. `hits_R`: 1 where the target was the likeliest; None of choices."""

    index: int
    logits: Tensor
    logsumexp: Tensor
    hits_R: Tensor | None


class _BatchScores:
    """The scores of a batch on their way to the host, in one transfer behind the batch, before those that follow."""

    def __init__(self, found: Sequence[_Found]) -> None:
        self._owners = [(f.index, len(f.logits), len(f.logsumexp), f.hits_R is not None) for f in found]
        self._fetched = Fetched(
            torch.cat([t for f in found for t in (f.logits, f.logsumexp, f.hits_R) if t is not None])
        )

    def scores(self) -> Iterator[tuple[int, Scores]]:
        values, at = self._fetched.wait(), 0
        for index, num_logits, num_sums, has_hits in self._owners:
            sizes = [num_logits, num_sums, num_logits * has_hits]
            logits, logsumexp, hits = torch.split(values[at : at + sum(sizes)], sizes)
            yield index, Scores(logits=logits, logsumexp=logsumexp, num_greedy=int(hits.sum()) if has_hits else 0)
            at += sum(sizes)
