"""Rows as exams do not expect them: any number of options, a question asked twice, the right text at two letters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from readers import replied
from test_choice_tasks import exam, letters, mmlu_folder, record

from qwen_eval.core import Choose, Record, Turn
from qwen_eval.data.rows import TableRow
from qwen_eval.tasks.choice import ChoiceTask
from qwen_eval.tasks.mmlu import Mmlu, MmluSpec
from qwen_eval.tasks.registry import TaskContext

FIVE = {"question": "Q?", "A": "v", "B": "w", "C": "x", "D": "y", "E": "z", "answer": "E"}
TWO = {"question": "Is it?", "A": "yes", "B": "no", "answer": "B"}


class Mixed(Mmlu):
    """An exam whose rows have five and two options."""

    def read(self, subject: str, split: str) -> list[TableRow]:
        return [TableRow(cells=dict(FIVE), where="row 0"), TableRow(cells=dict(TWO), where="row 1")]


def mixed(*, is_chat: bool = False, shots: int = 1) -> ChoiceTask:
    return Mixed(MmluSpec(name="mmlu", data="bundled", shots=shots), TaskContext(is_chat=is_chat))


def test_a_row_may_have_any_number_of_options() -> None:
    task = mixed()
    five, two = task.samples()[:2]
    request = task.request(five, ())
    assert isinstance(request, Choose)
    assert request.choices == (" A", " B", " C", " D", " E")
    assert (request.prompt.text or "").endswith("Question: Q?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:")
    answer = letters(*(math.log(p) for p in (0.1, 0.1, 0.1, 0.1, 0.4)))
    grade = task.grade(five, [Turn(request=request, answer=answer)])
    assert (grade.extracted, grade.extracted_upstream, grade.score) == ("E", "E", 1.0)
    assert grade.values["p"] == pytest.approx({"A": 0.125, "B": 0.125, "C": 0.125, "D": 0.125, "E": 0.5})
    assert sum(grade.values["official_prob"]) == pytest.approx(1.0)
    request = task.request(two, ())
    assert isinstance(request, Choose)
    assert request.choices == (" A", " B")


def test_a_chat_is_told_and_may_answer_any_of_the_letters() -> None:
    task = mixed(is_chat=True, shots=0)
    five = task.samples()[0]
    request = task.request(five, ())
    assert request is not None
    assert "among A, B, C, D and E as the answer" in request.prompt.messages[-1].content
    assert task.grade(five, replied("The answer is E.")).score == 1.0
    assert task.grade(five, replied("A - wrong, B - wrong, C - wrong, D - wrong, E - correct")).score == 1.0
    assert task.grade(five, replied("nothing like it")).extracted is None


def test_a_question_asked_twice_is_one_draw(tmp_path: Path) -> None:
    folder = mmlu_folder(tmp_path, "Q?,a,b,c,d,A\nQ?,d,c,b,a,D\nOther?,a,b,c,d,B\n")
    (folder / "test" / "virology_test.csv").write_text("Q? ,a,b,c,d,A\n")
    (folder / "dev" / "virology_dev.csv").write_text((folder / "dev" / "anatomy_dev.csv").read_text())
    task = exam("mmlu", path=str(folder), shots=1)
    clusters = {sample.id: sample.cluster for sample in task.samples()}
    assert clusters == {"anatomy/0": "anatomy/0", "anatomy/1": "", "anatomy/2": "", "virology/0": "anatomy/0"}


def doubled(num: int, *, is_clustered: bool) -> list[Record]:
    """`num` questions of one subject, each twice, the second answered as the first."""
    import dataclasses

    rows = [(i, k, record("anatomy", float(i % 3 > 0), 2 * i + k)) for i in range(num) for k in (0, 1)]
    return [dataclasses.replace(row, cluster=f"anatomy/{2 * i}" if is_clustered else "") for i, k, row in rows]


def test_repeated_questions_widen_the_interval_of_score_category_and_subject() -> None:
    task = exam("mmlu")
    once, twice = (task.summarise(doubled(60, is_clustered=flag)) for flag in (False, True))
    for name in ("accuracy", "accuracy_upstream", "accuracy/stem", "accuracy/anatomy"):
        assert twice[name].value == once[name].value
        assert twice[name].num_clusters == 60
        narrow, wide = ((m.high or 0.0) - (m.low or 0.0) for m in (once[name], twice[name]))
        assert wide == pytest.approx(narrow * math.sqrt(2), rel=0.06)


def test_rows_with_the_right_text_at_two_letters_are_named(tmp_path: Path) -> None:
    folder = mmlu_folder(tmp_path, "Q?,687,687,1493,1695,A\nR?,a,a,b,c,C\n")
    assert exam("mmlu", path=str(folder), shots=0).notes == [
        "1 of 2 rows have the text of the right option at two letters: anatomy/0"
    ]
