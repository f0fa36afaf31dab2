"""Generation by continuous batching: finished rows are replaced at once, shared prompt prefixes are computed once.

Rows run in static slots; those that share a prompt prefix attend to one copy of it. Greedy answers do not depend on
which rows run together (up to rounding), sampled ones draw by noise of their own.
"""

# B active rows, V vocabulary, E hidden size

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qwen_eval.core import Completion, EngineError, FinishReason, Sampling, Tokenizer
from qwen_eval.engines.native.prefix_tree import MIN_PART_OF_RUNNING
from qwen_eval.engines.native.sampling import NON_FINITE, Draw, TokenChoice
from qwen_eval.engines.native.scheduler import Counters, Packing, halved, walk
from qwen_eval.engines.native.workspace import MakeGraphs, Need, Workspace, make_workspace
from qwen_eval.models.cost import choice_bytes
from qwen_eval.models.decode import RunningRow, StepResult, buckets_for
from qwen_eval.models.device import DTYPES
from qwen_eval.models.graph import StepGraphs, cuda_graphs
from qwen_eval.models.kv_cache import Prefix
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.transfer import Fetched


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


DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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
        token_bytes: int | None = None,
        on_step: OnStep | None = None,
        overlap: bool | None = None,
        make_graphs: MakeGraphs = cuda_graphs,
        packing: Packing | None = None,
    ) -> None:
        self.forward, self.tokenizer = forward, tokenizer
        self.packing = packing or Packing()
        self.max_cached_tokens, self.token_bytes = max_cached_tokens, token_bytes
        self.share = share and not forward.codec.is_chunked
        self.max_slots, self.prefill_tokens = max_slots, prefill_tokens
        self.on_step = on_step
        self.counters = Counters()
        # a step is launched before the tokens of the one before it are fetched; a CPU would compute it for ended rows
        self.overlap = forward.device.type != "cpu" if overlap is None else overlap
        self.make_graphs = make_graphs
        self._kept: Workspace | None = None
        self.steps = "plain"

    def run(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Finished rows as they finish."""
        waiting = deque(rows)
        while waiting:
            capacity = _capacity(waiting, self.forward.chunk)
            num_slots = self._num_slots(waiting, capacity)
            try:
                yield from _Batch(self, waiting, num_slots, capacity).run()
            except RuntimeError as error:
                self.release()
                self.max_slots = halved(error, num_slots, num_slots, self.counters)
            waiting = deque(_restarted(row) for row in waiting if row.finish_reason is None)

    def workspace(self, rows: Sequence[Row], num_slots: int, capacity: int) -> Workspace:
        """That of the last run where it fits, since its steps are captured already."""
        samplings = [row.sampling for row in rows]
        need = Need(
            num_slots=num_slots,
            capacity=capacity,
            num_positions=max(len(row.prompt) + row.max_new_tokens for row in rows),
            alphas=frozenset(self.forward.rope.key(len(row.prompt)) for row in rows),
            choice=TokenChoice.kind_of(samplings),
        )
        if self._kept is None or self._kept.need != need:
            self.release()
            lengths = [len(row.prompt) for row in rows]
            made = make_workspace(self.forward, need, lengths, samplings, self.make_graphs)
            if made.graphs is None:
                return made
            self._kept = made
        return self._kept

    def release(self) -> None:
        """Give back the memory that is kept between runs for their captured steps."""
        self._kept = None

    def note_steps(self, graphs: StepGraphs[StepResult] | None) -> None:
        """How the steps of a run were launched, for the result."""
        if self.forward.is_spread:
            self.steps = f"plain: the model lies on {len(set(self.forward.model.places))} devices"
        if graphs is not None:
            why = f"; {graphs.stopped}" if graphs.stopped else ""
            self.steps = f"{graphs.num_captured} shapes captured, {graphs.num_replays} replays{why}"

    def _num_slots(self, rows: Sequence[Row], capacity: int) -> int:
        if self.max_cached_tokens is None:
            return min(len(rows), self.max_slots)
        room = max(1, self.max_cached_tokens // (capacity + self._choice_tokens(rows)))
        return buckets_for(self.forward.device).rows_within(min(len(rows), self.max_slots), room)

    def _choice_tokens(self, rows: Sequence[Row]) -> int:
        """What choosing a row's token takes, in tokens of the cache; captured steps keep it a second time."""
        if self.token_bytes is None:
            return 0
        config, dtype = self.forward.config, self.forward.model.dtype
        is_sampled, is_cut, is_penalised = TokenChoice.kind_of([row.sampling for row in rows])
        kind = {"is_sampled": is_sampled, "is_cut": is_cut, "is_penalised": is_penalised}
        held = choice_bytes(config, DTYPE_NAMES[dtype], **kind) * (2 if self.forward.device.type == "cuda" else 1)
        return -(-held // self.token_bytes)

    def _queue(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Prefix | None]]:
        """Rows in the order in which prefixes are needed; a prefix is computed when its first row is taken."""
        waves = walk(
            self.forward,
            [row.prompt for row in rows],
            limits=[len(row.prompt) - 1 if self.share else 0 for row in rows],
            lengths=[len(row.prompt) for row in rows],
            counters=self.counters,
            packing=self.packing,
            min_part=MIN_PART_OF_RUNNING,
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
    return row


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A step that was launched: its rows, as they were then, and their tokens, not yet fetched."""

    rows: Sequence[Row]
    tokens: Fetched


class _Batch:
    """The running rows: the first `len(active)` slots, always without a gap."""

    def __init__(self, owner: Generator, rows: Sequence[Row], num_slots: int, capacity: int) -> None:
        queue = owner._queue(rows)
        self.owner, self.forward, self.queue, self.num_slots = owner, owner.forward, queue, num_slots
        self.num_awaited = max(1, int(num_slots * owner.packing.free_slots))  # slots free before others are admitted
        self.counters = owner.counters
        workspace = owner.workspace(rows, num_slots, capacity)
        self.slots, self.choice, self.decoding = workspace.slots, workspace.choice, workspace.decoding
        self.active: list[Row] = []
        self.flight: _Flight | None = None
        self.is_arranged = False
        self.next_up: tuple[Row, Prefix | None] | None = next(queue, None)

    def run(self) -> Iterator[Row]:
        while self.active or self.next_up is not None:
            is_time = self.num_slots - len(self.active) >= self.num_awaited or not self.active
            while is_time and self._has_room():
                for flight in self._admitted():
                    self._accept(flight)
                yield from self._retire()
            if self.active:
                self._advance()
                yield from self._retire()
        self.owner.note_steps(self.decoding.graphs)

    def _has_room(self) -> bool:
        return self.next_up is not None and len(self.active) < self.num_slots

    def _admitted(self) -> list[_Flight]:
        """The prefills of as many rows as there is room for, under way together."""
        flights = []
        while self._has_room():
            flights.append(self._admit())
        return flights

    def _admit(self) -> _Flight:
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
                    return self._admit_long(row, prefix)
                break
            budget -= length
            if budget < 0 and rows:
                break
            rows.append(row)
            self.next_up = next(self.queue, None)
        return self._prefill(rows, prefix)

    def _admit_long(self, row: Row, prefix: Prefix | None) -> _Flight:
        """A prompt beyond one chunk gets a prefix of its own, all but its last token."""
        depth = prefix.length if prefix else 0
        self.counters.computed_tokens += len(row.prompt) - 1 - depth
        own = self.forward.grown(prefix, row.prompt[depth:-1], len(row.prompt))
        self.next_up = next(self.queue, None)
        return self._prefill([row], own)

    def _prefill(self, rows: list[Row], prefix: Prefix | None) -> _Flight:
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
        self.choice.admit(first, [Draw(sampling=row.sampling, prompt=row.prompt, k=row.k) for row in rows])
        tokens_B = self.choice(self.forward.model.logits(hidden), first)
        self.is_arranged = False
        return _Flight(rows=rows, tokens=Fetched(tokens_B))

    def _arrange(self) -> None:
        """Tell the device which rows run, after any of them came or went."""
        running = [
            RunningRow(prefill_tokens=len(row.prompt), own_tokens=row.cached, prefix=row.prefix) for row in self.active
        ]
        self.decoding.arrange(running, [row.tokens[-1] for row in self.active])
        self.is_arranged = True

    def _advance(self) -> None:
        """Tokens of one step, while the next is under way. A row that ends was then fed once more, for nothing."""
        flight = self.flight or self._launch()
        self.flight = self._launch() if self._may_overlap() else None
        self._accept(flight)
        if self.flight is not None and any(row.finish_reason is not None for row in self.active):
            self._accept(self.flight)  # before rows move to other slots
            self.flight = None

    def _may_overlap(self) -> bool:
        """Rows that end by their length end on time: only what the text says is not known in advance."""
        return self.owner.overlap and all(len(row.tokens) + 1 < row.max_new_tokens for row in self.active)

    def _launch(self) -> _Flight:
        if not self.is_arranged:
            self._arrange()
        tokens_B, _ = self.decoding.step()
        for row in self.active:
            row.cached += 1
        return _Flight(rows=list(self.active), tokens=Fetched(tokens_B))

    def _accept(self, flight: _Flight) -> None:
        tokens: list[int] = flight.tokens.wait().tolist()
        running = [(row, token) for row, token in zip(flight.rows, tokens) if row.finish_reason is None]
        for row, token in running:
            if token == NON_FINITE:
                row.finish_reason = "non-finite"
            else:
                row.accept(token, self.owner.tokenizer.token_bytes(token))
        self.counters.generated_tokens += len(running)
        if self.owner.on_step is not None:
            self.owner.on_step(len(running), self.counters)

    def _retire(self) -> Iterator[Row]:
        """Take finished rows out; the last slot moves into each gap."""
        finished = [i for i, row in enumerate(self.active) if row.finish_reason is not None]
        for i in reversed(finished):
            row, last = self.active[i], len(self.active) - 1
            if i != last:
                self.slots.move(last, i, self.active[last].cached)
                self.choice.move(last, i)
                self.active[i] = self.active[last]
            self.active.pop()
            row.prefix = None
            self.is_arranged = False
            yield row


def refuse_empty(prompt: Sequence[int]) -> None:
    if not prompt:
        raise EngineError("an empty prompt cannot be continued: this tokenizer puts nothing before a text")
