"""The measurements of one cell: the times of its tokens, by a clock that a test can replace. No torch here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_eval.core import JSON
from qwen_eval.profile.cells import GridCell

Clock = Callable[[], float]
QUANTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """One run of a cell. `ttft_s`: until every sequence has its first token. `steps_s`: each decode step after that."""

    total_s: float
    ttft_s: float
    steps_s: tuple[float, ...]

    @property
    def decode_s(self) -> float:
        return math.fsum(self.steps_s)


class Recorder:
    """Times one run: `start`, then `step(rows)` after each forward with how many sequences got a token, then `stop`.

    `synchronise` waits for the device. It is called around a run only: the engine itself waits once a step, when it
    reads the tokens.
    """

    def __init__(
        self, batch: int, *, clock: Clock = time.perf_counter, synchronise: Callable[[], None] = lambda: None
    ) -> None:
        self.batch, self.clock, self.synchronise = batch, clock, synchronise

    def start(self, *, most_steps: int | None = None) -> None:
        self.most_steps = most_steps
        self.events: list[tuple[float, int]] = []
        self.synchronise()
        self.start_s = self.clock()

    def step(self, num_rows: int) -> None:
        self.events.append((self.clock(), num_rows))

    @property
    def num_whole_steps(self) -> int:
        """In which every sequence got a token: a large batch is prefilled in several forwards."""
        return sum(num_rows == self.batch for _, num_rows in self.events)

    def stop(self) -> Repetition:
        self.synchronise()
        end_s = self.clock()
        num_started, first = 0, 0
        while num_started < self.batch:  # a large batch is prefilled in several forwards
            num_started += self.events[first][1]
            first += 1
        assert num_started == self.batch, f"{num_started} first tokens for {self.batch} sequences"
        marks = [at for at, _ in self.events[first - 1 :]]
        steps = tuple(after - before for before, after in itertools.pairwise(marks))
        return Repetition(total_s=end_s - self.start_s, ttft_s=marks[0] - self.start_s, steps_s=steps)


def summary(cell: GridCell, repetitions: Sequence[Repetition]) -> dict[str, JSON]:
    """The raw values of every repetition, and the quantiles of a token's time over all of them.

    `tok_per_s` is what the published tables mean: generated tokens over the whole time; of `encode` the tokens read.
    """
    counted = cell.prompt_tokens if cell.mode == "encode" else cell.new_tokens
    steps = sorted(step for repetition in repetitions for step in repetition.steps_s)
    found: dict[str, JSON] = {
        "tok_per_s": [cell.batch * counted / r.total_s for r in repetitions],
        "prefill_tok_per_s": [cell.batch * cell.prompt_tokens / r.ttft_s for r in repetitions],
        "decode_tok_per_s": [cell.batch * len(r.steps_s) / r.decode_s for r in repetitions if r.steps_s],
        "ttft_s": [r.ttft_s for r in repetitions],
        "total_s": [r.total_s for r in repetitions],
    }
    if steps:
        found["tpot_s"] = {f"p{q}": quantile(steps, q / 100) for q in QUANTILES} | {
            "mean": math.fsum(steps) / len(steps)
        }
    return found


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of values in ascending order, linear between the two nearest."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float | None:
    return quantile(sorted(values), 0.5) if values else None
