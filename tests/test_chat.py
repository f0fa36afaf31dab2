"""Chats of Qwen v1 are rendered as the original renders them, history and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_eval.core import Message, Prompt
from qwen_eval.models.tokenizer import V1_SYSTEM, QwenTokenizer, read_ranks


@pytest.fixture(scope="module")
def qwen() -> QwenTokenizer:
    return QwenTokenizer(read_ranks(Path(__file__).parent / "data" / "qwen.tiktoken"))


def test_contexts_equal_the_original(golden: Path, qwen: QwenTokenizer) -> None:
    rows = [json.loads(line) for line in (golden / "tokenizer" / "make_context.jsonl").read_text().splitlines()]
    chats = [row for row in rows if row.get("chat_format", "chatml") == "chatml"]
    assert len(chats) > 100
    for row in chats:
        num_kept = row["raw_text"].count("<|im_start|>user") - 1  # the original drops what its window cannot hold
        if row["raw_text"].count("<|im_start|>") != 2 * num_kept + 3:
            continue  # a message that itself shows the mark
        prompt = chat(row, num_kept)
        assert qwen.render(prompt) == row["context_tokens"]
        assert qwen.render_text(prompt) == row["raw_text"]


def chat(row: dict[str, object], num_kept: int) -> Prompt:
    """The question of a recorded turn behind its newest exchanges."""
    history = list(row["history"] or [])  # type: ignore[call-overload]
    messages = [Message(role="system", content=str(row.get("system", V1_SYSTEM)))]
    for question, reply in history[len(history) - num_kept :]:
        messages += [Message(role="user", content=question), Message(role="assistant", content=reply)]
    return Prompt(messages=(*messages, Message(role="user", content=str(row["query"]))))
