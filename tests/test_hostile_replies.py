"""A megabyte of anything is read within a second: what a model writes must not stop a run."""

from __future__ import annotations

import time

import pytest
from readers import READERS

MEGABYTE = 1_000_000
PIECES = (
    *(
        "#",
        "#### ",
        "\\",
        "\\boxed{",
        "\\text{",
        "\\frac{1}{",
        "$",
        "*",
        "**",
        "_",
        "`",
        "```",
        "```python\n",
        "|",
        "- ",
    ),
    *("(", ")", "[", "]", "{", "}", "<", ">", "[[", "()", '"', "'", "“", ",", ", ", ".", ":", "?\nA.\n", "____\n", "="),
    *("1", "1,", "1 ", "1/", "-1", "0.", "9e9", " ", "\t", "\n", " \n", "\r\n", "\u3000", "\u0301", "a\u0301\u0316"),
    *("x", "word ", "A", "A ", "A,", "A or ", "(A) ", "A. x\n", "A: wrong\n", "B is correct. ", "ABCD", "I think "),
    *(
        "answer",
        "answer is ",
        "the answer is A",
        "The answer is not ",
        "option ",
        "choose ",
        "so ",
        "if ",
        "not ",
        "n't ",
    ),
    *(
        "yes ",
        "no, ",
        "true = ",
        "not valid ",
        "选",
        "答案",
        "答案是",
        "选项",
        "当选",
        "不",
        "错误，",
        "A项：正确，不当选。",
        "是",
    ),
    *("<think>", "</think>", "<answer>", "Question: ", "\nQ:", "Action: ", "\nAction: x\nAction Input: ", "Thought:"),
    *("def f():\n", "import ", "return ", "\\n", "\x00", "\ud800", "😀", "ß", "İ"),
)


@pytest.mark.parametrize("reader", READERS)
def test_a_megabyte_of_anything_is_read_within_a_second(reader: str) -> None:
    read, slow = READERS[reader], {}
    read("The answer is A.")  # what is imported at the first reading is not part of it
    for piece in PIECES:
        text = "The answer is A. " + piece * (MEGABYTE // len(piece)) + "x"
        start = time.process_time()
        read(text)
        if (seconds := time.process_time() - start) > 1:
            slow[piece] = round(seconds, 1)
    assert not slow
