"""Prompts to the last character, and to the last token id of the recorded ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from exams import EXAMS, asked, sha256_of_ids

from qwen_eval.core import Choose, Generate, Prompt
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.tasks.prompts import CHINESE_EXAM_BASE, CHINESE_EXAM_CHAT, MMLU_BASE, MMLU_CHAT, chat_shots, few_shot

SHOT = {"question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
QUERY = {"question": "Is {A} a set?", "A": "yes", "B": "no", "C": "", "D": "nan"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parent / "data")


def test_mmlu_base_form() -> None:
    text = few_shot(MMLU_BASE, [SHOT], QUERY, head={"subject": "abstract algebra"})
    assert text == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Question: 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Question: Is {A} a set?\nA. yes\nB. no\nC. \nD. nan\nAnswer:"
    )


def test_chinese_base_form_without_shots() -> None:
    assert few_shot(CHINESE_EXAM_BASE, [], SHOT) == "问题：1+1?\nA. 1\nB. 2\nC. 3\nD. 4\n答案："


def test_chat_forms() -> None:
    assert chat_shots(CHINESE_EXAM_CHAT, [], SHOT) == Prompt.user("1+1?\n\nA. 1\nB. 2\nC. 3\nD. 4\n")
    assert chat_shots(MMLU_CHAT, [], SHOT) == Prompt.user(
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the"
        " answer to this question.\n\n1+1?\nA. 1\nB. 2\nC. 3\nD. 4\n"
    )


def test_chat_shots_are_earlier_turns() -> None:
    roles = [(m.role, m.content[:4]) for m in chat_shots(CHINESE_EXAM_CHAT, [SHOT], QUERY).messages]
    assert roles == [("user", "1+1?"), ("assistant", "B"), ("user", "Is {")]


@pytest.mark.parametrize("exam", EXAMS)
def test_base_prompts_are_those_of_the_official_scripts(golden: Path, exam: str, tokenizer) -> None:
    for row, task, sample in asked(golden, f"{exam}_base.jsonl", exam, mode="base"):
        request = task.request(sample, ())
        assert isinstance(request, Choose)
        assert request.prompt.text is not None
        ids = tokenizer.render(request.prompt)[-(request.max_prompt_tokens or 1 << 30) :]
        assert hashlib.sha256(request.prompt.text.encode()).hexdigest() == row["prompt_text_sha256"], sample.id
        assert (len(ids), sha256_of_ids(ids)) == (row["n_tokens"], row["prompt_ids_sha256"]), sample.id
        assert sample.target == row["ref"]


@pytest.mark.parametrize("exam", EXAMS)
def test_without_the_scripts_bugs_only_cuts_and_misread_cells_differ(golden: Path, exam: str, tokenizer) -> None:
    for row, task, sample in asked(golden, f"{exam}_base.jsonl", exam, mode="base", protocol="robust"):
        request = task.request(sample, ())
        assert isinstance(request, Choose)
        assert request.max_prompt_tokens is None
        ids = tokenizer.render(request.prompt)[-(task.max_prompt_tokens or 1 << 30) :]  # the official cut, made here
        is_same = sha256_of_ids(ids) == row["prompt_ids_sha256"]
        assert is_same == (not row.get("raw_csv_prompt_differs")), sample.id


@pytest.mark.parametrize("exam", ["mmlu", "ceval"])
def test_chat_prompts_are_those_of_the_official_scripts(golden: Path, exam: str, tokenizer) -> None:
    for row, task, sample in asked(golden, "prompts.jsonl", exam, mode="chat"):
        request = task.request(sample, ())
        assert isinstance(request, Generate)
        ids = tokenizer.render(request.prompt)
        assert (len(ids), sha256_of_ids(ids)) == (row["n_tokens"], row["prompt_ids_sha256"]), sample.id
