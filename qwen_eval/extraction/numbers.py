"""Numbers in prose: reading the one that a worked solution concludes with.

`upstream_*` are the readers of the official Qwen scripts, quirks included; the others are meant to be right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_DIGITS = 300  # a model stuck on one digit must not build a number of a million digits
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "万": 10**4, "亿": 10**8}

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\w))?|(?<![\w.])\.\d+")
SIGN = re.compile(r"(?:(?<![\w)\]}.%-])-\s?[$€£¥]?|[$€£¥]\s?-)$")  # "5-3" is a difference, "-$5" and "$-5" are debts
MIXED = re.compile(r" (\d{1,6})\s?/\s?(\d{1,9})(?![\d/.])")  # 3 1/2
OVER = re.compile(r"\s?/\s?(\d{1,300})(?![\d/]|\.\d)")  # 3/4, but not the first half of a date
SCALE = re.compile(r"\s?(thousand|million|billion|trillion|万|亿)(?![a-z])")

NEXT_ITEM = re.compile(r"(?<=\S)\s*(?:Question:|\n\s*(?:Q|Problem|问题)\s*[:：])")
CUE = re.compile(
    r"\banswer\b(?:(?!\bnot\b)[^.:=\n]){0,60}?(?:\bis\b|:|=)|答案\s*(?:应该|应)?(?:是|为|[:：=])|^\s*A\s*:",
    re.IGNORECASE | re.MULTILINE,
)
HASHES = re.compile(r"####")
BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
DENIAL = re.compile(r"[(,;]?\s*\b(?:and not|but not|not|rather than|instead of)\b.*$", re.IGNORECASE)
NOT_BUT = re.compile(r"^\W*not\b.*?\bbut\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\n。！？；]")
LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d))")
LATEX_WORDS = re.compile(
    r"\\(?:left|right|displaystyle|text|mathrm|textbf|mathbf|quad)(?![a-zA-Z])|\\[,!;: ]|\\(?=[$%#])"
)


def plain_text(text: str) -> str:
    """Full-width and other scripts' digits, typographic minus signs and LaTeX dress in their plain form."""
    text = "".join(_plain_character(character) for character in text)
    text = re.sub(r"(?<=\d)(?:\{,\}|，|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ",", text)
    text = LATEX_FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)
    return LATEX_WORDS.sub("", text)


def _plain_character(character: str) -> str:
    if character < "\x80":
        return character
    if character in "−－﹣–":
        return "-"
    if character.isdecimal():
        return str(int(character))
    if "！" <= character <= "～" and character not in "，；：！？":
        return chr(ord(character) - 0xFEE0)
    return {"￥": "¥"}.get(character, character)


def numbers_in(text: str) -> Iterator[tuple[int, Fraction]]:
    """(where it begins, its value) of each number of a plain text: `1,234.50`, `-$5`, `3/4`, `3 1/2`, `1.5 million`."""
    end = 0
    for match in NUMBER.finditer(text):
        if match.start() < end or len(match[0]) > MAX_DIGITS:
            continue
        value, end = _with_tail(Fraction(match[0].replace(",", "")), text, match.end())
        is_negative = SIGN.search(text[max(0, match.start() - 4) : match.start()])
        yield match.start(), -value if is_negative else value


def _with_tail(value: Fraction, text: str, end: int) -> tuple[Fraction, int]:
    """A number and what follows it directly: a fraction, `thousand`, `万`."""
    if (mixed := MIXED.match(text, end)) and int(mixed[2]) and value.denominator == 1:
        return value + Fraction(int(mixed[1]), int(mixed[2])), mixed.end()
    if (over := OVER.match(text, end)) and int(over[1]):
        value, end = value / int(over[1]), over.end()
    if scale := SCALE.match(text, end):
        value, end = value * SCALES[scale[1]], scale.end()
    return value, end


def concluded_number(text: str) -> Fraction | None:
    """The number a solution ends on, None when it has none.

    In this order: the last `\\boxed{}`, the last `####`, what follows the last "the answer is", the last bold number of
    the last line, the last number. Whatever comes after the beginning of a next question is not looked at.
    """
    text = plain_text(text)
    if next_item := NEXT_ITEM.search(text):
        text = text[: next_item.start()]
    for statements in (_boxed(text), _after(HASHES, text), _after(CUE, text), _bold_in_last_line(text)):
        for statement in reversed(statements):
            if (value := _stated(statement)) is not None:
                return value
    values = [value for _, value in numbers_in(_without_denials(text))]
    return values[-1] if values else None


def _boxed(text: str) -> list[str]:
    return re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}?", text)


def _after(cue: re.Pattern[str], text: str) -> list[str]:
    """What stands behind each cue: the rest of its sentence, or of the next line when the cue ends its own."""
    statements = []
    for match in cue.finditer(text):
        rest = text[match.end() :].lstrip(" \t\n*_:$\\([")
        lead = text[match.end() : len(text) - len(rest)]
        end = SENTENCE_END.search(rest)
        statements.append(lead.replace("*", "") + (rest[: end.start()] if end else rest))
    return statements


def _bold_in_last_line(text: str) -> list[str]:
    lines = text.strip().splitlines()
    return BOLD.findall(lines[-1]) if lines else []


def _stated(statement: str) -> Fraction | None:
    """The number a statement gives: behind the last `=` if it calculates, else the first one it does not deny."""
    statement = NOT_BUT.sub("", statement.strip())
    statement = DENIAL.sub("", statement) or statement
    for part in (statement.rpartition("=")[2], statement):
        for _, value in numbers_in(part):
            return value
    return None


def _without_denials(text: str) -> str:
    """Without "(not 20)" and ", not 20" at the end of sentences: the last number must not be the one ruled out."""
    shorter = re.sub(r"\(\s*(?:and\s+)?not\b[^()\n]*\)|,\s*(?:and\s+)?not\s+[$\-\d][^.;\n]*", "", text)
    return shorter if next(numbers_in(shorter), None) else text


def written(value: Fraction | None) -> str | None:
    """A number as records keep it: `"18"`, `"0.75"`, and `"1/3"` where decimals would not end."""
    if value is None:
        return None
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest > 1 or value.denominator > 10**12:
        return str(value)
    digits = f"{value.numerator * 10**12 // value.denominator:+014d}"
    return (digits[:-12].lstrip("+") + "." + digits[-12:]).rstrip("0").lstrip("+")


# --- the official readers -------------------------------------------------------------------------------------------

UPSTREAM_GOLD = re.compile(r"#### (\-?[0-9\.\,]+)")
UPSTREAM_CHAT_NUMBER = re.compile(r"([+-])?(?=([0-9]|\.[0-9]))(0|([1-9](\d{0,2}(,\d{3})*)|\d*))?(\.\d*)?(?=\D|$)")
UPSTREAM_TOLERANCE = 1e-4
INVALID = "[invalid]"


def upstream_base_number(text: str) -> int | str:
    """The official base reader: the last run of digits, read as a Python literal.

    So 3.50 is 50, 1,234 is 234, the sign is lost, and 007 (no Python literal) is "[invalid]".
    """
    runs = re.findall(r"\d+", text)
    if not runs or not runs[-1].isascii() or len(runs[-1]) > 4300:
        return INVALID
    is_literal = not runs[-1].startswith("0") or not runs[-1].strip("0")
    return int(runs[-1]) if is_literal else INVALID


def upstream_base_gold(answer: str) -> float | int | None:
    """The number behind `####` of an official row."""
    match = UPSTREAM_GOLD.search(answer)
    if not match:
        return None
    digits = match[1].replace(",", "")
    try:
        return float(digits) if "." in digits else int(digits)
    except ValueError:
        return None


def upstream_chat_number(text: str) -> str | None:
    """The official chat reader since 2023-11-30: the last signed decimal, without commas and plus signs."""
    numbers = [match[0] for match in UPSTREAM_CHAT_NUMBER.finditer(text)]
    return numbers[-1].replace(",", "").replace("+", "") if numbers else None


def upstream_chat_equal(one: str | None, other: str | None) -> bool:
    """Whether two numbers read by `upstream_chat_number` count as the same."""
    if one is None or other is None:
        return False
    return abs(float(one) - float(other)) <= UPSTREAM_TOLERANCE
