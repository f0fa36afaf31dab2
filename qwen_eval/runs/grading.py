"""Grading one sample within a time limit: no reply of a model may stop a run.

Extractors read a bounded text (`extraction.symptoms.READ_CHARACTERS`); the time limit is for unforeseen replies.
Programs run in the sandbox, which has limits of its own.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from qwen_eval.core import Answer, Completions, Grade, GradesInBatches, Sample, Task, Turn

GRADING_SECONDS = 60.0  # more than the comparisons of one MATH answer take, which have limits of their own
TIMED_OUT = "grading_timeout"  # a flag of a record


class GradingTimeout(Exception):
    """Extraction did not finish in time."""


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
            flags=(*grade.flags, TIMED_OUT),
        )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """GradingTimeout after so many seconds, in regular expressions too. Without effect outside the main thread."""
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
