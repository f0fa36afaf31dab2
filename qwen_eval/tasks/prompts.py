"""Few-shot text as the official scripts write it: plain templates and the functions that fill them.

A template names the columns of a row in braces: `"Question: {question}\\nAnswer: {answer}"`. Filling never looks
inside a cell, so braces in a question are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_eval.core import Message, Prompt


@dataclass(frozen=True, kw_only=True)
class ShotFormat:
    """`head` once, `example` for every shot, `query` for the question itself (no blank after its last character)."""

    example: str
    query: str
    head: str = ""


OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}\n"

MMLU_BASE = ShotFormat(
    head="The following are multiple choice questions (with answers) about {subject}.\n\n",
    example="Question: {question}\n" + OPTIONS + "Answer: {answer}\n\n",
    query="Question: {question}\n" + OPTIONS + "Answer:",
)
MMLU_CHAT = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
    "answer to this question.\n\n{question}\n" + OPTIONS
)
CHINESE_EXAM_BASE = ShotFormat(
    example="问题：{question}\n" + OPTIONS + "答案：{answer}\n\n",
    query="问题：{question}\n" + OPTIONS + "答案：",
)
CHINESE_EXAM_CHAT = "{question}\n\n" + OPTIONS


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
        + "".join(form.example.format_map(shot) for shot in shots)
        + form.query.format_map(row)
    )


def chat_shots(template: str, shots: Sequence[Mapping[str, str]], row: Mapping[str, str]) -> Prompt:
    """A chat that asks `row` after earlier turns, in which each shot was asked and answered with its `answer`.

    Without a system message: the checkpoint's own default stands.
    """
    messages: list[Message] = []
    for shot in shots:
        messages.append(Message(role="user", content=template.format_map(shot)))
        messages.append(Message(role="assistant", content=shot["answer"]))
    messages.append(Message(role="user", content=template.format_map(row)))
    return Prompt(messages=tuple(messages))
