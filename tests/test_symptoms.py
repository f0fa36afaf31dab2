"""What a reader may look at of a reply, and what is counted beside its score."""

from __future__ import annotations

import pytest

from qwen_eval.core import Completion
from qwen_eval.extraction.symptoms import READ_CHARACTERS, answer_part, flags


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ("<think>\nB? No.\n</think>\n\nA", "\n\nA"),
        ("the template opened the reasoning\n</think>A", "A"),
        ("<think>1</think>no, wait <think>2</think>A", "A"),
        ("<think>B? No, then", ""),  # cut off while it thought
        ("Answer: A\n<think>The next question", "Answer: A\n"),
        ("</think>", ""),
        ("A", "A"),
        ("", ""),
    ],
)
def test_reasoning_is_no_answer(reply: str, part: str) -> None:
    assert answer_part(reply) == part


def test_only_the_end_of_a_long_answer_is_read_and_the_record_says_so() -> None:
    text = "The answer is A. " + "x" * READ_CHARACTERS
    assert answer_part(text) == "x" * READ_CHARACTERS
    long = Completion(text=text, finish_reason="length", num_tokens=9)
    assert "overlong" in flags(long, has_answer=False)
    thought = Completion(text=f"<think>{text}</think>B", finish_reason="eos", num_tokens=9)
    assert "overlong" not in flags(thought, has_answer=True)
