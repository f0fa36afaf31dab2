"""A reply that takes too long to read costs its sample, not the run."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence

import pytest
from readers import replied

from qwen_eval.core import Grade, Sample, Turn
from qwen_eval.extraction.symptoms import completions_of
from qwen_eval.runs.grading import GradingTimeout, graded, time_limit
from qwen_eval.tasks.nano import Nano

SAMPLE = Sample(id="x/0", group="x", target="b")


class Backtracking(Nano):
    """A reader whose pattern takes two to the length of the reply."""

    def __init__(self) -> None:
        pass

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        text = completions_of(turns[0])[0].text
        found = re.match(r"(a|a)*b", text)
        return Grade(score=1.0 if found or not text else 0.0, score_upstream=1.0, values={"length": len(text)})


def test_a_regular_expression_that_would_never_end_is_stopped() -> None:
    start = time.monotonic()
    grade = graded(Backtracking(), SAMPLE, replied("a" * 60), seconds=0.2)
    assert time.monotonic() - start < 5
    assert (grade.score, grade.score_upstream, grade.flags) == (0.0, 0.0, ("grading_timeout",))
    assert grade.values == {"length": 0}  # what the summary needs is there


def test_a_reply_that_is_read_in_time_keeps_its_grade() -> None:
    grade = graded(Backtracking(), SAMPLE, replied("aab"), seconds=5)
    assert (grade.score, grade.flags) == (1.0, ())


def test_the_limit_ends_with_the_grading() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_another_thread_grades_without_a_limit() -> None:
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.append(graded(Backtracking(), SAMPLE, replied("b"), seconds=5)))
    thread.start()
    thread.join()
    assert grades[0].score == 1.0


def test_a_loop_is_stopped_too() -> None:
    with pytest.raises(GradingTimeout):
        loop_for(0.05)


def loop_for(seconds: float) -> None:
    with time_limit(seconds):
        while True:
            pass
