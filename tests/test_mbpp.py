"""MBPP: the official 3-shot prompt, programs between marks, set-up code behind the solution."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.core import Completion, Completions, DataError, Generate, Sample, Turn
from qwen_eval.extraction.programs import program_between_marks
from qwen_eval.extraction.slicing import called_function
from qwen_eval.tasks.evalplus import plus_test
from qwen_eval.tasks.mbpp import Mbpp, entry_point, names_in_tests, test_source, upstream_program
from qwen_eval.tasks.mbpp import MbppSpec as Spec
from qwen_eval.tasks.registry import TaskContext

test_source.__test__ = False  # type: ignore[attr-defined]
NAMES = ("mbpp", "mbpp_sanitized", "mbpp_plus")


def mbpp(name: str = "mbpp", *, is_chat: bool = False, split: str = "test") -> Mbpp:
    spec = Spec(name=name, data="bundled", split=split, timeout_s=30.0)
    return Mbpp(spec, TaskContext(is_chat=is_chat))


def replied(task: Mbpp, sample: Sample, text: str) -> list[Turn]:
    completion = Completion(text=text, finish_reason="stop", num_tokens=9)
    request = Generate(prompt=task.prompt(sample), max_new_tokens=9)
    return [Turn(request=request, answer=Completions(completions=(completion,)))]


def test_the_test_part_begins_at_id_11() -> None:
    assert mbpp().samples()[0].id == "mbpp/11"
    assert mbpp(split="all").samples()[0].id == "mbpp/11"  # the bundled rows are of the test part


def test_the_prompt_is_three_worked_examples_and_an_open_begin() -> None:
    task = mbpp()
    prompt = task.prompt(task.samples()[0]).text or ""
    assert prompt.count("You are an expert Python programmer") == 4
    assert prompt.count("[DONE]") == 3
    assert prompt.endswith("  \n\n[BEGIN]\n")
    assert "remove_Occ" in prompt


def test_chats_see_the_examples_as_turns() -> None:
    prompt = mbpp(is_chat=True).prompt(mbpp().samples()[0])
    roles = [message.role for message in prompt.messages]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_every_variant_hold_the_task_and_its_tests(name: str) -> None:
    task = mbpp(name)
    for sample in task.samples():
        query = (task.prompt(sample).text or "").rpartition("You are an expert")[2]
        assert f"{entry_point(sample.data)}(" in query
        assert '"""' not in query


@pytest.mark.parametrize(
    "form", ["[BEGIN]\n '{}' \n[DONE]", " '{}' \n[DONE] \n\n ", "```python\n{}\n```", "{}\n[DONE]"]
)
@pytest.mark.parametrize("name", NAMES[:2])
def test_reference_programs_are_read_back_and_pass(name: str, form: str) -> None:
    task = mbpp(name)
    items = [(s, replied(task, s, form.replace("{}", s.data["code"]))) for s in task.samples()[:8]]
    assert [grade.score for grade in task.grade_many(items)] == [1.0] * len(items)


def test_a_program_without_the_function_is_none() -> None:
    assert program_between_marks("[BEGIN]\n 'def g(): pass' \n[DONE]", "f") is None
    assert program_between_marks("I do not know", "f") is None


def test_upstream_reads_between_the_first_marks_and_keeps_what_follows_a_quote() -> None:
    assert upstream_program("[BEGIN]\n 'def f():\n  pass' \n[DONE] \n [BEGIN]") == "def f():\n  pass"
    assert upstream_program(" 'x = 1' \n[DONE]") == "x = 1"
    assert upstream_program("DONE before") == ""


def test_the_entry_point_of_mbpp_is_the_function_its_tests_call() -> None:
    reference = "def helper(x): return x\ndef sum(a, b): return helper(a) + b\n"
    assert called_function("assert sum(1, 2) == 3", reference) == "sum"
    assert called_function("assert 1", reference) == ""


@pytest.mark.parametrize("read", [entry_point, names_in_tests])
def test_what_python_thinks_of_a_rows_code_is_not_printed(read: Callable[[dict[str, Any]], object]) -> None:
    row = {"code": "import re\ndef f(x): return re.match('\\d', x)", "test_list": ["assert f('\\d') is None"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(row)


@pytest.mark.parametrize("part", ["code", "test_setup_code"])
def test_a_row_that_this_python_cannot_read_is_told_before_anything_is_asked(tmp_path: Path, part: str) -> None:
    row = {"task_id": 11, "text": "Write f.", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps({**row, part: "def f(:"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 1: its code or its tests are no Python 3\.\d+"):
        Mbpp(Spec(path=str(tmp_path)), TaskContext()).samples()


def test_set_up_code_stands_behind_the_solution() -> None:
    row = {
        "task_id": 367,
        "code": "class Node:\n    def __init__(self, data):\n        self.data = data\n        self.left = None\n"
        "def is_leaf(node):\n    return node.left is None",
        "test_setup_code": "root = Node(1) \r\nroot.left = Node(2)",
        "test_list": ["assert is_leaf(root) == False", "assert is_leaf(root.left) == True"],
    }
    task = mbpp()
    sample = Sample(id="mbpp/367", data={**row, "text": "Write it."})
    assert entry_point(sample.data) == "is_leaf"
    assert task.grade(sample, replied(task, sample, f"{row['code']}\n[DONE]")).score == 1.0


def test_marks_in_code_are_no_marks() -> None:
    assert program_between_marks("[BEGIN]\ndef f(a, end):\n    return a[end] + 1\n[DONE]", "f") == (
        "def f(a, end):\n    return a[end] + 1\n"
    )


HUB_ROW = {
    "task_id": 17,
    "code": "def square_perimeter(a):\n    return 4 * a\n",
    "prompt": "Write a function to find the perimeter of a square.",
    "test_imports": [],
    "test_list": ["assert square_perimeter(10) == 40", "assert square_perimeter(5) == 20"],
    "test": "import numpy as np\n\ndef assertion(out, exp):\n    assert out == exp or np.allclose(out, exp)\n\n"
    "for inp, exp in zip([[10], [5], [1.5]], [40, 20, 6.0]):\n    assertion(square_perimeter(*inp), exp)\n",
}


@pytest.mark.parametrize(("code", "score"), [("return 4 * a", 1.0), ("return {10: 40, 5: 20}.get(a)", 0.0)])
def test_plus_rows_of_the_hub_are_run_on_their_own_test(tmp_path: Path, code: str, score: float) -> None:
    (tmp_path / "MbppPlus.jsonl").write_text(json.dumps(HUB_ROW) + "\n", encoding="utf-8")
    task = Mbpp(Spec(name="mbpp_plus", path=str(tmp_path), timeout_s=30.0), TaskContext(is_chat=True))
    sample = task.samples()[0]
    reply = f"```python\ndef square_perimeter(a):\n    {code}\n```"
    assert task.grade(sample, replied(task, sample, reply)).score == score


def test_plus_rows_with_nothing_but_the_shown_tests_are_refused(tmp_path: Path) -> None:
    row = {key: value for key, value in HUB_ROW.items() if key != "test"}
    (tmp_path / "MbppPlus.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="not a row of MBPP\\+"):
        Mbpp(Spec(name="mbpp_plus", path=str(tmp_path)), TaskContext()).samples()


def test_plus_references_pass() -> None:
    task = mbpp("mbpp_plus")
    items = [(s, replied(task, s, s.data["canonical_solution"])) for s in task.samples()[:6]]
    assert [grade.score for grade in task.grade_many(items)] == [1.0] * len(items)


def test_plus_leaves_out_what_no_candidate_may_send_back() -> None:
    code = "def combinations_colors(l, n):\n    return [(l[0],) * n]\n"
    row = {"entry_point": "combinations_colors", "canonical_solution": code, "assertion": ""}
    test = plus_test({**row, "base_input": [[["a"], 2]], "plus_input": [[["a"], 77], [["b"], 50]]})
    assert "inputs = [[['a'], 2], [['b'], 50]]" in test
