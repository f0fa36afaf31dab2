"""Few-shot text as the official scripts write it: plain templates and the functions that fill them.

A template names the columns of a row in braces: `"Question: {question}\\nAnswer: {answer}"`. `{options}` are the lines
"A. ..." of all its options, `{letters}` the words "A, B, C and D". Filling never looks inside a cell, so braces in a
question are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from string import ascii_uppercase

from qwen_eval.core import Message, Prompt


@dataclass(frozen=True, kw_only=True)
class ShotFormat:
    """`head` once, `example` for every shot, `query` for the question itself (no blank after its last character)."""

    example: str
    query: str
    head: str = ""


MMLU_BASE = ShotFormat(
    head="The following are multiple choice questions (with answers) about {subject}.\n\n",
    example="Question: {question}\n{options}Answer: {answer}\n\n",
    query="Question: {question}\n{options}Answer:",
)
MMLU_CHAT = (
    "The following is a multiple-choice question. Please choose the most suitable one among {letters} as the "
    "answer to this question.\n\n{question}\n{options}"
)
CHINESE_EXAM_BASE = ShotFormat(
    example="问题：{question}\n{options}答案：{answer}\n\n",
    query="问题：{question}\n{options}答案：",
)
CHINESE_EXAM_CHAT = "{question}\n\n{options}"


def option_letters(row: Mapping[str, object]) -> tuple[str, ...]:
    """The letters of a row's options: its columns A, B, C ... as far as they go."""
    return tuple(takewhile(row.__contains__, ascii_uppercase))


def filled(template: str, row: Mapping[str, str]) -> str:
    """The template with the cells of a row."""
    letters = option_letters(row)
    named = " and ".join([", ".join(letters[:-1]), letters[-1]] if len(letters) > 1 else letters)
    options = "".join(f"{letter}. {row[letter]}\n" for letter in letters)
    return template.format_map({**row, "options": options, "letters": named})


def few_shot(
    form: ShotFormat,
    shots: Sequence[Mapping[str, str]],
    row: Mapping[str, str],
    *,
    head: Mapping[str, str] | None = None,
) -> str:
    """`head` + one example a shot + the query; `head` fills the template's head."""
    return (
        form.head.format_map(head or {})
        + "".join(filled(form.example, shot) for shot in shots)
        + filled(form.query, row)
    )


def chat_shots(template: str, shots: Sequence[Mapping[str, str]], row: Mapping[str, str]) -> Prompt:
    """A chat that asks `row` after earlier turns, in which each shot was asked and answered with its `answer`.

    Without a system message: the checkpoint's own default stands.
    """
    messages: list[Message] = []
    for shot in shots:
        messages.append(Message(role="user", content=filled(template, shot)))
        messages.append(Message(role="assistant", content=shot["answer"]))
    messages.append(Message(role="user", content=filled(template, row)))
    return Prompt(messages=tuple(messages))
