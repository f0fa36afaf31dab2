"""Tasks and models of the user: docs/own_task.md and docs/own_model.md are carried out as they stand."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from readers import graded

import qwen_eval
from qwen_eval import cli
from qwen_eval.__main__ import main
from qwen_eval.config import EvalSpec
from qwen_eval.core import Choose, DataError, Generate
from qwen_eval.runs import preview_command
from qwen_eval.tasks.own import matches, right_letter
from qwen_eval.tasks.registry import FROM_FILES, TASKS, TaskContext, build
from qwen_eval.tasks.rows import CsvSpec, JsonlSpec

DOCS = Path(__file__).parents[1] / "docs"
FILE = re.compile(r"`([\w./-]+)`:\n\n```\w+\n(.*?)```", re.DOTALL)
ASSETS = Path(qwen_eval.__file__).parent / "assets"
COMMAND = re.compile(r"^```\n(python .*?)\n```", re.MULTILINE | re.DOTALL)
MAINS = {"qwen_eval": main, "qwen_eval.preview": preview_command.main}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory; tasks that a test loads are forgotten after it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in list(FROM_FILES):
        del FROM_FILES[name], TASKS[name]


def write_files(page: str) -> None:
    for name, content in FILE.findall((DOCS / page).read_text()):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)


def commands(page: str) -> list[str]:
    return list(COMMAND.findall((DOCS / page).read_text()))


def run(command: str) -> int:
    module, *arguments = shlex.split(command)[2:]
    return MAINS[module](arguments)


def records(run_dir: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run_dir, "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", commands("own_task.md"))
def test_the_page_of_tasks_works_as_written(command: str) -> None:
    write_files("own_task.md")
    assert run(command) == 0


@pytest.mark.parametrize("command", commands("own_model.md"))
def test_the_page_of_models_works_as_written(command: str, place: Path) -> None:
    write_files("own_model.md")
    copy_nano(place)
    assert run(command) == 0


def copy_nano(place: Path) -> None:
    """A checkpoint that is there stands for the 7B that the page inherits from."""
    shutil.copytree(ASSETS / "qwen-nano", place / "checkpoints" / "my-model")
    yaml = place / "my_conf" / "model" / "my-qwen.yaml"
    yaml.write_text(yaml.read_text().replace("qwen2.5-7b", "qwen-nano"))


def test_a_model_of_the_user_inherits_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    write_files("own_model.md")
    arguments = ["--config-dir", "my_conf", "model=my-qwen-int8-cache", "--cfg", "job", "--package", "model"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for line in ("name: my-qwen-int8-cache", "path: checkpoints/my-model", "hub_id: Qwen/Qwen2.5-7B", "kv_cache: int8"):
        assert f"\n{line}\n" in shown


def test_both_pages_have_files_and_commands() -> None:
    assert [len(commands(page)) for page in ("own_task.md", "own_model.md")] == [5, 3]
    assert len(FILE.findall((DOCS / "own_task.md").read_text())) == 4


def test_rows_of_a_csv_are_asked_with_their_own_options() -> None:
    Path("rows.csv").write_text(
        "question,A,B,C,answer,subject\nOne?,x,y,,B,one\nTwo {A}?,p,q,r,r,two\n", encoding="utf-8"
    )
    task = build(CsvSpec(path="rows.csv"), TaskContext())
    first, second = [task.request(sample, ()) for sample in task.samples()]
    assert isinstance(first, Choose)
    assert isinstance(second, Choose)
    assert first.prompt.text == "Question: One?\nA. x\nB. y\nAnswer:"
    assert (first.choices, second.choices) == ((" A", " B"), (" A", " B", " C"))
    assert "Two {A}?" in str(second.prompt.text)  # a brace in a cell is text
    assert [(sample.target, sample.group) for sample in task.samples()] == [("B", "one"), ("C", "two")]


def test_options_in_one_cell_are_the_same_rows() -> None:
    Path("apart.csv").write_text("question,A,B,answer\nOne?,x,y,B\n")
    Path("joined.csv").write_text("question,options,answer\nOne?,x | y,B\n")
    asked = [build(CsvSpec(path=f"{name}.csv"), TaskContext()) for name in ("apart", "joined")]
    assert asked[0].request(asked[0].samples()[0], ()) == asked[1].request(asked[1].samples()[0], ())


def test_a_chat_model_is_read_by_its_reply() -> None:
    Path("rows.csv").write_text("question,A,B,answer\nOne?,x,y,B\n")
    task = build(CsvSpec(path="rows.csv"), TaskContext(is_chat=True))
    sample = task.samples()[0]
    assert isinstance(task.request(sample, ()), Generate)
    assert [graded(task, sample, reply).score for reply in ("The answer is B.", "A", "no idea")] == [1.0, 0.0, 0.0]


def test_the_first_rows_are_the_examples_and_are_not_scored() -> None:
    Path("rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n{"question": "2+2=", "answer": "4"}\n')
    task = build(JsonlSpec(path="rows.jsonl", shots=1), TaskContext())
    request = task.request(task.samples()[0], ())
    assert isinstance(request, Generate)
    assert (len(task.samples()), request.prompt.text) == (1, "1+1= 2\n\n2+2=")


@pytest.mark.parametrize(
    ("how", "reply", "answer", "is_right"),
    [
        ("exact", " paris ", "Paris", True),
        ("exact", "It is Paris", "Paris", False),
        ("contains", "It is Paris.", "Paris", True),
        ("number", "3 and 4 make 7.0", "7", True),
        ("number", "none", "7", False),
    ],
)
def test_a_reply_matches_in_one_of_three_ways(how: str, reply: str, answer: str, is_right: bool) -> None:
    assert matches(how, reply, answer) == is_right


@pytest.mark.parametrize(
    ("answer", "said"),
    [("D", "is no option"), ("blue", "is no option"), ("red", "names two options"), ("B", "names two options")],
)
def test_an_answer_that_is_not_one_option_is_refused(answer: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        right_letter(answer, {"A": "red", "B": "red", "C": "B"}, "rows.csv line 2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task=csv"], "task=csv: pass task.path=rows.csv"),
        (["task=csv", "task.path=bad.csv"], "bad.csv: bad.csv line 2: answer 'E' is no option"),
        (
            ["task=jsonl", "task.path=rows.jsonl", "task.template={word}"],
            "rows.jsonl row 1: no key 'word'; found question, answer",
        ),
        (["task=csv", "task.path=good.csv", "task.template={word}"], "the template names {word}"),
        (["task=jsonl", "task.path=rows.jsonl", "task.answer=gold"], "no key 'gold'"),
        (["task=jsonl", "task.path=rows.jsonl", "task.match=exactly"], 'did you mean "exact"?'),
        (["task=jsonl", "task.path=rows.jsonl", "protocol=upstream"], "has no official script"),
        (["task.file=none.py"], "task.file=none.py: cannot be read"),
        (["task.file=broken.py"], "task.file=broken.py line 2: NameError"),
        (["task.file=empty.py"], "no task class in it"),
        (["task.file=taken.py"], "mmlu is a task already"),
        (["task.file=two.py"], "holds one, two; name one of them, as task=one"),
        (["task.file=two.py", "task=tow"], 'did you mean "two"?'),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.csv").write_text("question,A,B,answer\nOne?,x,y,E\n")
    Path("good.csv").write_text("question,A,B,answer\nOne?,x,y,A\n")
    Path("rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    Path("broken.py").write_text("import os\nnothing\n")
    Path("empty.py").write_text("x = 1\n")
    head = "from qwen_eval.tasks.own import OwnChoice\n"
    body = "class {}(OwnChoice):\n    def questions(self):\n        return []\n"
    Path("taken.py").write_text(head + body.format("Mmlu"))
    Path("two.py").write_text(head + body.format("One") + body.format("Two"))
    assert main([*arguments, "engine=fake"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_changed_file_does_not_continue_the_run_of_the_old_one(capsys: pytest.CaptureFixture[str]) -> None:
    write_files("own_task.md")
    command = ["task.file=capitals.py", "engine=fake", "quiet=true"]
    assert main([*command, "limit=2"]) == 0
    Path("moved.py").write_bytes(Path("capitals.py").read_bytes())
    assert main(["task.file=moved.py", *command[1:], "limit=2"]) == 0
    assert "was finished before" in capsys.readouterr().out  # the place of the file decides nothing
    Path("capitals.py").write_text(Path("capitals.py").read_text() + "# another\n")
    assert main([*command, "limit=2"]) == 2
    assert "task_file_sha256" in capsys.readouterr().err


def test_a_class_of_all_methods_is_taken_from_a_file_too() -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)[0]
    Path("sums.py").write_text(code)
    assert main(["task.file=sums.py", "task.largest=2", "engine=fake", "engine.fake_reply=4", "run_dir=run"]) == 0
    assert len(records("run")) == 4


def test_a_share_of_the_samples_is_drawn() -> None:
    Path("rows.csv").write_text("question,A,B,answer\n" + "".join(f"Q{i}?,x,y,A\n" for i in range(40)))
    drawn = {}
    for number, limit in enumerate(("10%", "0.1", "4", "20%")):
        assert main(["task=csv", "task.path=rows.csv", "engine=fake", f"limit={limit}", f"run_dir=r{number}"]) == 0
        drawn[limit] = {record["sample_id"] for record in records(f"r{number}")}
    assert len(drawn["4"]) == 4
    assert drawn["10%"] == drawn["0.1"] == drawn["4"] < drawn["20%"]
    assert json.loads(Path("r0/result.json").read_text())["partial"] == {"limit": 0.1}


def test_the_python_interface_takes_a_file_too() -> None:
    write_files("own_task.md")
    spec = cli.compose(["task.file=capitals.py", "model=qwen-nano"], config_name="config", schema=EvalSpec)
    assert (spec.task.name, spec.task.file) == ("capitals", "capitals.py")


def test_a_score_of_parts_is_averaged() -> None:
    write_files("own_task.md")
    text = Path("backwards.py").read_text().replace("float(answer in reply.lower())", "len(reply) / 10")
    Path("backwards.py").write_text(text)
    assert main(["task.file=backwards.py", "engine=fake", "engine.fake_reply=abcde", "run_dir=r"]) == 0
    assert json.loads(Path("r/result.json").read_text())["metrics"]["accuracy"]["value"] == 0.5
