"""A preview shows what a run asks: the same tokens, and how its answers are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_eval.__main__ import main
from qwen_eval.models.hub import asset_dir
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.runs import preview_command
from qwen_eval.runs.preview import marked


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def preview(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert preview_command.main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("model", ["qwen-nano", "qwen-nano-chat"])
def test_the_tokens_are_those_of_the_run(model: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["task=nano", f"model={model}", "limit=4", "task.max_new_tokens=2"]
    text = preview(capsys, *arguments, "samples=4")
    assert list(place.iterdir()) == []  # nothing is written
    assert main([*arguments, "quiet=true", "run_dir=run"]) == 0
    for line in Path("run/records.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert f"{record['num_prompt_tokens'][0]} tokens, sha256 {record['prompt_sha256'][0][:12]}" in text
        assert f"=== sample {record['sample_id']}:" in text


def test_a_special_token_is_told_from_text_that_looks_like_one() -> None:
    tokenizer = load_tokenizer(asset_dir("qwen-nano"))
    ids = [*tokenizer.encode("a<|im_start|>"), *tokenizer.encode("<|im_start|>b", parse_special=True)]
    assert marked(ids, tokenizer) == "a<|im_start|>⟦<|im_start|>⟧b"


def test_a_reply_is_read_as_in_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["task=gsm8k", "task.data=bundled", "model=qwen-nano-chat", "samples=1"]
    text = preview(capsys, *arguments, "reply=First 3, so it's 42, [I] think.")
    assert "would be read as '42': score 0.0" in text
    assert "score 1.0" in preview(capsys, *arguments)  # the right answer itself


def test_choices_are_shown_with_their_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    text = preview(capsys, "task=mmlu", "task.data=bundled", "model=qwen-nano", "samples=1")
    assert "choices, by their log-probability: ' A' [" in text
    assert "would be read as" in text


def test_an_engine_without_tokens_shows_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = preview(capsys, "task=gsm8k", "task.data=bundled", "engine=fake", "samples=1")
    assert "Question:" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["samples=0"], "samples=0: must be at least 1"),
        (["model=qwen-7b"], "model.hub_id=Qwen/Qwen-7B: HF_HUB_OFFLINE is set and no copy is cached"),
        (["sample=3"], 'did you mean "samples"?'),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert preview_command.main(["task=nano", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
