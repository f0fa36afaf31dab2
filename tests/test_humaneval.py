"""HumanEval: official prompts and readings, a reader that keeps the program whole, verdicts from the sandbox."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_gsm8k import golden_rows, ids_sha256

from qwen_eval.core import Completion, Completions, ConfigError, DataError, Generate, Record, Sample, Turn
from qwen_eval.extraction.programs import (
    continued_program,
    longest_program,
    program_in_reply,
    prompt_context,
    upstream_chat_body,
)
from qwen_eval.extraction.symptoms import cut
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.tasks.evalplus import plus_test
from qwen_eval.tasks.humaneval import UPSTREAM_CUTS, HumanEval, chat_question
from qwen_eval.tasks.humaneval import HumanEvalSpec as Spec
from qwen_eval.tasks.registry import TaskContext

DATA = Path(__file__).parent / "data"


def humaneval(*, protocol: str = "robust", is_chat: bool = False, **keys: Any) -> HumanEval:
    return HumanEval(Spec(**keys), TaskContext(protocol=protocol, is_chat=is_chat))


def replied(task: HumanEval, sample: Sample, *texts: str) -> list[Turn]:
    completions = tuple(Completion(text=text, finish_reason="eos", num_tokens=9) for text in texts)
    request = Generate(prompt=task.prompt(sample), max_new_tokens=9)
    return [Turn(request=request, answer=Completions(completions=completions))]


# --- official prompts and readings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", ["humaneval_base", "chat_humaneval"])
def test_prompts_are_the_official_ones_token_for_token(golden: Path, bench: str) -> None:
    tokenizer = load_tokenizer(DATA)
    task = humaneval(is_chat=bench.startswith("chat"))
    samples = {sample.id: sample for sample in task.samples()}
    rows = [row for row in golden_rows(golden, "prompts.jsonl") if row["bench"] == bench]
    assert rows, f"no {bench} rows"
    for row in rows:
        sample = samples[row["task_id"]]
        ids = tokenizer.render(task.prompt(sample))
        assert (len(ids), ids_sha256(ids)) == (row["n_tokens"], row["prompt_ids_sha256"]), row["task_id"]
        if "prompt_text_sha256" in row:
            text = chat_question(sample)
            assert hashlib.sha256(text.encode()).hexdigest() == row["prompt_text_sha256"]


def test_upstream_readings_equal_the_recorded_ones(golden: Path) -> None:
    for row in golden_rows(golden, "extraction/humaneval.jsonl"):
        assert upstream_chat_body(row["response"], row["entry_point"]) == row["chat_code"]
        assert cut(row["response"], UPSTREAM_CUTS) == row["base_decode"]


def body_by_patterns(reply: str, entry_point: str) -> str:
    """The official script's own patterns; quadratic and worse."""
    patterns = (
        rf"```(?:[Pp]ython\n)?.*?def\s+{entry_point}.*?:\n(.*?)\n```",
        rf"def\s+{entry_point}.*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)",
        r"def.*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)",
    )
    matches = (re.search(pattern, reply, re.DOTALL) for pattern in patterns)
    return next((match[1] for match in matches if match), textwrap.indent(reply, "    "))


def test_the_linear_official_reader_reads_what_the_official_patterns_read() -> None:
    pieces = [
        "```",
        "python\n",
        "def",
        " f",
        "def f",
        ":",
        ":\n",
        "\n",
        "  x",
        "\t",
        "\n\n",
        "\n```",
        "y",
        " ",
        "g(x):\n    z",
    ]
    draw = random.Random(5)
    for _ in range(20_000):
        reply = "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        assert upstream_chat_body(reply, "f") == body_by_patterns(reply, "f"), reply


# --- reading programs -----------------------------------------------------------------------------------------------

PROMPT = (
    "import math\n\ndef helper(x):\n    return x\n\n"
    'def area(r: float) -> float:\n    """Area of a circle.\n    >>> area(1)\n    """\n'
)
BODY = "    two = 2\n\n    return math.pi * r ** two"
FUNCTION = f"def area(r):\n{BODY}\n"


@pytest.mark.parametrize(
    "reply",
    [
        f"Here you are:\n```python\n{FUNCTION}```\nIt multiplies.",
        f"```Python\nimport math\n\n{FUNCTION}\nprint(area(1))\nassert area(1) == 3\n```",
        f"~~~\n{FUNCTION}~~~",
        f"```py\n{FUNCTION}",  # cut off, or never closed
        f"Sure!\n\n{FUNCTION}\nThis function does it.",
        FUNCTION.replace("\n", "\r\n"),
        BODY,
        f"```\n{BODY}\n```",
        "two = 2\nreturn math.pi * r ** two",  # a body without its indentation
        f"1. First:\n   ```python\n   {FUNCTION.strip().replace(chr(10), chr(10) + '   ')}\n   ```",
        f"```python\n{FUNCTION}```\nFor example:\n```python\nassert area(1) == 3\n```",
        f"```python\n{FUNCTION}\nif __name__ == '__main__':\n    print(area(float(input())))\n```",
    ],
)
def test_the_program_of_a_reply_is_found_whole(reply: str) -> None:
    program = program_in_reply(reply, "area", PROMPT)
    assert program is not None
    names: dict[str, Any] = {}
    exec(program, names)  # written above, not by a model
    assert round(names["area"](2), 4) == 12.5664
    assert "helper" in names  # the prompt's helpers come along


def test_helpers_of_an_earlier_block_come_along_and_the_last_definition_wins() -> None:
    reply = (
        "```python\nfrom math import pi\ndef square(x):\n    return x * x\nsquare(3)\n```\nFirst try:\n"
        "```python\ndef area(r):\n    return 0\n```\nBetter:\n```python\ndef area(r):\n    return pi * square(r)\n```"
    )
    program = program_in_reply(reply, "area", PROMPT)
    assert program is not None
    assert program.index("def square") < program.rindex("def area")
    names: dict[str, Any] = {}
    exec(program, names)
    assert round(names["area"](1), 2) == 3.14


@pytest.mark.parametrize("reply", ["", "I cannot solve this.", "def area(r):\n", "```python\nprint(1)\n```"])
def test_a_reply_without_the_function_has_no_program(reply: str) -> None:
    assert program_in_reply(reply, "area") is None


@pytest.mark.parametrize("hostile", ["(" * 40_000, "-" * 40_000 + "1", "a." * 20_000, "\0", "if x:\n" * 3000])
def test_hostile_nesting_is_no_program(hostile: str) -> None:
    assert program_in_reply(f"```python\n{hostile}\n```", "area", PROMPT) is None
    assert isinstance(continued_program(PROMPT, hostile), str)


def test_a_completion_loses_only_what_keeps_it_from_running() -> None:
    completion = f"{BODY}\n\nThis is the area, of course.\n"
    assert continued_program(PROMPT, completion).rstrip() == (PROMPT + BODY).rstrip()
    assert continued_program(PROMPT, BODY) == PROMPT + BODY
    assert continued_program(PROMPT, "    return (") == PROMPT.rstrip("\n")  # never less than the prompt


def test_the_longest_program_is_linear_text() -> None:
    assert longest_program("x = 1\ny = 2\nand so on") == "x = 1\ny = 2"
    assert prompt_context(PROMPT, "area").count("def ") == 1


KEPT = [
    # a call that fills what the function reads
    "S = []\ndef fill():\n    S.extend([3, 4])\nfill()\ndef area(r):\n    return S[r]\n",
    "S = None\ndef fill():\n    global S\n    S = [3, 4]\nfill()\ndef area(r):\n    return S[r]\n",
    "S = {}\nfor i in range(3):\n    S[i] = 3 + i\ndef area(r):\n    return S[r]\n",
    "def area(r):\n    return r + TWO\nTWO: int = 3\n",
    "class Solution:\n    def area(self, r):\n        return r + 3\n",
    "from __future__ import annotations\ndef area(r: int) -> int:\n    return r + 3\n",
    "import sys; area = lambda r: r + 3; sys.exit(1)\n",
    "def area(r):\n    return r + 3\narea = area(1)\n",
    "from functools import lru_cache\n@lru_cache(None)\ndef area(r):\n    return r + 3\n",
    "import absent_module\ndef area(r):\n    return r + 3\n@absent_module.mark\ndef test_area():\n    pass\n",
    "n = int(input())\ndef area(r):\n    n = 3\n    return r + n\nprint(area(n))\n",  # its own n is another
    "memo = {}\ndef area(r):\n    memo[r] = r + 3\n    return memo[r]\ndef test():\n    assert area(1) == 5\ntest()\n",
]


@pytest.mark.parametrize("source", KEPT)
def test_what_the_function_needs_is_kept_and_what_only_uses_it_is_not(source: str) -> None:
    program = program_in_reply(f"```python\n{source}```", "area")
    assert program is not None
    names: dict[str, Any] = {}
    exec(program, names)  # written above, not by a model
    assert [names["area"](i) for i in (0, 1)] == [3, 4]


def test_a_stub_or_an_import_behind_the_function_is_not_the_function() -> None:
    for usage in ("from solution import area\nprint(area(1))", "def area(r):\n    ..."):
        program = program_in_reply(f"```python\n{FUNCTION}```\nUse it:\n```python\n{usage}\n```", "area", PROMPT)
        assert program is not None
        assert "two = 2" in program


# --- the task -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples() -> Sequence[Sample]:
    return humaneval().samples()


def test_the_package_carries_the_164_problems(samples: Sequence[Sample]) -> None:
    assert [sample.id for sample in samples] == [f"HumanEval/{i}" for i in range(164)]


def test_a_batch_is_graded_as_each_alone(samples: Sequence[Sample]) -> None:
    task = humaneval()
    items = [(s, replied(task, s, s.data["canonical_solution"])) for s in samples[:12]]
    items[3] = (samples[3], replied(task, samples[3], "    return None"))
    grades = task.grade_many(items)
    assert [grade.score for grade in grades] == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert task.grade(*items[3]) == grades[3]


def test_upstream_ends_a_solution_at_the_first_blank_line(samples: Sequence[Sample]) -> None:
    sample = samples[0]
    body = "    n = len(numbers)\n\n    for i in range(n):\n        for j in range(i):\n"
    body += "            if abs(numbers[i] - numbers[j]) < threshold:\n                return True\n    return False\n"
    for protocol in ("robust", "upstream"):
        task = humaneval(protocol=protocol)
        grade = task.grade(sample, replied(task, sample, body))
        assert (grade.score, grade.score_upstream) == (1.0, 0.0)
        assert grade.extracted != grade.extracted_upstream


def test_upstream_loses_the_imports_of_a_chat_reply(samples: Sequence[Sample]) -> None:
    sample = next(s for s in samples if s.id == "HumanEval/2")
    reply = "```python\nimport math\n\ndef truncate_number(number):\n    return number - math.floor(number)\n```"
    task = humaneval(is_chat=True)
    grade = task.grade(sample, replied(task, sample, reply))
    assert (grade.score, grade.score_upstream) == (1.0, 0.0)


def test_several_completions_give_pass_at_k(samples: Sequence[Sample]) -> None:
    task = humaneval(samples_per_problem=3, temperature=0.8, k=[1, 2])
    sample = samples[0]
    request = task.request(sample, [])
    assert isinstance(request, Generate)
    assert (request.n, request.sampling.temperature) == (3, 0.8)
    grade = task.grade(sample, replied(task, sample, sample.data["canonical_solution"], "    return 7", ""))
    record = Record(
        sample_id=sample.id, group="", cluster="", target=None, prompts=(), prompt_sha256=(), num_prompt_tokens=(),
        answers=(), grade=grade,
    )  # fmt: skip
    metrics = task.summarise([record])
    assert metrics["pass@1"].value == pytest.approx(1 / 3)
    assert metrics["pass@2"].value == pytest.approx(2 / 3)
    assert grade.flags == ("empty", "no_answer")


def test_pass_at_k_is_of_the_protocol_in_force(samples: Sequence[Sample]) -> None:
    keys = {"samples_per_problem": 3, "temperature": 0.8, "k": [2]}
    task, sample = humaneval(**keys), samples[0]
    solution = sample.data["canonical_solution"]  # cut at its blank line upstream
    grade = task.grade(sample, replied(task, sample, solution, solution.replace("\n\n", "\n"), "    return 7"))
    record = Record(
        sample_id=sample.id, group="", cluster="", target=None, prompts=(), prompt_sha256=(), num_prompt_tokens=(),
        answers=(), grade=grade,
    )  # fmt: skip
    assert task.summarise([record])["pass@2"].value == pytest.approx(1.0)
    upstream = humaneval(protocol="upstream", **keys)
    assert upstream.summarise([record.under("upstream")])["pass@2"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("keys", [{"samples_per_problem": 4}, {"k": [10]}, {"mode": "cht"}])
def test_settings_that_cannot_work_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        humaneval(**keys)


# --- HumanEval+ -----------------------------------------------------------------------------------------------------


def test_a_folder_of_humaneval_is_no_humaneval_plus(tmp_path: Path) -> None:
    rows = [sample.data for sample in HumanEval(Spec(), TaskContext()).samples()]
    (tmp_path / "HumanEval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"row 1: no plus_input, a row of HumanEval and not of HumanEval\+"):
        HumanEval(Spec(name="humaneval_plus", path=str(tmp_path)), TaskContext()).samples()
    plus = [sample.data for sample in HumanEval(Spec(name="humaneval_plus", data="bundled"), TaskContext()).samples()]
    (tmp_path / "HumanEvalPlus.jsonl").write_text("\n".join(map(json.dumps, plus)))
    task = HumanEval(Spec(name="humaneval_plus", path=str(tmp_path)), TaskContext())
    assert [sample.data for sample in task.samples()] == plus


def test_humaneval_is_graded_on_its_own_tests_though_the_file_has_more(tmp_path: Path) -> None:
    row = HumanEval(Spec(name="humaneval_plus", data="bundled"), TaskContext()).samples()[0].data
    (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(row))
    task = HumanEval(Spec(path=str(tmp_path)), TaskContext())
    assert task.program(task.samples()[0], "").test == row["test"]


def test_plus_rows_pass_with_their_reference_and_fail_without() -> None:
    task = HumanEval(Spec(name="humaneval_plus", data="bundled", timeout_s=30.0), TaskContext())
    samples = task.samples()[:8]
    items = [(s, replied(task, s, s.data["canonical_solution"])) for s in samples]
    assert [grade.score for grade in task.grade_many(items)] == [1.0] * len(items)
    wrong = [(s, replied(task, s, "    return None")) for s in samples]
    assert [grade.score for grade in task.grade_many(wrong)] == [0.0] * len(items)


def test_tuples_that_json_lost_are_put_back() -> None:
    row = {
        "entry_point": "f",
        "canonical_solution": "def f(t, xs):\n    return hash(t) and len(xs)\n",
        "assertion": "assert f((1, (2, 3)), [1]) == 1",
        "base_input": [[[1, [2, 3]], [1]]],
        "plus_input": [[[4, [5, [6]]], []]],
        "atol": 0,
    }
    inputs = next(n for n in ast.parse(plus_test(row)).body if isinstance(n, ast.Assign) and "inputs" in ast.unparse(n))
    assert ast.literal_eval(inputs.value) == [[(1, (2, 3)), [1]], [(4, (5, (6,))), []]]
    assert json.dumps(row)  # as the file holds it
