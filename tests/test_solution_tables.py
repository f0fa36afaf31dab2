"""Realistic replies to arithmetic, mathematics and programming questions: what we make of them, beside the official
scripts (data/replies/README.md). A program is read rightly when what is read passes the tests, or fails as it should.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.core import Completion, Completions, Generate, Grade, Prompt, Sample, Turn
from qwen_eval.tasks.gsm8k import Gsm8k
from qwen_eval.tasks.humaneval import HumanEval
from qwen_eval.tasks.math import Math
from qwen_eval.tasks.mbpp import Mbpp
from qwen_eval.tasks.registry import TaskContext

TABLES = ("gsm8k", "math", "humaneval", "mbpp")
ROWS = {
    name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for name in TABLES
    for path in [Path(__file__).parent / "data" / "replies" / f"{name}.jsonl"]
}
TASKS = {
    "gsm8k": lambda context: Gsm8k(Gsm8k.Spec(data="bundled"), context),
    "math": lambda context: Math(Math.Spec(data="bundled"), context),
    "humaneval": lambda context: HumanEval(HumanEval.Spec(timeout_s=20.0), context),
    "mbpp": lambda context: Mbpp(Mbpp.Spec(data="bundled", timeout_s=20.0), context),
}
THOUGHT = "<think>\nThe answer is \\boxed{12345}? No.\n```python\ndef f(x):\n    return 0\n```\n</think>\n\n"


def replied(reply: str) -> list[Turn]:
    completion = Completion(text=reply, finish_reason="eos", num_tokens=9)
    request = Generate(prompt=Prompt.raw("?"), max_new_tokens=9)
    return [Turn(request=request, answer=Completions(completions=(completion,)))]


def sample_of(table: str, row: dict[str, Any], samples: dict[str, Sample]) -> Sample:
    if table == "gsm8k":
        target = row["right"] or "999"
        return Sample(id="x", data={"question": "?", "answer": f"#### {target}"}, target=target)
    if table == "math":
        return Sample(id="x", data={"problem": "?"}, target=row["gold"])
    return samples[str(row["problem"])]


def graded(table: str, rows: list[dict[str, Any]], before: str = "") -> list[Grade]:
    grades: dict[int, Grade] = {}
    for form in ("chat", "base"):
        task = TASKS[table](TaskContext(is_chat=form == "chat"))
        samples = {sample.id.rpartition("/")[2]: sample for sample in task.samples()}
        of_form = [i for i, row in enumerate(rows) if row.get("form", "chat") == form]
        items = [(sample_of(table, rows[i], samples), replied(before + rows[i]["reply"])) for i in of_form]
        many = task.grade_many(items) if hasattr(task, "grade_many") else [task.grade(*item) for item in items]
        grades |= dict(zip(of_form, many))
    return [grades[i] for i in range(len(rows))]


@functools.cache
def grades_of(table: str) -> list[Grade]:
    return graded(table, ROWS[table])


def ours(table: str, grade: Grade) -> str | bool | None:
    return grade.extracted if table == "gsm8k" else bool(grade.score)


def is_official_right(table: str, row: dict[str, Any]) -> bool:
    return bool(row["official_right"] if table == "gsm8k" else row["official"] == row["right"])


@pytest.mark.parametrize("table", TABLES)
def test_each_table_holds_sixty_replies_with_their_sources(table: str) -> None:
    rows = ROWS[table]
    assert len(rows) >= 60
    assert len({(row["reply"], row.get("gold")) for row in rows}) == len(rows)
    assert all(row["source"] for row in rows)
    assert [row["kept_back"] for row in rows] == [i % 3 == 2 for i in range(len(rows))]


@pytest.mark.parametrize("table", TABLES)
def test_the_table_says_what_both_readers_read(table: str) -> None:
    for row, grade in zip(ROWS[table], grades_of(table)):
        assert ours(table, grade) == row["ours"], (row["source"], row["reply"])
        official = grade.extracted_upstream if table == "gsm8k" else bool(grade.score_upstream)
        assert official == row["official"], (row["source"], row["reply"])
        assert bool(grade.score_upstream) == row.get("official_right", official), row["reply"]


@pytest.mark.parametrize("kept_back", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_at_least_97_of_100_replies_are_read_rightly(table: str, kept_back: bool) -> None:
    pairs = [pair for pair in zip(ROWS[table], grades_of(table)) if pair[0]["kept_back"] or not kept_back]
    missed = [row["reply"] for row, grade in pairs if ours(table, grade) != row["right"]]
    assert len(missed) <= 0.03 * len(pairs), missed


@pytest.mark.parametrize("table", TABLES)
def test_what_the_official_script_reads_rightly_so_do_we_or_the_table_says_why_not(table: str) -> None:
    for row, grade in zip(ROWS[table], grades_of(table)):
        if is_official_right(table, row):
            assert ours(table, grade) == row["right"] or row.get("reason"), row


@pytest.mark.parametrize("table", TABLES)
def test_reasoning_in_front_changes_no_reading(table: str) -> None:
    rows = [row for row in ROWS[table] if "think>" not in row["reply"] and row.get("form") != "base"]
    for row, grade in zip(rows, graded(table, rows, THOUGHT)):
        assert ours(table, grade) == row["ours"], row["reply"]


@pytest.mark.parametrize("table", TABLES)
def test_the_readme_says_both_shares(table: str) -> None:
    rows = ROWS[table]
    ours_right = sum(row["ours"] == row["right"] for row in rows) / len(rows)
    official_right = sum(is_official_right(table, row) for row in rows) / len(rows)
    line = f"| {table} | {len(rows)} | {ours_right:.1%} | {official_right:.1%} |".replace("%", " %")
    assert line in (Path(__file__).parent / "data" / "replies" / "README.md").read_text().splitlines()
