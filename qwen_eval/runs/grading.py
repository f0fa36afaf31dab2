"""Grading beside the engine, within a time limit: the model never waits for a grader, and no reply stops a run.

Extractors read a bounded text (`extraction.symptoms.READ_CHARACTERS`); the time limit is for unforeseen replies.
Programs run in the sandbox, which has limits of its own.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType

from qwen_eval.core import (
    GRADING_TIMEOUT,
    Answer,
    Completions,
    Grade,
    GradesElsewhere,
    GradesInBatches,
    Record,
    Sample,
    Task,
    Turn,
)

GRADING_SECONDS = 60.0  # more than the comparison of one MATH answer takes, which has a limit of its own
BATCH_SAMPLES = 16  # a kill loses the grades of one batch, and Ctrl-C waits for it


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A sample whose questions are all answered. `draft` is its record but for the grade; its flags are kept."""

    sample: Sample
    turns: Sequence[Turn]
    draft: Record

    def graded(self, grade: Grade) -> Record:
        return dataclasses.replace(
            self.draft, grade=dataclasses.replace(grade, flags=(*grade.flags, *self.draft.grade.flags))
        )


class GradingTimeout(Exception):
    """Extraction did not finish in time."""


class Graders:
    """Grades finished samples: `with Graders(task, keep) as graders: graders.add(finished)`.

    Where grading waits for other processes, as programs do, it is done in a thread: `add` returns at once, and what
    has been finished meanwhile is graded as one batch. Other tasks read text, which takes microseconds and holds the
    interpreter in any thread: `add` grades it at once, since the time limit needs the main thread.

    `keep` gets the records in the order of `add`, from one thread at a time. What grading raises is raised by a later
    `add` or at the end of the block. A block that ends by an error still grades what was added; one that is
    interrupted (Ctrl-C) grades only the batch in flight.
    """

    def __init__(self, task: Task, keep: Callable[[Record], None]) -> None:
        self._task, self._keep = task, keep
        self._is_beside = isinstance(task, (GradesInBatches, GradesElsewhere))
        self._waiting: deque[Finished] = deque()
        self._changed = threading.Condition()
        self._is_over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="graders", daemon=True)

    def __enter__(self) -> Graders:
        if self._is_beside:
            self._thread.start()
        return self

    def add(self, finished: Finished) -> None:
        if not self._is_beside:
            self._keep(finished.graded(graded(self._task, finished.sample, finished.turns)))
            return
        with self._changed:
            self._waiting.append(finished)
            self._changed.notify()
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_beside:
            return
        self._end(is_interrupted=kind is not None and not issubclass(kind, Exception))
        try:
            self._thread.join()
        except BaseException:  # interrupted while it waits
            self._end(is_interrupted=True)
            self._thread.join()
            raise
        if self._error is not None and kind is None:
            raise self._error

    def _end(self, *, is_interrupted: bool) -> None:
        with self._changed:
            self._is_over = True
            if is_interrupted:
                self._waiting.clear()
            self._changed.notify()

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._grade(batch)
        except BaseException as error:
            self._error = error

    def _grade(self, batch: Sequence[Finished]) -> None:
        """One sample that cannot be graded raises, but not before the others of its batch are kept."""
        try:
            found = grades(self._task, [(finished.sample, finished.turns) for finished in batch])
        except Exception:
            if len(batch) == 1:
                raise
            self._grade_each(batch)
        else:
            for finished, grade in zip(batch, found, strict=True):
                self._keep(finished.graded(grade))

    def _grade_each(self, batch: Sequence[Finished]) -> None:
        errors = []
        for finished in batch:
            try:
                self._grade([finished])
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _next_batch(self) -> list[Finished]:
        """What waits, up to `BATCH_SAMPLES`; [] when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over)
            return [self._waiting.popleft() for _ in range(min(BATCH_SAMPLES, len(self._waiting)))]


def grades(task: Task, items: Sequence[tuple[Sample, Sequence[Turn]]]) -> list[Grade]:
    """The grades of many samples, in their order; together where the task can."""
    if isinstance(task, GradesInBatches):
        return task.grade_many(items)
    return [graded(task, *item) for item in items]


def graded(task: Task, sample: Sample, turns: Sequence[Turn], *, seconds: float = GRADING_SECONDS) -> Grade:
    """The task's grade; that of an empty reply, scored 0 and flagged, where the reply takes longer to read."""
    if isinstance(task, GradesInBatches):
        return task.grade(sample, turns)
    try:
        with time_limit(seconds):
            return task.grade(sample, turns)
    except GradingTimeout:
        grade = task.grade(sample, [_emptied(turn) for turn in turns])
        return dataclasses.replace(
            grade,
            score=None if grade.score is None else 0.0,
            score_upstream=None if grade.score_upstream is None else 0.0,
            flags=(*grade.flags, GRADING_TIMEOUT),
        )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """GradingTimeout after so many seconds, in regular expressions too.

    Without effect outside the main thread. What is graded there waits for processes with limits of their own: 5 s of
    processor and 45 s in all for a comparison of formulas, `task.timeout_s` for a program. What is read there, the
    answer or the program in a reply, takes time in proportion to a bounded text (tests/test_hostile_solutions.py).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise GradingTimeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _emptied(turn: Turn) -> Turn:
    answer: Answer = turn.answer
    if isinstance(answer, Completions):
        answer = Completions(completions=tuple(dataclasses.replace(item, text="") for item in answer.completions))
    return dataclasses.replace(turn, answer=answer)
