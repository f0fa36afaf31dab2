"""Extraction of the number that a worked solution gives as its answer.

`upstream_*` are the extractors of the official Qwen scripts, errors included; the others are meant to be correct.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from qwen_eval.extraction.conclusions import before_next_item, behind_retraction, boxes, single_spaced
from qwen_eval.extraction.symptoms import visible_answer

MAX_DIGITS = 300  # a model stuck on one digit must not build a number of a million digits
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "万": 10**4, "亿": 10**8}

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\w))?|(?<![\w.])\.\d+")
SIGN = re.compile(  # "5-3" is a difference, "total - 5" has a dash, "- 5" begins a list; "-$5" and "$-5" are debts
    r"(?:(?<![\w)\]}.%-])-[$€£¥]?|(?<=[=(:*/×])\s?-\s[$€£¥]?|[$€£¥]\s?-)$"
)
MIXED = re.compile(r" (\d{1,6})\s?/\s?(\d{1,9})(?![\d/.])")  # 3 1/2
OVER = re.compile(r"\s?/\s?(\d{1,300})(?![\d/]|\.\d)")  # 3/4, but not the first half of a date
SCALE = re.compile(r"\s?(thousand|million|billion|trillion|万|亿)(?![a-z])")

# --- statements: where an answer is given ---

STATEMENT_CHARACTERS = 400  # a longer statement is no statement
MAX_STATEMENTS = 50  # of one kind, the last ones: a text that loops over its cue says nothing new
CUE = re.compile(
    r"\banswer\b(?:(?!\bnot\b)[^.:=\n]){0,60}?(?:\b(?:is|are|would be|should be|becomes|equals)\b|[:：=→])"
    r"|<answer>|^[#* ]{0,8}(?:final )?answer[* ]{0,8}$"
    r"|答案[\s*】]{0,4}(?:应该|应)?(?:是|为|[:：=])[:：]?|^\s?A\s?:|^\s?答\s?[:：]",
    re.IGNORECASE | re.MULTILINE,
)
CONCLUDING = re.compile(  # a correction that states a result
    r"\b(?:so|thus|therefore|hence|makes|total|is|it's|are|should|answer)\b|=|####|\\boxed|应|所以|答案|^\W{0,3}\d",
    re.IGNORECASE,
)
BARE_OPENING = re.compile(  # "18 dollars.\n\nExplanation: ..."
    r"[*$€£¥\s]{0,9}(-?\d[\d,.]{0,20}\d|\d)(?: ?[A-Za-z%°]{1,20}){0,3}[*.。 ]{0,9}\n\W{0,9}"
    r"(?:explanation|reason|solution|steps?\b|here|note|because|解析|解释|过程|说明|理由)",
    re.IGNORECASE,
)
HASHES = re.compile(r"####(?!#)")
BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
DENIAL = re.compile(r"[(,;]?\s?\b(?:and not|but not|not|rather than|instead of)\b.*$", re.IGNORECASE)
DENIED = re.compile(r"\(\s?(?:and )?not\b[^()\n]*\)|(?:,\s?(?:and )?not|,?\s(?:and not|rather than))\s[$\-\d][^.;\n]*")
NOT_BUT = re.compile(r"^\W*not\b.*?\bbut\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|;(?=\s)|[\n。！？；]|</answer>")
OFFER = re.compile(
    r"\b(?:let me know|feel free|would you like|i can|i hope|is there anything)\b|^\W*(?:note|p\.?s\.?)\b",
    re.IGNORECASE,
)

# --- within a statement: which of several numbers ---

ORNAMENT = " \t\n*_:：$\\([→{\"'“>"
OPERATOR = re.compile(r"\s?(?:[-+*×÷^]|\\(?:times|cdot|div)|x\s?\d)\s?[\d(.$]|\s(?:more|less|fewer|times|plus|minus)\b")
CLAUSE_BREAK = re.compile(r"[,;](?!\d)|[，；]|(?<=[\w)]) \(|\s(?:because|since)\s", re.IGNORECASE)
LEADING_CLAUSE = re.compile(
    r"^\W*(?:in|after|over|within|during|for|with|on|at|if|when|since|because)\b[^,]*,(?!\d)", re.IGNORECASE
)
TRAILING_CLAUSE = re.compile(
    r"\s(?:after|before|when|if|because|since|while|once|given|considering|assuming|even though)\s.*$", re.IGNORECASE
)
ADVERBIAL = re.compile(  # "in 2 weeks", "for the 16 glasses": said of the answer, not the answer; "for $18" may be one
    r"\b(?:in|after|for|from|across|over|within|on|at|during|every|each|per|among|between|out of"
    r"|(?<!left )(?<!up )with)"
    r"(?:\s(?:the|all|of|these|those|his|her|their|its|each|only|original|first|next|last|about|day|page))*\s$"
    r"|\bin (?:an?|the|his|her|their) (?:\w+ )?of $"  # in a class of 27
    r"|\d (?:\w+ ){0,2}of (?:(?:the|these|those|his|her|their|its|all) )*$"  # 18 of the 20 students, 18 boxes of 12
    r"|\d[^.]*(?<!need)(?<!needs)(?<!have)(?<!has)(?<!had)(?<!able)(?<!going)(?<!comes)(?<!adds up)(?<!equal)"
    r"(?<!up) to (?!be\b)[a-z]+ (?:the )?[$€£¥]?$",  # 18 days to finish 36 tasks
    re.IGNORECASE,
)
TO_A_NOUN = re.compile(r"-[A-Za-z]")  # 5-year-old
LATER = re.compile(  # 3小时后, "5 years from now"
    r"\s?[\u4e00-\u9fff]{1,3}?(?:以?后|之?内|之后|以前)"
    r"|\s(?:years?|months?|weeks?|days?|hours?|minutes?) (?:from now|later|ago)\b"
)
ASIDE = re.compile(r"\s?[(（][^()（）\n]*[)）]")
COMPARISON = re.compile(
    r",\s(?:which (?:is|was) )?[$€£¥]?\d[\d,.]* (?:\w+ )?(?:more|less|fewer|times|older|younger)\b.*$"
    r"|,\s(?:twice|half|double|triple|including)\b.*$|\sby \w+ing\b.*$|[，,]比.*$",
    re.IGNORECASE,
)
BREAKDOWN = re.compile(r":(?=\s(?:\D*\d[\d,.]*(?![\d,.])){2}).*$")  # 18 in total: 9 from Ann, 9 from Bob
DATE = re.compile(
    r"\b(?:January|February|March|April|May|June|July|August|September|October|November|December) \d{1,2}"
    r"(?:st|nd|rd|th)?(?:, \d{4})?(?!\d)"
)

LATEX_FRACTION = re.compile(r"(\d)?\s?\\[dtc]?frac\s?(?:\{\s?(-?\d+)\s?\}\s?\{\s?(\d+)\s?\}|(\d)(\d))")
LATEX_WORDS = re.compile(
    r"\\(?:left|right|displaystyle|text|mathrm|textbf|mathbf|quad)(?![a-zA-Z])|\\[,!;: ]|\\(?=[$%#])"
)


POWER_OF_TEN = re.compile(r"(\d)\s?(?:x|×|\*|\\times|\\cdot)\s?10\s?\^\s?\{?(-?\d{1,3})\}?(?!\d)")


def plain_text(text: str) -> str:
    """Full-width and other scripts' digits, typographic minus signs and LaTeX dress in their plain form."""
    text = single_spaced("".join(_plain_character(character) for character in text))
    text = re.sub(r"(?<=\d)(?:\{,\}|，|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ",", text)
    text = POWER_OF_TEN.sub(r"\1e\2", text)
    text = LATEX_FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[4]}/{m[3] or m[5]}", text)
    return LATEX_WORDS.sub("", text)


def _plain_character(character: str) -> str:
    if character < "\x80":
        return character
    if character in "−－﹣–":
        return "-"
    if character.isdecimal():
        return str(int(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")  # ½
    if "！" <= character <= "～" and character not in "，；：！？":
        return chr(ord(character) - 0xFEE0)
    return {"￥": "¥"}.get(character, character)


def numbers_in(text: str) -> Iterator[tuple[int, Fraction]]:
    """(where it begins, its value) of each number of a plain text: `1,234.50`, `-$5`, `3/4`, `3 1/2`, `1.5 million`."""
    return ((begin, value) for begin, _, value in _spans(text))


def _spans(text: str) -> Iterator[tuple[int, int, Fraction]]:
    """(where it begins, where it ends, its value) of each number."""
    end = 0
    for match in NUMBER.finditer(text):
        if match.start() < end or len(match[0]) > MAX_DIGITS:
            continue
        value, end = _with_tail(Fraction(match[0].replace(",", "")), text, match.end())
        is_negative = SIGN.search(text[max(0, match.start() - 5) : match.start()])
        yield match.start(), end, -value if is_negative else value


def _with_tail(value: Fraction, text: str, end: int) -> tuple[Fraction, int]:
    """A number and what follows it directly: a fraction, `thousand`, `万`."""
    if (mixed := MIXED.match(text, end)) and int(mixed[1]) < int(mixed[2]) and value.denominator == 1:
        return value + Fraction(int(mixed[1]), int(mixed[2])), mixed.end()
    if (over := OVER.match(text, end)) and int(over[1]):
        value, end = value / int(over[1]), over.end()
    if scale := SCALE.match(text, end):
        value, end = value * SCALES[scale[1]], scale.end()
    return value, end


def concluded_number(reply: str) -> Fraction | None:
    """The number a solution ends on, None when it has none.

    In this order: the last `\\boxed{}`, the last `####`, what follows the last "the answer is", a number that stands
    alone before an explanation, the last bold number of the last line, the number that the last sentence with one is
    about. Numbers in words count where a statement, or the whole text, has no other. Reasoning before `</think>` and
    whatever comes after the beginning of a next question are not looked at; what a reply takes back ("that is wrong:
    ...") counts only when nothing follows.
    """
    text = before_next_item(plain_text(visible_answer(reply)))
    correction = behind_retraction(text)
    value = _concluded(correction) if CONCLUDING.search(correction) else None
    return _concluded(text) if value is None else value


def _concluded(text: str) -> Fraction | None:
    for statements in (_boxed(text), _after(HASHES, text), _after(CUE, text)):
        for statement in reversed(statements):
            if (value := _stated(statement)) is not None:
                return value
        if statements and (value := named_number(statements[-1])) is not None:
            return value
    if opening := BARE_OPENING.match(text):
        return next((value for _, value in numbers_in(opening[1])), None)
    bold = [value for statement in _bold_in_last_line(text) if (value := _stated(statement)) is not None]
    value = bold[-1] if bold else _in_last_sentence(_without_denials(text))
    return _named_at_the_end(text) if value is None else value


def _named_at_the_end(text: str) -> Fraction | None:
    """A number in words in the last sentence; "one" is a pronoun too."""
    last = next((sentence for sentence in reversed(_sentences(text)) if sentence.strip()), "")
    value = named_number(last[-STATEMENT_CHARACTERS:])
    return None if value == 1 else value


def _boxed(text: str) -> list[str]:
    return [content[:STATEMENT_CHARACTERS] for content in boxes(text)[-MAX_STATEMENTS:] if content]


def _after(cue: re.Pattern[str], text: str) -> list[str]:
    """What stands behind each cue: the rest of its sentence, or of the next line when the cue ends its own."""
    statements = []
    for match in list(cue.finditer(text))[-MAX_STATEMENTS:]:
        behind = text[match.end() : match.end() + STATEMENT_CHARACTERS]
        rest = behind.lstrip(ORNAMENT)
        lead = behind[: len(behind) - len(rest)]
        end = SENTENCE_END.search(rest)
        statements.append(lead.replace("*", "") + (rest[: end.start()] if end else rest))
    return statements


def _bold_in_last_line(text: str) -> list[str]:
    return BOLD.findall(text.strip().rpartition("\n")[2][-STATEMENT_CHARACTERS:])


def _stated(statement: str) -> Fraction | None:
    """The number a statement gives: the one it begins with, else that behind its last `=`, else its main one."""
    statement = NOT_BUT.sub("", statement.strip())
    statement = DENIAL.sub("", statement) or statement
    clause_end = CLAUSE_BREAK.search(statement, 1)
    for part in (statement[: clause_end.start()] if clause_end else statement, statement):
        if "=" not in part and (value := _first_number(part)) is not None:
            return value
        if "=" in part and (value := _equated(part)) is not None:
            return value
    return _main_number(statement)


def _equated(text: str) -> Fraction | None:
    """The number behind the last `=`, or before it where the calculation stands behind: `42 = 18 + 24`."""
    left, _, right = text.rpartition("=")
    first = next(_spans(right), None)
    if first and OPERATOR.match(right, first[1]):
        value = _first_number(left)
        if value is not None or (value := _main_number(left)) is not None:
            return value
    return _main_number(right)


def _first_number(text: str) -> Fraction | None:
    """The number that a text begins with: `about $18 a day`, but not `9 * 2`."""
    opening = re.match(
        r"(?:about|approximately|around|exactly|only|a total of|≈|~)?", text.lstrip(ORNAMENT), re.IGNORECASE
    )
    assert opening is not None
    begin = len(text) - len(text.lstrip(ORNAMENT)) + opening.end()
    for start, end, value in _spans(text):
        is_direct = not re.sub(r"[-\s$€£¥+*]", "", text[begin:start])
        return value if is_direct and not OPERATOR.match(text, end) and not LATER.match(text, end) else None
    return None


def _main_number(sentence: str) -> Fraction | None:
    """The number that a sentence is about: the last one outside its clauses and phrases of time, place and purpose."""
    for pattern in (ASIDE, LEADING_CLAUSE, TRAILING_CLAUSE, COMPARISON, BREAKDOWN, DATE):
        shorter = pattern.sub("", sentence)
        sentence = shorter if next(numbers_in(shorter), None) else sentence
    found = list(_spans(sentence))
    values = [value for begin, end, value in found if not _is_aside(sentence, begin, end)] or [v for _, _, v in found]
    return values[-1] if values else None


def _is_aside(sentence: str, begin: int, end: int) -> bool:
    """Said of the answer: a time, a place, a purpose, the whole that it is a part of."""
    before = sentence[max(0, begin - 60) : begin]
    return bool(ADVERBIAL.search(before) or TO_A_NOUN.match(sentence, end) or LATER.match(sentence, end))


def _in_last_sentence(text: str) -> Fraction | None:
    """The main number of the last sentence that has one; what a chat offers at its end ("I can ...") comes last."""
    sentences = [sentence for sentence in _sentences(text) if NUMBER.search(sentence)]
    told = [sentence for sentence in sentences if not OFFER.search(sentence)]
    for sentence in reversed(told or sentences):
        part = sentence[-STATEMENT_CHARACTERS:]
        value = _equated(part) if "=" in part else None
        if value is not None or (value := _main_number(part)) is not None:
            return value
    return None


def _sentences(text: str) -> list[str]:
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)])]


def _without_denials(text: str) -> str:
    """Without "(not 20)" and ", not 20" at the end of sentences: the last number must not be the one ruled out."""
    shorter = DENIED.sub("", text)
    return shorter if next(numbers_in(shorter), None) else text


UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NAMED = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(TENS)})(?:[- ](?P<unit>{'|'.join(UNITS[1:10])}))?|(?P<small>{'|'.join(UNITS)}))\b",
    re.IGNORECASE,
)


def named_number(text: str) -> Fraction | None:
    """The last number below a hundred that is written in words: "twenty-one"."""
    found = list(NAMED.finditer(text))
    if not found:
        return None
    tens, unit, small = (str(part).lower() for part in found[-1].group("tens", "unit", "small"))
    if small in UNITS:
        return Fraction(UNITS.index(small))
    return Fraction(10 * (TENS.index(tens) + 2) + (UNITS.index(unit) if unit in UNITS else 0))


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
