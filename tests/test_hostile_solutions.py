"""Readers of solutions and programs on a megabyte of anything: a second each, and never an exception."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from qwen_eval.extraction import math, numbers, programs
from qwen_eval.tasks.mbpp import upstream_program

MEGABYTE = 1_000_000
PROMPT = 'import math\n\ndef f(x):\n    """Doc"""\n'
STARTS = ("", "The answer is 5.\n```python\ndef f(x):\n    return x\n")

READERS: dict[str, Callable[[str], object]] = {
    "number": numbers.concluded_number,
    "official number, base": numbers.upstream_base_number,
    "official number, chat": numbers.upstream_chat_number,
    "mathematics": lambda reply: math.is_same(math.concluded_answer(reply), "3"),
    "mathematics, whole reply as the answer": lambda reply: math.is_same(reply, "3"),
    "official mathematics": lambda reply: math.is_same_upstream(math.upstream_answer(reply), "3"),
    "program of a chat": lambda reply: programs.program_in_reply(reply, "f", PROMPT),
    "program of a completion": lambda reply: programs.continued_program(PROMPT, reply),
    "program between marks": lambda reply: programs.program_between_marks(reply, "f"),
    "official program of a chat": lambda reply: programs.upstream_chat_body(reply, "f"),
    "official program between marks": upstream_program,
}
PIECES = (
    *(
        "#### ",
        "\\boxed{",
        "\\boxed ",
        "{",
        "the answer is ",
        "answer\n",
        "答案是",
        "<answer>",
        "I forgot ",
        "not but ",
    ),
    *("\\frac{", "\\text{(", "\\text{", "oxed{", "\\overline{", "$", "\\(", "\\[", "**", "\\sqrt ", "a = ", "(not "),
    *(
        "1",
        "1,111",
        "1.",
        "1/",
        "1 1/2 ",
        "-",
        "½",
        "１",
        " ",
        "\t",
        "\n",
        " \n",
        "\r\n",
        "a",
        "A. ",
        "\nQ:",
        "</think>",
    ),
    *("`", "```", "```\n", "```python\n", "~~~\n", "[BEGIN]\n", "[DONE]", "'", "\\n'\n", ">", ">>> ", "def f(", "def "),
    *(
        "def f(x):\n",
        "if x:\n",
        "f = 1\n",
        "f = f(\n",
        "x = 1\nand so\n",
        "@a\n",
        "a[][",
        "(",
        "(\n",
        '"""',
        "f'{",
        "\\\n",
    ),
    *("\x00", "\ud800", "😀", "for the ", "because "),
)
OFFICIAL_PIECES = (
    *(
        "\\boxed{",
        "\\text{(",
        "\\text{",
        "oxed{",
        "\\overline{",
        "$",
        "answer is ",
        "1",
        "1,111",
        "1.",
        "+1",
        ".",
        " ",
        "\n",
    ),
    *("```", "def f(", "def f", "def ", ":\n", "\n  ", "\n\t", "[BEGIN]", "BEGIN'", "'", "' ", "DONE", "a"),
)


@pytest.mark.parametrize("reader", READERS)
def test_a_megabyte_of_anything_is_read_within_a_second(reader: str) -> None:
    read, slow = READERS[reader], {}
    for piece in OFFICIAL_PIECES if reader.startswith("official") else PIECES:
        for start in STARTS if reader.startswith("program") else STARTS[:1]:
            text = start + piece * (MEGABYTE // len(piece))
            begin = time.process_time()
            read(text)
            if (seconds := time.process_time() - begin) > 1:
                slow[piece] = round(seconds, 1)
    assert not slow
