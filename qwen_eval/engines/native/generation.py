"""Generation by continuous batching: finished rows are replaced at once, shared prompt prefixes are computed once.

Rows run in static slots; those that share a prompt prefix attend to one copy of it. Greedy answers do not depend on
which rows run together (up to rounding), sampled ones draw from a generator of their own.
"""

# B active rows, V vocabulary, E hidden size

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_eval.core import Completion, EngineError, FinishReason, Sampling, Tokenizer
from qwen_eval.engines.native.sampling import NON_FINITE, draw, generator_of, greedy_tokens
from qwen_eval.engines.native.scheduler import Counters, halved, walk
from qwen_eval.models.decode import RunningRow
from qwen_eval.models.kv_cache import Prefix, Slots
from qwen_eval.models.runner import ModelRunner


@dataclass(kw_only=True)
class Row:
    """One completion under way."""

    index: int  # of the caller
    prompt: tuple[int, ...]
    max_new_tokens: int
    end_ids: frozenset[int]
    stop: tuple[bytes, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    k: int = 0
    tokens: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    finish_reason: FinishReason | None = None
    prefix: Prefix | None = None
    cached: int = 0  # tokens of this row in its slot

    def __post_init__(self) -> None:
        self.is_plain_greedy = self.sampling.is_greedy and self.sampling.repetition_penalty == 1.0
        self.generator = generator_of(self.sampling, self.prompt, self.k) if not self.sampling.is_greedy else None

    def choose(self, logits_V: Tensor) -> int:
        return draw(logits_V, [*self.prompt, *self.tokens], self.sampling, self.generator or torch.Generator())

    def accept(self, token: int, piece: bytes) -> None:
        """Take a token and see whether it ends the row: end token, stop string (across tokens), length."""
        self.tokens.append(token)
        if token in self.end_ids:
            self.finish_reason = "eos"
            return
        before = len(self.text)
        self.text += piece
        if any(self.text.find(s, max(0, before - len(s) + 1)) >= 0 for s in self.stop):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"


def completion_of(row: Row, tokenizer: Tokenizer) -> Completion:
    """Text up to the first stop string; an end token is counted among the tokens, not in the text."""
    assert row.finish_reason is not None, "a row under way"
    kept = row.tokens[:-1] if row.finish_reason == "eos" else row.tokens
    text = tokenizer.decode(kept)
    if row.finish_reason == "stop":
        found = [text.find(s.decode()) for s in row.stop]
        text = text[: min((at for at in found if at >= 0), default=len(text))]
    return Completion(
        text=text, finish_reason=row.finish_reason, num_tokens=len(row.tokens), token_ids=tuple(row.tokens)
    )


OnStep = Callable[[int, Counters], None]  # after each forward: how many rows got a token, the work so far


class Generator:
    """Runs rows over a `ModelRunner` in slots: at most `max_slots` rows and `max_cached_tokens` tokens.

    When memory ends all the same, half as many.
    """

    def __init__(
        self,
        forward: ModelRunner,
        tokenizer: Tokenizer,
        *,
        share: bool = True,
        max_slots: int = 64,
        prefill_tokens: int = 4096,
        max_cached_tokens: int | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.forward, self.tokenizer = forward, tokenizer
        self.max_cached_tokens = max_cached_tokens
        self.share = share and not forward.codec.is_chunked
        self.max_slots, self.prefill_tokens = max_slots, prefill_tokens
        self.on_step = on_step
        self.counters = Counters()

    def run(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Finished rows as they finish."""
        waiting = deque(rows)
        while waiting:
            capacity = _capacity(waiting, self.forward.chunk)
            num_slots = self._num_slots(len(waiting), capacity)
            batch = _Batch(self, waiting, num_slots, capacity)
            try:
                yield from batch.run()
            except RuntimeError as error:
                self.max_slots = halved(error, num_slots, num_slots, self.counters)
            waiting = deque(_restarted(row) for row in waiting if row.finish_reason is None)

    def choose(self, hidden_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the most likely tokens."""
        logits_BV = self.forward.model.logits(hidden_BE)
        return logits_BV, greedy_tokens(logits_BV)

    def _num_slots(self, num_rows: int, capacity: int) -> int:
        room = self.max_slots if self.max_cached_tokens is None else max(1, self.max_cached_tokens // capacity)
        return min(num_rows, self.max_slots, room)

    def _queue(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Prefix | None]]:
        """Rows in the order in which prefixes are needed; a prefix is computed when its first row is taken."""
        waves = walk(
            self.forward,
            [row.prompt for row in rows],
            limits=[len(row.prompt) - 1 if self.share else 0 for row in rows],
            lengths=[len(row.prompt) for row in rows],
            counters=self.counters,
        )
        for wave in waves:
            for branch in wave:
                for i in sorted(branch.members, key=lambda i: len(rows[i].prompt), reverse=True):
                    yield rows[i], branch.prefix


def _capacity(rows: Sequence[Row], chunk: int) -> int:
    """Tokens a slot must hold at most: longer prompts than one chunk become a prefix of their own."""
    return max(min(len(row.prompt), chunk) + row.max_new_tokens for row in rows)


def _restarted(row: Row) -> Row:
    """Back to its prompt; a sampled row draws the same numbers again."""
    row.tokens.clear()
    row.text.clear()
    row.prefix, row.cached = None, 0
    row.__post_init__()
    return row


class _Batch:
    """The running rows: the first `len(active)` slots, always without a gap."""

    def __init__(self, owner: Generator, rows: Sequence[Row], num_slots: int, capacity: int) -> None:
        queue = owner._queue(rows)
        self.owner, self.forward, self.queue, self.num_slots = owner, owner.forward, queue, num_slots
        self.counters = owner.counters
        self.slots: Slots = owner.forward.slots(num_slots, capacity)
        self.decoding = owner.forward.decoding(
            self.slots,
            prefill_lengths=(len(row.prompt) for row in rows),
            num_positions=max(len(row.prompt) + row.max_new_tokens for row in rows),
            finish=owner.choose,  # of the owner: a cycle with this batch would keep its slots
        )
        self.active: list[Row] = []
        self.is_arranged = False
        self.next_up: tuple[Row, Prefix | None] | None = next(queue, None)

    def run(self) -> Iterator[Row]:
        while self.active or self.next_up is not None:
            while self.next_up is not None and len(self.active) < self.num_slots:
                self._admit()
                yield from self._retire()
            if self.active:
                self._step()
                yield from self._retire()

    def _admit(self) -> None:
        """Prefill as many waiting rows of one prefix as there is room for, in one packed forward."""
        assert self.next_up is not None
        _, prefix = self.next_up
        rows: list[Row] = []
        budget = self.owner.prefill_tokens
        while self.next_up is not None and self.next_up[1] is prefix and len(self.active) + len(rows) < self.num_slots:
            row = self.next_up[0]
            length = len(row.prompt) - (prefix.length if prefix else 0)
            if length > self.forward.chunk:
                if not rows:
                    self._admit_long(row, prefix)
                break
            budget -= length
            if budget < 0 and rows:
                break
            rows.append(row)
            self.next_up = next(self.queue, None)
        if rows:
            self._prefill(rows, prefix)

    def _admit_long(self, row: Row, prefix: Prefix | None) -> None:
        """A prompt beyond one chunk gets a prefix of its own, all but its last token."""
        depth = prefix.length if prefix else 0
        self.counters.computed_tokens += len(row.prompt) - 1 - depth
        own = self.forward.grown(prefix, row.prompt[depth:-1], len(row.prompt))
        self.next_up = next(self.queue, None)
        self._prefill([row], own)

    def _prefill(self, rows: list[Row], prefix: Prefix | None) -> None:
        depth = prefix.length if prefix else 0
        suffixes = [row.prompt[depth:] for row in rows]
        first = len(self.active)
        self.counters.computed_tokens += sum(map(len, suffixes))
        self.counters.prompt_tokens += sum(len(row.prompt) for row in rows)
        for row, suffix in zip(rows, suffixes):
            row.prefix, row.cached = prefix, len(suffix)
        self.active.extend(rows)
        hidden = self.forward.packed(
            suffixes,
            [len(row.prompt) for row in rows],
            prefixes=[prefix] * len(rows),
            last_only=True,
            sink=(self.slots, range(first, first + len(rows))),
        )
        self._accept(rows, *self.owner.choose(hidden))
        self.is_arranged = False

    def _arrange(self) -> None:
        """Tell the device which rows run, after any of them came or went."""
        running = [
            RunningRow(prefill_tokens=len(row.prompt), own_tokens=row.cached, prefix=row.prefix) for row in self.active
        ]
        self.decoding.arrange(running, [row.tokens[-1] for row in self.active])
        self.is_arranged = True

    def _step(self) -> None:
        if not self.is_arranged:
            self._arrange()
        logits_BV, greedy_B = self.decoding.step()
        assert greedy_B is not None, "the choice is part of the step"
        for row in self.active:
            row.cached += 1
        self._accept(self.active, logits_BV, greedy_B)

    @torch.inference_mode()
    def _accept(self, rows: Sequence[Row], logits_BV: Tensor, greedy_B: Tensor) -> None:
        greedy = greedy_B.tolist()
        for i, row in enumerate(rows):
            if greedy[i] == NON_FINITE:
                row.finish_reason = "non-finite"
                continue
            token = greedy[i] if row.is_plain_greedy else row.choose(logits_BV[i])
            row.accept(token, self.owner.tokenizer.token_bytes(token))
            if not row.is_plain_greedy:
                self.is_arranged = False
        self.counters.generated_tokens += len(rows)
        if self.owner.on_step is not None:
            self.owner.on_step(len(rows), self.counters)

    def _retire(self) -> Iterator[Row]:
        """Take finished rows out; the last slot moves into each gap."""
        finished = [i for i, row in enumerate(self.active) if row.finish_reason is not None]
        for i in reversed(finished):
            row, last = self.active[i], len(self.active) - 1
            if i != last:
                self.slots.move(last, i, self.active[last].cached)
                self.active[i] = self.active[last]
            self.active.pop()
            row.prefix = None
            self.is_arranged = False
            yield row


def refuse_empty(prompt: Sequence[int]) -> None:
    if not prompt:
        raise EngineError("an empty prompt cannot be continued: this tokenizer puts nothing before a text")
