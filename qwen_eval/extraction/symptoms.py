"""Symptoms of a generated text, before extraction: truncated, looping, empty; and where the answer in it ends."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwen_eval.core import Completion, Completions, Turn

LOOP_TAIL = 2_000  # characters of the end that are looked at
LOOP_CHARACTERS = 80  # a repetition shorter than this is emphasis, a table rule or a round number
LOOP_REPEATS = 4
READ_CHARACTERS = 20_000  # of the end of an answer: a bound on what a hostile or looping reply costs its reader

_NEXT_QUESTION = re.compile(r"\s*\**(?:Question|Q|Human|User|问题|题目|问)\s?\d{0,4}\**[:：]")
_BLANK_OR_MARK = re.compile(r"[?？]\s*$|_{2,}|[(（]\s{0,9}[)）]|^\s*(?:下列|以下|下面)")
_HEAD_OF_EXAM = re.compile(r"\s*(?:以下是(?:中国)?关于.{0,60}题|The following are multiple choice questions)")
_OPTION_A = re.compile(r"\s*[(（]?A\s?[.．、:：)）]")

REASONING_START, REASONING_END = "<think>", "</think>"


INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


def visible_answer(reply: str) -> str:
    """`answer_part` without what nobody sees: zero-width characters, marks of direction."""
    return INVISIBLE.sub("", answer_part(reply))


def answer_part(reply: str) -> str:
    """What a reader looks at: the reply behind its reasoning, and of that the last 20,000 characters.

    Everything up to the last `</think>` is dropped, and everything from a `<think>` that never ends: a model that was
    cut off while it thought has not answered.

    >>> answer_part("<think>B? No.</think>\\n\\nA"), answer_part("<think>B? No."), answer_part("A")
    ('\\n\\nA', '', 'A')
    """
    return _behind_reasoning(reply)[-READ_CHARACTERS:]


def _behind_reasoning(reply: str) -> str:
    return reply.rpartition(REASONING_END)[2].partition(REASONING_START)[0]


def before_next_question(text: str) -> str:
    """The answer alone, where the model goes on with questions of its own: "C\\n\\nQuestion: ...".

    A line that asks and is followed by an option A counts as such a question, when something stands before it.
    """
    lines = text.split("\n")
    is_begun = False
    for i, line in enumerate(lines):
        if is_begun and _begins_question(lines[i : i + 3]):
            return "\n".join(lines[:i])
        is_begun = is_begun or bool(line.strip())
    return text


def _begins_question(lines: list[str]) -> bool:
    """Whether the first of these lines names a question, or asks one and the next offers an option A."""
    if _NEXT_QUESTION.match(lines[0]) or _HEAD_OF_EXAM.match(lines[0]):
        return True
    following = next((line for line in lines[1:] if line.strip()), "")
    return bool(_BLANK_OR_MARK.search(lines[0]) and _OPTION_A.match(following))


def cut(text: str, stops: Iterable[str]) -> str:
    """`text` before the earliest of `stops`; all of it when none occurs."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def is_looping(text: str) -> bool:
    """Whether the text ends in one piece said at least four times over at least 80 characters.

    `"and so on and so on and so on ..."`. The last repetition may be cut short. Counting (`1, 2, 3, ...`) is no loop.
    """
    tail = text.rstrip()[-LOOP_TAIL:][::-1]
    border = [0] * len(tail)  # Knuth-Morris-Pratt: tail[:i] has the shortest period i - border[i - 1]
    for i in range(1, len(tail)):
        k = border[i - 1]
        while k and tail[i] != tail[k]:
            k = border[k - 1]
        border[i] = k + (tail[i] == tail[k])
        length, period = i + 1, i + 1 - border[i]
        if length >= LOOP_CHARACTERS and length >= LOOP_REPEATS * period:
            return True
    return False


def flags(completion: Completion, *, has_answer: bool) -> tuple[str, ...]:
    """The symptoms counted beside every generative score, as `Grade.flags` names them.

    "overlong": the answer is longer than what its reader looks at, its end.
    """
    symptoms = {
        "truncated": completion.finish_reason == "length",
        "filtered": completion.finish_reason == "filtered",
        "empty": not completion.text.strip(),
        "looping": is_looping(completion.text),
        "no_answer": not has_answer,
        "overlong": len(_behind_reasoning(completion.text)) > READ_CHARACTERS,
    }
    return tuple(name for name, is_seen in symptoms.items() if is_seen)


def completions_of(turn: Turn) -> tuple[Completion, ...]:
    """What a generation turn brought back."""
    assert isinstance(turn.answer, Completions), f"a generation is answered by completions, not {type(turn.answer)}"
    return turn.answer.completions
