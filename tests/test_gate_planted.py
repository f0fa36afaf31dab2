"""Twelve planted changes and their harmless twins through the gate; docs/ci.md holds the table that this makes.

`python tests/test_gate_planted.py` writes the table into docs/ci.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from report_runs import answered, chose, record, said, write, write_profile, write_run

from qwen_eval.core import ChoiceLogprobs, QwenEvalError, Record
from qwen_eval.report.__main__ import run_report
from qwen_eval.report.baseline import accept
from qwen_eval.report.comparison import Margins
from qwen_eval.report.config import ReportSpec
from qwen_eval.report.gate import GateReport
from qwen_eval.report.gate import gate as run_gate

DOC = Path(__file__).parent.parent / "docs" / "ci.md"
BEGIN, END = "<!-- the planted changes: python tests/test_gate_planted.py -->", "<!-- end -->"
NUM = 200


# --- the runs of the state that is trusted ---------------------------------------------------------------------------


def generated() -> list[Record]:
    """Two of three are right."""
    return answered([float(i % 3 > 0) for i in range(NUM)])


def chosen() -> list[Record]:
    return [record(f"c{i}", chose(i % 4), float(i % 3 > 0), extracted="ABCD"[i % 4]) for i in range(NUM)]


def cell(name: str, decode: float, gib: float = 2.0) -> dict[str, Any]:
    noise = (0.99, 1.0, 1.01)
    return {
        "name": name, "batch": 1, "prompt_tokens": 512, "new_tokens": 128, "status": "ok",
        "tok_per_s": [decode * x for x in noise], "decode_tok_per_s": [decode * x for x in noise],
        "prefill_tok_per_s": [9 * decode * x for x in noise], "ttft_s": [5 / decode * x for x in noise],
        "peak_bytes": int(gib * 2**30), "load_s": 4.0,
    }  # fmt: skip


CELLS = (cell("serve", 40.0), cell("int8", 700.0, 1.0))


@dataclass
class Project:
    """The runs of today, equal to the baseline until a change is planted."""

    runs: Path

    @property
    def generative(self) -> Path:
        return self.runs / "eval" / "gsm8k" / "qwen-7b-chat" / "default"

    @property
    def choices(self) -> Path:
        return self.runs / "eval" / "mmlu" / "qwen-7b-chat" / "default"

    @property
    def profile(self) -> Path:
        return self.runs / "profile" / "decode" / "qwen-7b-chat" / "default"

    @staticmethod
    def made(runs: Path) -> Project:
        write_run(runs, generated())
        write_run(runs, chosen(), task="mmlu")
        project = Project(write_profile(runs, [1.0]).parents[3])
        project.cells(*CELLS)
        return project

    def cells(self, *cells: dict[str, Any]) -> None:
        self.edit(self.profile / "result.json", lambda result: result.update(cells=list(cells)))

    def edit(self, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        value = json.loads(path.read_text())
        change(value)
        write(path, value)

    def lines(self, change: Callable[[list[str]], list[str]]) -> None:
        path = self.generative / "records.jsonl"
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    def rerun(self, records: list[Record], task: str = "gsm8k") -> None:
        """The run of `task` again with other answers: records and result agree."""
        other = write_run(self.runs.parent / "other", records, task=task)
        for name in ("records.jsonl", "result.json"):
            (other / name).replace((self.generative if task == "gsm8k" else self.choices) / name)


# --- what is planted, and its twin -----------------------------------------------------------------------------------


def sixty_lost(project: Project) -> None:
    """By other words, and one gained by another reading of the same words."""
    rows = generated()
    right = [i for i, row in enumerate(rows) if row.grade.score][:60]
    for i in right:
        rows[i] = record(f"q{i}", said("It is B, I think."), 0.0, extracted="B")
    rows[0] = dataclasses.replace(rows[0], grade=dataclasses.replace(rows[0].grade, score=1.0, extracted="A"))
    project.rerun(rows)


def sixty_one_reworded(project: Project) -> None:
    rows = generated()
    for i in range(61):
        rows[i] = dataclasses.replace(rows[i], answers=(said(f"I say {rows[i].grade.extracted}."),))
    project.rerun(rows)


def graded(**change: Any) -> Callable[[Project], None]:
    def plant(project: Project) -> None:
        rows = generated()
        for i in range(60):
            rows[i] = dataclasses.replace(rows[i], grade=dataclasses.replace(rows[i].grade, **change))
        project.rerun(rows)

    return plant


def logprobs(change: Callable[[float], float]) -> Callable[[Project], None]:
    def plant(project: Project) -> None:
        rows = chosen()
        for i in range(60):
            [answer] = rows[i].answers
            assert isinstance(answer, ChoiceLogprobs)
            changed = dataclasses.replace(answer, logprobs=tuple(map(change, answer.logprobs)))
            rows[i] = dataclasses.replace(rows[i], answers=(changed,))
        project.rerun(rows, task="mmlu")

    return plant


def result_edited(project: Project) -> None:
    project.edit(project.generative / "result.json", lambda result: result["metrics"]["accuracy"].update(value=0.97))


def result_reformatted(project: Project) -> None:
    path = project.generative / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))


def same_key_twice(project: Project) -> None:
    write_run(project.runs / "again", generated())


def another_tag(project: Project) -> None:
    write_run(project.runs / "again", generated(), tag="again")


def named(model: str) -> Callable[[Project], None]:
    def plant(project: Project) -> None:
        path = write_run(project.runs, generated(), model="other")
        project.edit(path / "spec.json", lambda spec: spec["config"]["model"].update(name=model))

    return plant


def spec_changed(change: dict[str, Any]) -> Callable[[Project], None]:
    return lambda project: project.edit(project.generative / "spec.json", lambda spec: spec.update(change))


def escaped(line: str) -> str:
    return json.dumps(json.loads(line), ensure_ascii=True, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`task` and `where`: the row of the gate that is looked at."""

    what: str
    plant: Callable[[Project], None]
    twin_is: str
    twin: Callable[[Project], None]
    task: str = "gsm8k"
    where: str = ""


CASES = (
    Case(what="60 of 200 answers lost by other words, 1 gained by another reading", plant=sixty_lost,
         twin_is="61 answers in other words, read the same", twin=sixty_one_reworded),
    Case(what="60 scores are null", plant=graded(score=None),
         twin_is="60 upstream scores are null", twin=graded(score_upstream=None)),
    Case(what="60 log-probabilities are NaN", plant=logprobs(lambda x: math.nan), task="mmlu",
         twin_is="60 log-probabilities differ in the sixth digit", twin=logprobs(lambda x: x + 1e-6)),
    Case(what="the score in result.json was edited", plant=result_edited,
         twin_is="result.json was formatted anew", twin=result_reformatted),
    Case(what="half of the records are gone", plant=lambda p: p.lines(lambda lines: lines[: NUM // 2]),
         twin_is="the records are in another order", twin=lambda p: p.lines(lambda lines: lines[::-1])),
    Case(what="decoding at half speed in one of two cells", plant=lambda p: p.cells(cell("serve", 40.0) | {
             "decode_tok_per_s": [19.8, 20.0, 20.2]}, CELLS[1]), task="decode", where="serve, decode",
         twin_is="decoding 2 % slower", twin=lambda p: p.cells(cell("serve", 40.0) | {
             "decode_tok_per_s": [38.8, 39.2, 39.6]}, CELLS[1])),
    Case(what="twice the memory in one of two cells", plant=lambda p: p.cells(cell("serve", 40.0, 4.0), CELLS[1]),
         task="decode", where="serve, memory",
         twin_is="2 % more memory", twin=lambda p: p.cells(cell("serve", 40.0, 2.04), CELLS[1])),
    Case(what="one of two cells is gone", plant=lambda p: p.cells(CELLS[0]), task="decode", where="int8",
         twin_is="the cells are in another order", twin=lambda p: p.cells(*CELLS[::-1])),
    Case(what="two runs of one task, model and tag", plant=same_key_twice,
         twin_is="two runs with different tags", twin=another_tag),
    Case(what="another run's model is named `../../../x`", plant=named("../../../x"),
         twin_is="it is named `x-1.0`", twin=named("x-1.0")),
    Case(what="one line of records.jsonl is damaged", plant=lambda p: p.lines(lambda x: [*x[:-1], x[-1][:-9]]),
         twin_is="one line is written in another way", twin=lambda p: p.lines(lambda x: [*x[:-1], escaped(x[-1])])),
    Case(what="spec.json is of another format", plant=spec_changed({"format": 99}),
         twin_is="spec.json names other packages", twin=spec_changed({"provenance": {"packages": {"torch": "9"}}})),
)  # fmt: skip


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    verdict: str
    report: GateReport
    gate: int
    accept: int


def exit_code(spec: ReportSpec) -> int:
    """Of the command, without the half second that parsing it takes."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return run_report(spec)
        except QwenEvalError:
            return 2


def outcome(case: Case, plant: Callable[[Project], None], trusted: Path, place: Path) -> Outcome:
    shutil.copytree(trusted, place)
    project = Project(place / "runs")
    plant(project)
    report = run_gate(place / "baselines", [str(project.runs)], Margins())
    gate = exit_code(ReportSpec(runs=[str(project.runs)], gate=str(place / "baselines")))
    accept = exit_code(ReportSpec(accept=[str(project.runs)], gate=str(place / "new")))
    words = case.where.split(", ")
    rows = [j for j in report.judgements if j.comparison.task == case.task]
    row = next(j for j in rows if all(word in j.comparison.label for word in words))
    return Outcome(verdict=row.verdict, report=report, gate=gate, accept=accept)


def outcomes() -> Iterator[tuple[Case, Outcome, Outcome]]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        trusted = place / "trusted"
        accept([str(Project.made(trusted / "runs").runs)], trusted / "baselines")
        for i, case in enumerate(CASES):
            yield (
                case,
                outcome(case, case.plant, trusted, place / f"{i}-planted"),
                outcome(case, case.twin, trusted, place / f"{i}-twin"),
            )


def table(found: list[tuple[Case, Outcome, Outcome]]) -> str:
    lines = [
        "| planted change | verdict | gate | accept | harmless twin | verdict | gate | accept |",
        "|---|---|---:|---:|---|---|---:|---:|",
    ]
    lines += [
        f"| {case.what} | {a.verdict} | {a.gate} | {a.accept} | {case.twin_is} | {b.verdict} | {b.gate} | {b.accept} |"
        for case, a, b in found
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def found() -> list[tuple[Case, Outcome, Outcome]]:
    return list(outcomes())


def test_the_table_of_the_docs_is_what_the_gate_does(found: list[tuple[Case, Outcome, Outcome]]) -> None:
    committed = DOC.read_text().split(BEGIN)[1].split(END)[0].strip("\n") + "\n"
    assert committed == table(found)


def test_every_planted_change_is_refused_somewhere_and_no_twin_is(found: list[tuple[Case, Outcome, Outcome]]) -> None:
    for case, planted, twin in found:
        assert (planted.gate, planted.accept) != (0, 0), case.what
        assert (twin.gate, twin.accept) == (0, 0), case.twin_is


def test_the_other_runs_are_judged_all_the_same(found: list[tuple[Case, Outcome, Outcome]]) -> None:
    for case, planted, _ in found:
        others = [j.verdict for j in planted.report.judgements if j.comparison.task != case.task]
        assert others, case.what
        assert set(others) == {"unchanged"}, case.what


if __name__ == "__main__":
    before, rest = DOC.read_text().split(BEGIN)
    DOC.write_text(f"{before}{BEGIN}\n\n{table(list(outcomes()))}\n{END}{rest.split(END)[1]}")
