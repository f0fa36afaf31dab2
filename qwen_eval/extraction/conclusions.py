"""Finding the conclusion of a worked solution: shared by the extraction of numbers and of mathematics.

Every function takes a bounded text (`answer_part`) and is linear in its length.
"""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{ ])")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace
ANY_BRACE = re.compile(r"[{}]")  # but it is one to the official readers

# What a text that runs on begins its next question with; nothing from there on belongs to the answer.
NEXT_ITEM = re.compile(
    r"(?<=\S)\s?(?:Question:|<\|(?:im_end|im_start|endoftext|eot_id)\|>)"
    r"|\n(?:Q|Problem|问题|Human|User|(?:#{1,4} )?Instruction)\s?[:：]"
    r"|\n(?:Problem|Question|Exercise|Example|Q|问题|题目|练习)\s?(?:[2-9]|\d\d)\s?[:：.]"
)
RETRACTION = re.compile(
    r"\b(?:(?:that|this|it)(?:'s| is| was) (?:wrong|incorrect|not (?:right|correct))"
    r"|(?:i|we) (?:made an? (?:mistake|error)|forgot|miscounted|miscalculated|misread|overlooked)"
    r"|oops|(?:no, wait|wait, no)(?=[:,.—-])"
    r"|correction:|let me (?:correct|redo|recalculate|recompute|fix) (?:that|this|it|my))"
    r"|不对|错了|更正|算错",
    re.IGNORECASE,
)


def single_spaced(text: str) -> str:
    """Runs of blanks as one blank, without empty lines: a regex that skips blanks is then linear."""
    return re.sub(r"\n\s+", "\n", re.sub(r"[^\S\n]+", " ", text))


def before_next_item(text: str) -> str:
    """`text` before the first question that it puts to itself."""
    begin = len(text) - len(text.lstrip())
    next_item = NEXT_ITEM.search(text, begin + 1)
    return text[: next_item.start()] if next_item else text


def behind_retraction(text: str) -> str:
    """What follows the last time that a text takes back what it said, "" when it never does.

    >>> behind_retraction("The answer is 20. Wait, that is wrong: it is 18.")
    ': it is 18.'
    """
    end = 0
    for match in RETRACTION.finditer(text):
        end = match.end()
    return text[end:] if end else ""


def boxes(text: str, brace: re.Pattern[str] = BRACE) -> list[str | None]:
    r"""What stands in each `\boxed{}` or `\fbox{}`, in order, braces balanced; None for one that does not close."""
    return [content for _, content in placed_boxes(text, brace)]


def placed_boxes(text: str, brace: re.Pattern[str] = BRACE) -> list[tuple[int, str | None]]:
    """(where it begins, what stands in it) of each box."""
    closing = _closing_braces(text, brace)
    return [(match.start(), _box_content(text, match.end(), closing)) for match in BOX.finditer(text)]


def _box_content(text: str, begin: int, closing: dict[int, int]) -> str | None:
    if text[begin] == "{":
        return text[begin + 1 : closing[begin]].strip() if begin in closing else None
    return re.split(r"[$\n]", text[begin : begin + 100])[0].strip()  # \boxed 5


def _closing_braces(text: str, brace: re.Pattern[str]) -> dict[int, int]:
    """The position of the brace that closes, by that of the brace that opens."""
    closing: dict[int, int] = {}
    open_braces: list[int] = []
    for match in brace.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            closing[open_braces.pop()] = match.start()
    return closing
