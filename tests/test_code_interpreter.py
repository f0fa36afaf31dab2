"""The code interpreter: variables that stay, executions that end an episode, and what is scored of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qwen_eval.core import Completion, Completions, ConfigError, DataError, Generate, Grade, Record, Sample, Turn
from qwen_eval.tasks.code_interpreter import CodeInterpreter, InterpreterSpec, code_of, read_call, upstream_number
from qwen_eval.tasks.registry import TaskContext


def interpreter(protocol: str = "robust", **keys: Any) -> CodeInterpreter:
    return CodeInterpreter(InterpreterSpec(**{"data": "bundled", **keys}), TaskContext(protocol=protocol, is_chat=True))


def call(code: str, thought: str = "Let me compute.") -> str:
    return f" {thought}\nAction: code_interpreter\nAction Input:\n```py\n{code}\n```\n"


def asked(task: CodeInterpreter, sample: Sample, replies: Sequence[str]) -> list[Turn]:
    """The turns of a model that says these replies; the task must ask exactly so often."""
    turns: list[Turn] = []
    while (request := task.request(sample, turns)) is not None:
        completion = Completion(text=replies[len(turns)], finish_reason="stop", num_tokens=9)
        turns.append(Turn(request=request, answer=Completions(completions=(completion,))))
    assert len(turns) == len(replies)
    return turns


def prefill(turn: Turn) -> str:
    assert isinstance(turn.request, Generate)
    return turn.request.prompt.prefill


def test_variables_stay_from_one_execution_to_the_next() -> None:
    task = interpreter()
    sample = task.samples()[0]
    replies = [call("eggs = 16 - 3 - 4\nprint(eggs)"), call("eggs * 2"), f" I know.\nFinal Answer: {sample.target}"]
    turns = asked(task, sample, replies)
    assert prefill(turns[1]) == replies[0].rstrip() + "\nObservation: stdout:\n\n```\n9\n```\nThought:"
    assert prefill(turns[2]).endswith("\nObservation: execute_result:\n\n```\n18\n```\nThought:")
    grade = task.grade(sample, turns)
    assert (grade.score, grade.score_upstream, grade.values["executable"]) == (1.0, 1.0, 1.0)


def test_the_same_replies_give_the_same_episode_in_another_process() -> None:
    """A run that was killed is resumed with nothing but its answers: the variables come back by running the cells."""
    replies = [call("import random\nx = random.random()\nprint(x)"), call("print(x)"), " So 7.\nFinal Answer: 7"]
    first, second = interpreter(), interpreter()
    sample = first.samples()[0]
    turns = asked(first, sample, replies)
    assert second.replay(sample, turns[:2]).text == first.replay(sample, turns[:2]).text
    assert prefill(turns[2]).count(second.replay(sample, turns[:1]).results[0].output.strip()) == 2


@pytest.mark.parametrize(
    ("code", "observation"),
    [
        ("while True:\n    pass", "error:\n\n```\nTimeout: Code execution exceeded the time limit.\n```"),
        ("import torch", "error:\n\n```\nModuleNotFoundError: No module named 'torch'\n```"),
        ("import socket\nsocket.socket()", "error:\n\n```\nPermissionError: [Errno 1] Operation not permitted\n```"),
        ("import os\nos._exit(0)", "error:\n\n```\nkilled\n```"),
        ("1 / 0", "error:\n\n```\nZeroDivisionError: division by zero\n```"),
    ],
)
def test_an_error_is_observed_and_ends_the_episode(code: str, observation: str) -> None:
    task = interpreter(timeout_s=1.0)
    sample = task.samples()[0]
    turns = asked(task, sample, [call(code)])
    assert task.replay(sample, turns).text.endswith(f"\nObservation: {observation}\nThought:")
    grade = task.grade(sample, turns)
    assert (grade.score, grade.values["executable"]) == (0.0, 0.0)


def test_a_flood_is_cut_before_the_model_reads_it() -> None:
    task = interpreter(output_characters=50)
    sample = task.samples()[0]
    turns = asked(task, sample, [call("for i in range(10**6): print('flood')"), "Final Answer: 1"])
    assert len(prefill(turns[1])) < 300
    assert "... (5,999,950 more characters)" in prefill(turns[1])


def test_at_most_three_executions() -> None:
    task = interpreter()
    sample = task.samples()[0]
    grade = task.grade(
        sample, asked(task, sample, [call("print(1)"), call("print(2)"), call(f"print({sample.target})")])
    )
    assert grade.values["executions"] == 3
    assert grade.score == 1.0  # the last number is the observation's, as in the official script


def test_a_call_in_the_first_line_is_missed_by_the_official_parser_alone() -> None:
    reply = "Action: code_interpreter\nAction Input: ```py\nprint(1)\n```"
    assert read_call(reply, is_upstream=False)[1:] == ("code_interpreter", "print(1)\n")
    assert read_call(reply, is_upstream=True)[1:] == ("", "")


def test_code_is_read_from_fences_quotes_json_or_plain_text() -> None:
    assert code_of("```python\na = 1\n```\nmore ```x\ny\n```") == "a = 1\n"
    assert code_of("`a = 1`") == "a = 1"
    assert code_of('{"code": "a = 1"}') == "a = 1"
    assert code_of("a = 1") == "a = 1"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", 18),
        ("costs $1,234 in all", 1),  # what stands before a comma is enough for it
        ("is -3.5 now", -3.5),
        ("#### 42", 42),
        ("x=5", None),  # no space or sign before it
        ("is 18\nand no more", None),  # the line break becomes two characters there
    ],
)
def test_the_official_number_is_the_last_between_spaces(text: str, number: float | None) -> None:
    assert upstream_number(text) == number


# --- the official questions -----------------------------------------------------------------------------------------

EASY = (
    "Plot it<|im_end|>\n<|im_start|>assistant\nThought: load.\nAction: code_interpreter\nAction Input:\n```py\n"
    "import csv\nrows = list(csv.reader(open('d.csv')))\nprint(len(rows))\n```\n"
    "Observation: stdout:\n\n```\n2\n```\nThought:"
)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {"query": "How many lines?", "tags": "all_ci,general", "lang": "en", "input_file_path": ["upload_file/d.csv"]},
        {"query": "画折线图", "tags": "all_ci,visualization", "lang": "zh", "input_file_path": ["upload_file/d.csv"]},
        {"query": EASY, "tags": "all_ci,visualization", "lang": "en", "input_file_path": ["upload_file/d.csv"]},
        {"query": "Sum 1 to 10", "tags": "all_ci,math", "lang": "en", "input_file_path": []},
    ]
    (tmp_path / "eval_code_interpreter_v1.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "upload_file").mkdir()
    (tmp_path / "upload_file" / "d.csv").write_text("a,1\nb,2\n")
    return tmp_path


def graded(task: CodeInterpreter, replies: Sequence[Sequence[str]]) -> list[Record]:
    grades = [task.grade(sample, asked(task, sample, said)) for sample, said in zip(task.samples(), replies)]
    return [_record(sample, grade) for sample, grade in zip(task.samples(), grades)]


def _record(sample: Sample, grade: Grade) -> Record:
    return Record(
        sample_id=sample.id, group=sample.group, cluster="", target=None, prompts=(), prompt_sha256=(),
        num_prompt_tokens=(), answers=(), grade=grade,
    )  # fmt: skip


PLOT = call("plt.plot([1, 2])\nplt.show()")
REPLIES = [
    [call("print(len(open('d.csv').readlines()))")],
    [PLOT, " Done.\nFinal Answer: see it"],
    [call("plt.plot([float(row[1]) for row in rows])"), " Done."],  # `rows` was made by the question's own execution
    [call("print(sum(range(11))")],  # a bracket is missing
]


def test_official_questions_are_read_with_their_files_and_without_a_judge_only_run(questions: Path) -> None:
    task = interpreter(path=str(questions))
    assert [sample.group for sample in task.samples()] == [
        "general", "visualization_hard", "visualization_easy", "math_code",
    ]  # fmt: skip
    first = task.request(task.samples()[1], ())
    assert isinstance(first, Generate)
    assert first.prompt.messages[0].content.endswith("Question: [上传文件d.csv]画折线图")
    metrics = task.summarise(graded(task, REPLIES))
    assert {name: metric.value for name, metric in metrics.items()} == {
        "math_executable_rate": 0.0, "visualization_executable_rate": 1.0, "general_executable_rate": 1.0,
    }  # fmt: skip
    assert any("no judge" in note for note in task.notes)


class Judge(BaseHTTPRequestHandler):
    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        said = "right" if "问题" in body["messages"][0]["content"][0]["text"] else "wrong"
        reply = {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]}
        data = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", **reply}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge_url() -> Iterator[str]:
    pytest.importorskip("openai")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_sees_the_picture_and_its_word_counts(questions: Path, judge_url: str) -> None:
    task = interpreter(path=str(questions), judge_base_url=judge_url, judge_model="vl")
    metrics = task.summarise(graded(task, REPLIES))
    assert metrics["visualization_hard_accuracy"].value == 1.0
    assert metrics["visualization_easy_accuracy"].value == 0.0
    image = Judge.seen[0]["messages"][0]["content"][1]["image_url"]["url"]
    assert image.startswith("data:image/png;base64,iVBOR")
    assert not task.notes


def test_a_judge_needs_its_model_and_a_question_its_file(questions: Path) -> None:
    with pytest.raises(ConfigError, match="judge_model"):
        interpreter(judge_base_url="http://localhost:1/v1")
    (questions / "upload_file" / "d.csv").unlink()
    task = interpreter(path=str(questions))
    with pytest.raises(DataError, match=r"no input file d\.csv"):
        asked(task, task.samples()[0], REPLIES[0])
