"""`qwen_eval.list` names what there is, as it is composed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwen_eval import cli
from qwen_eval.__main__ import main as evaluation
from qwen_eval.report.inventory import inherited
from qwen_eval.report.list_command import main


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_every_task_model_and_engine_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for what, folder in (("tasks", "task"), ("models", "model"), ("engines", "engine")):
        lines = listed(capsys, what).splitlines()
        names = {path.stem for path in (cli.conf_dir() / folder).glob("*.yaml")}
        assert names <= {line.split()[0] for line in lines if line.strip()}, what


def test_a_row_says_where_from_and_how_much_was_published(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (row,) = [line for line in listed(capsys, "models", "int4").splitlines() if line.startswith("qwen-7b-chat-int4")]
    name, place, form, quant, published = row.split()
    assert (name, place, form, quant) == ("qwen-7b-chat-int4", "Qwen/Qwen-7B-Chat-Int4", "chat", "gptq-int4")
    assert int(published) > 0
    assert "hub: openai/gsm8k, sample  MIT  " in listed(capsys, "tasks", "gsm8k")
    assert "sample  CC BY-NC-SA 4.0  " in listed(capsys, "tasks", "cmmlu")


@pytest.mark.parametrize("name", ["qwen-7b-chat-int4", "qwen2.5-7b-instruct", "qwen-nano-chat", "qwen3-8b"])
def test_inherited_keys_are_those_that_are_composed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation([f"model={name}", "--cfg", "job", "--package", "model"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    for key, value in inherited([cli.conf_dir()], name).items():
        if key != "arch":
            assert composed[key] == value, key


def test_a_folder_of_the_user_is_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [qwen-7b-chat, _self_]\nname: mine\npath: here\n")
    text = listed(capsys, "models", "mine", f"--config-dir={tmp_path}")
    assert ["mine", "here", "chat", "none", "–"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["modles"], 'did you mean "models"?'),
        (["tasks", "a", "b"], "written tasks|models|engines [word]"),
        (["models", "loop", "--config-dir=loop"], "model/loop.yaml: inherits from itself"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop" / "model").mkdir(parents=True)
    (tmp_path / "loop" / "model" / "loop.yaml").write_text("defaults: [loop, _self_]\n")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
