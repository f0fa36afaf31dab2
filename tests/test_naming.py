"""A checkpoint given by its place has its own name, form and shape, never those of the default model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from tiny_checkpoint import write_tiny_qwen2

from qwen_eval.__main__ import main
from qwen_eval.models.naming import checkpoint_name, is_chat

Command = Callable[..., tuple[int, str]]
IM_END = {"151643": {"content": "<|endoftext|>"}, "151645": {"content": "<|im_end|>"}}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
DEEPSEEK = "{{ bos_token }}{% for m in messages %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endfor %}"


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def command(tmp_path: Path, qwen2: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """A command line in a directory with the checkpoint `my-tune`; (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(qwen2, "my-tune")
    toy.register()

    def call(*arguments: str) -> tuple[int, str]:
        code = main(["task=toy", "task.num=3", "task.max_new_tokens=2", *arguments])
        return code, capfd.readouterr().err

    return call


def stored_model(root: Path) -> dict[str, Any]:
    (spec,) = (root / "runs").rglob("spec.json")
    model: dict[str, Any] = json.loads(spec.read_text())["config"]["model"]
    assert spec.parents[1].name == model["name"]
    return model


def test_a_directory_alone_names_the_model_and_says_that_it_chats(tmp_path: Path, command: Command) -> None:
    code, error = command("model.path=my-tune/")
    assert code == 0, error
    model = stored_model(tmp_path)
    assert (model["name"], model["chat"], model["asset"], model["arch"]) == ("my-tune", True, None, {})


def test_random_weights_of_a_directory_have_its_shape(tmp_path: Path, command: Command) -> None:
    code, error = command("model.path=my-tune", "model.weights=random")
    assert code == 0, error
    assert (stored_model(tmp_path)["name"], stored_model(tmp_path)["arch"]) == ("my-tune", {})


def test_what_the_user_says_of_the_directory_stands(tmp_path: Path, command: Command) -> None:
    code, error = command("model.path=my-tune", "model.name=best", "model.chat=false")
    assert code == 0, error
    model = stored_model(tmp_path)
    assert (model["name"], model["chat"]) == ("best", False)


def test_two_layers_are_no_72b(tmp_path: Path, command: Command) -> None:
    code, error = command("model=qwen2.5-72b-instruct", "model.path=my-tune")
    assert code == 2
    assert "my-tune: is no qwen2.5-72b-instruct: num_layers is 2, not 80; pass model.name=NAME" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    code, error = command("model=qwen2.5-72b-instruct", "model.path=my-tune", "model.name=small")
    assert code == 0, error
    assert stored_model(tmp_path)["name"] == "small"


def test_another_family_is_another_model(command: Command) -> None:
    code, error = command("model=qwen-7b-chat", "model.path=my-tune")
    assert code == 2
    assert "is no qwen-7b-chat: family is qwen2, not qwen" in error


def test_an_endpoint_is_named_after_its_model(
    tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    server = ("engine=openai", "engine.api_model=Org/Model-7B", "engine.base_url=http://127.0.0.1:9/v1")
    code, error = command(*server)
    assert code == 2
    assert "no server answers" in error
    assert not (tmp_path / "runs").exists(), "a run that never began leaves no directory"
    assert main(["task=toy", "task.num=3", *server, "plan=true"]) == 0
    assert "toy · Model-7B: plan" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/models/my-tune/", "my-tune"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6499f32faf8b98477b0a26969ef7d8b9987", "Qwen2.5-0.5B"),
        ("/models/.hidden dir", "hidden-dir"),
        ("/models/我的模型", "我的模型"),
        ("/", "model"),
    ],
)
def test_the_name_is_a_plain_file_name(place: str, name: str) -> None:
    assert checkpoint_name(place) == name


@pytest.mark.parametrize(
    ("generation", "tokenizer", "chats"),
    [
        ({"chat_format": "raw"}, {}, False),  # Qwen-7B
        ({"chat_format": "chatml"}, {}, True),  # Qwen-7B-Chat
        # Qwen2.5-7B: a base model with the template of its chat sister
        ({"eos_token_id": 151643}, {"chat_template": CHATML, "eos_token": "<|endoftext|>"}, False),
        ({"eos_token_id": [151645, 151643]}, {"chat_template": CHATML, "eos_token": "<|im_end|>"}, True),
        ({"eos_token_id": [151645, 151643]}, {"chat_template": CHATML, "eos_token": "<|endoftext|>"}, True),
        ({}, {"chat_template": DEEPSEEK, "eos_token": {"content": "<｜end▁of▁sentence｜>"}}, True),
        ({}, {"chat_template": [{"name": "default", "template": CHATML}], "eos_token": "<|im_end|>"}, True),
        ({}, {"eos_token": "<|im_end|>"}, False),
        ({"eos_token_id": "x"}, {"chat_template": 3, "eos_token": 3, "added_tokens_decoder": [1]}, False),
    ],
)
def test_a_model_chats_when_it_ends_texts_as_it_ends_turns(
    tmp_path: Path, generation: dict[str, Any], tokenizer: dict[str, Any], chats: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": IM_END, **tokenizer}))
    assert is_chat(tmp_path) is chats
