"""Finished samples are graded beside the engine: it never waits, and nothing that was answered is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import toy

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, TaskSpec, check
from qwen_eval.core import (
    Completion,
    Completions,
    EngineError,
    Generate,
    Grade,
    GradesElsewhere,
    Record,
    Request,
    Sample,
    Turn,
)
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.runs.evaluate import draft_of, evaluate
from qwen_eval.runs.grading import BATCH_SAMPLES, Finished, Graders
from qwen_eval.runs.run import Run, load_run
from qwen_eval.sandbox import Program, Verdict
from qwen_eval.tasks import humaneval
from qwen_eval.tasks.math import Math
from qwen_eval.tasks.registry import TASKS, TaskContext


class Counted(humaneval.HumanEval):
    batches: ClassVar[list[int]] = []

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        self.batches.append(len(programs))
        return super().run(programs)


class Slow(toy.Toy):
    """Each grade waits, as for another process."""

    grades_elsewhere = True
    seconds: ClassVar[float] = 0.02
    bad: ClassVar[str] = ""

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        time.sleep(self.seconds)
        if sample.id == self.bad:
            raise ZeroDivisionError(sample.id)
        return super().grade(sample, turns)


class SlowInBatches(Slow):
    def grade_many(self, items: Sequence[tuple[Sample, Sequence[Turn]]]) -> list[Grade]:
        return [self.grade(*item) for item in items]


@pytest.fixture(params=[Slow, SlowInBatches])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setitem(TASKS, "toy", f"test_graders:{request.param.__name__}")
    monkeypatch.setattr(Slow, "bad", "")
    return request.param


def run(directory: Path, engine: FakeEngine, task: TaskSpec | None = None) -> Run:
    spec = EvalSpec(
        task=task or toy.ToySpec(name="toy", num=40),
        model=ModelSpec(name="m"),
        engine=EngineSpec(name="fake"),
        run_dir=str(directory),
    )
    return evaluate(check(spec), lambda _: engine)


class Clocked:
    """A `reply` of the fake engine that notes when each request came."""

    def __init__(self, reply: Callable[[Request], str | Completions | None] = lambda _: None) -> None:
        self._reply, self.times = reply, list[float]()

    def __call__(self, request: Request) -> str | Completions | None:
        self.times.append(time.perf_counter())
        return self._reply(request)

    @property
    def span_s(self) -> float:
        return self.times[-1] - self.times[0]


@pytest.fixture
def solutions(monkeypatch: pytest.MonkeyPatch) -> dict[str | None, str]:
    """The canonical continuation of each prompt; a HumanEval that counts its batches is the task."""
    monkeypatch.setitem(TASKS, "humaneval", "test_graders:Counted")
    monkeypatch.setattr(Counted, "batches", [])
    task = humaneval.HumanEval(humaneval.HumanEvalSpec(), TaskContext())
    return {task.prompt(sample).text: sample.data["canonical_solution"] for sample in task.samples()}


def written(text: str) -> Completions:
    return Completions(completions=(Completion(text=text, finish_reason="eos", num_tokens=len(text)),))


# --- programs --------------------------------------------------------------------------------------------------------


def test_programs_are_run_in_batches_with_the_verdicts_of_each_alone(
    solutions: dict[str | None, str], tmp_path: Path
) -> None:
    def reply(request: Request) -> Completions:
        text = solutions[request.prompt.text]
        return written("    return None" if len(text) % 5 == 0 else text)

    outcome = run(tmp_path, FakeEngine(reply), humaneval.HumanEvalSpec(limit=100, timeout_s=20.0))
    assert outcome.num_samples == 100
    assert 7 <= len(Counted.batches) <= 20
    records = load_run(tmp_path).records
    task = humaneval.HumanEval(humaneval.HumanEvalSpec(timeout_s=20.0), TaskContext())
    samples = {sample.id: sample for sample in task.samples()}
    assert {record.grade.score for record in records} == {0.0, 1.0}
    for record in records[:10]:
        request = Generate(prompt=task.prompt(samples[record.sample_id]), max_new_tokens=512)
        alone = task.grade(samples[record.sample_id], [Turn(request=request, answer=record.answers[0])])
        assert alone == record.grade


def test_the_engine_does_not_wait_for_a_slow_program(solutions: dict[str | None, str], tmp_path: Path) -> None:
    def reply(request: Request) -> Completions:
        is_first = len(clocked.times) == 1
        return written("    while True: pass\n" if is_first else solutions[request.prompt.text])

    clocked = Clocked(reply)
    run(tmp_path, FakeEngine(clocked), humaneval.HumanEvalSpec(limit=100, timeout_s=4.0))
    assert clocked.span_s < 4.0  # the slow program alone takes as long
    grades = [record.grade for record in load_run(tmp_path).records]
    assert [grade.extracted for grade in grades].count(["timed out"]) == 1
    assert sum(grade.score or 0.0 for grade in grades) == 99


def test_mathematics_is_compared_beside_the_engine() -> None:
    assert isinstance(Math, GradesElsewhere)


# --- any task that waits ---------------------------------------------------------------------------------------------


def test_the_engine_does_not_wait_for_a_slow_grader_and_the_numbers_are_the_same(
    slow: type[Slow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked = Clocked()
    beside = run(tmp_path / "beside", FakeEngine(clocked))
    assert clocked.span_s < 40 * Slow.seconds
    monkeypatch.setitem(TASKS, "toy", "toy:Toy")
    within = run(tmp_path / "within", FakeEngine())
    assert (beside.metrics, beside.rates) == (within.metrics, within.rates)
    assert load_run(tmp_path / "beside").records == load_run(tmp_path / "within").records  # in the same order


def test_what_was_answered_before_the_engine_failed_is_graded_and_kept(slow: type[Slow], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="at request 20"):
        run(tmp_path, FakeEngine(fail_at=20))
    assert len(load_run(tmp_path).records) == 16  # 4 of the 20 have a second question
    again = FakeEngine()
    assert run(tmp_path, again).num_samples == 40
    assert len(again.calls) == 48 - 16


def test_a_sample_that_cannot_be_graded_does_not_keep_its_batch_from_being_kept(
    slow: type[Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "bad", "toy/3")
    task, engine, kept = slow(toy.ToySpec(name="toy", num=6), TaskContext()), FakeEngine(), list[Record]()
    graders = Graders(task, kept.append)
    for sample in task.samples():
        request = task.request(sample, ())
        assert request is not None
        [(_, answer)] = engine.run([request])
        turns = [Turn(request=request, answer=answer)]
        graders.add(Finished(sample=sample, turns=turns, draft=draft_of(engine, sample, turns)))
    with pytest.raises(ZeroDivisionError, match="toy/3"), graders:
        pass  # its thread begins here: all six are one batch
    assert [record.sample_id for record in kept] == [f"toy/{i}" for i in (0, 1, 2, 4, 5)]


def test_a_grader_that_fails_ends_the_run_which_is_resumed(
    slow: type[Slow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "bad", "toy/7")
    with pytest.raises(ZeroDivisionError, match="toy/7"):
        run(tmp_path, FakeEngine())
    ids = {record.sample_id for record in load_run(tmp_path).records}
    assert "toy/7" not in ids
    assert {"toy/1", "toy/6"} <= ids
    monkeypatch.setattr(Slow, "bad", "")
    assert run(tmp_path, FakeEngine()).num_samples == 40


def test_non_finite_answers_are_not_graded_and_the_others_are_kept(slow: type[Slow], tmp_path: Path) -> None:
    overflow = Completions(completions=(Completion(text="!", finish_reason="non-finite", num_tokens=1),))
    with pytest.raises(EngineError, match=r"^11 of 40 samples failed: non-finite"):
        run(tmp_path, FakeEngine(lambda request: overflow if "toy/3" in str(request.prompt) else None))
    assert len(load_run(tmp_path).records) == 29


def test_an_interrupt_in_the_engine_waits_for_the_batch_in_flight_alone(
    slow: type[Slow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "seconds", 0.05)

    def reply(request: Request) -> None:
        if "toy/38" in str(request.prompt):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeEngine(reply))
    assert len(load_run(tmp_path).records) < 30  # that many were answered
    monkeypatch.setattr(Slow, "seconds", 0.0)
    assert run(tmp_path, FakeEngine()).num_samples == 40


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import toy, test_graders
toy.TASKS["toy"] = "test_graders:SlowInBatches"
test_graders.Slow.seconds = float(sys.argv[1])
test_graders.run(Path(sys.argv[2]), test_graders.FakeEngine())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_while_it_grades_is_resumed_to_the_same_numbers(
    number: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent))]
    subprocess.run([*command, "0", str(tmp_path / "whole")], check=True, timeout=60)
    process = subprocess.Popen([*command, "0.2", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    records = tmp_path / "killed" / "records.jsonl"
    while process.poll() is None and not (records.exists() and b"\n" in records.read_bytes()):
        time.sleep(0.01)  # by now the engine has answered all: it is the graders that are waited for
    process.send_signal(number)
    start = time.perf_counter()
    assert process.wait(timeout=30) == -number
    assert time.perf_counter() - start < (BATCH_SAMPLES + 14) * 0.2  # all of the 40 would take longer
    assert 1 <= len(load_run(tmp_path / "killed").records) < 40
    subprocess.run([*command, "0", str(tmp_path / "killed")], check=True, timeout=60)
    results = [json.loads((tmp_path / name / "result.json").read_bytes()) for name in ("whole", "killed")]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["rates"] == results[1]["rates"]
