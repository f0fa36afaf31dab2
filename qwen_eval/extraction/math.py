"""Answers of competition mathematics: extraction, and whether two answers are the same.

`is_same` compares meaning, through math-verify; `is_same_upstream` compares normalised strings as OpenCompass' second
version does. Neither evaluates a model's text as code.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from qwen_eval.extraction.conclusions import (
    ANY_BRACE,
    before_next_item,
    behind_retraction,
    boxes,
    placed_boxes,
    single_spaced,
)
from qwen_eval.extraction.math_verifier import verifier
from qwen_eval.extraction.symptoms import visible_answer

MAX_CHARACTERS = 400  # no answer of the benchmark is a tenth of that; parsing time grows with nesting
STATEMENT_CHARACTERS = 600  # of what stands behind "the answer is"; bounds the reading of a text full of such cues

FULL_WIDTH = str.maketrans({code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)})
CUE = re.compile(
    r"\banswers?\b(?:(?!\bnot\b)[^.:=\n$\\]){0,40}?"
    r"(?:\b(?:is|are|would be|should be)\b(?! ?(?:correct|right|given|obtained|verified|not)\b)|[:：→])"
    r"|<answer>|^[#* ]{0,8}(?:final )?answer[* ]{0,8}$|答案[\s*】]{0,4}(?:应该|应)?(?:是|为|[:：])",
    re.IGNORECASE | re.MULTILINE,
)
HOPE = re.compile(r"\.?\s?I hope it is correct|</answer>")
DELIMITER = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")
CLOSING = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
BOLD = re.compile(r"\*\*([^*\n]+)\*\*")

ORNAMENT = " \t\n*_:：\"'“✅>"
NUMBER = re.compile(r"(?<![\^\d])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
OR_PER_CENT = re.compile(r"(?<=\d),? (?:or|i\.e\.|which is) \d+(?:\.\d+)? ?%")  # 0.5 or 50%
LEADING_NUMBER = re.compile(
    r"((?:\\?\$)?-?(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?: \d+/\d+|/\d+)?(?: ?\\?%)?)"
    r"(?=[.。*\"'”)]*$|[.。] |[,，;] ?(?![-\d$\\])| \(| ?[\u4e00-\u9fff°]"
    r"| (?!(?:and|or|to|pi|sqrt|times|plus|minus|sin|cos|tan|log|ln)\b)[A-Za-z]{2})"
)
PREDICATE = re.compile(r" (?:is|are|equals|must be) (?=[-\d])")  # the value of $x$ is 5
CLAUSE = re.compile(r",? (?:because|since|where|when|so that|as required)\b", re.IGNORECASE)
CONDITION = re.compile(r"^[,，]? ?(?:此时|其中|当|(?:attained |achieved |which happens )?(?:when|where|at|for)) ?$")
BETWEEN_ANSWERS = re.compile(r"(?:,|，|,? ?(?:and|or)|和|或|、) ?")


# --- finding it -----------------------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` or `\fbox{}` that closes; None when there is none. Every brace counts."""
    return next((content for content in reversed(boxes(text, ANY_BRACE)) if content is not None), None)


def concluded_answer(reply: str) -> str | None:
    """The answer a solution ends on: boxed, behind the last "the answer is", or the last formula, bold or plain number.

    Reasoning before `</think>` and a next problem are not looked at. What a reply takes back ("that is wrong: ...")
    does not count once it states another answer.
    """
    text = before_next_item(single_spaced(visible_answer(reply).translate(FULL_WIDTH)))
    if (correction := behind_retraction(text)) and (answer := _boxed_or_named(correction)):
        return answer
    if answer := _boxed_or_named(text):
        return answer
    return None if boxes(text) else _at_the_end(text)  # a box that does not close: cut off


def _boxed_or_named(text: str) -> str | None:
    if found := placed_boxes(text):
        return _last_boxes(text, found)
    cues = list(CUE.finditer(text))
    return _stated(text[cues[-1].end() : cues[-1].end() + STATEMENT_CHARACTERS]) if cues else None


def _last_boxes(text: str, found: list[tuple[int, str | None]]) -> str | None:
    r"""The last box with content, and those joined to it: `\boxed{1}$ and $\boxed{2}` is "1, 2"."""
    answers: list[str] = []
    begin = 0
    for start, content in reversed(found):
        between = text[start:begin].partition("}")[2] if answers else ""
        if content and (not answers or BETWEEN_ANSWERS.fullmatch(between.strip("$ "))):
            answers.insert(0, content)
            begin = start
        elif answers:
            break
    return ", ".join(answers) or None


def _stated(behind: str) -> str | None:
    """The answer in the line behind a cue: the formulas or the number it begins with, else its last formula or all."""
    line = HOPE.split(behind.lstrip(ORNAMENT), maxsplit=1)[0].split("\n")[0]
    spans = formulas(line)
    if spans and spans[0][0] == 0:
        return _leading(line, spans)
    if number := LEADING_NUMBER.match(line.strip()):
        return number[1]
    clause = CLAUSE.split(line, maxsplit=1)[0]
    if spans := formulas(clause) or spans:
        return spans[-1][2]
    if len(clause.split()) > 4 and (numbers := NUMBER.findall(clause)):
        return str(numbers[-1])
    return line.strip().rstrip(".。*\"'”").strip() or None


def _leading(line: str, spans: list[tuple[int, int, str]]) -> str:
    """`"$1$, $2$ and $3$ are"` -> `"1, 2, 3"`."""
    end, answers = spans[0][1], [spans[0][2]]
    for begin, next_end, content in spans[1:]:
        if not BETWEEN_ANSWERS.fullmatch(line[end:begin].strip(" ")):
            break
        answers.append(content)
        end = next_end
    return ", ".join(answers)


def _at_the_end(text: str) -> str | None:
    """The conclusion of a text that names none: bold in its last line, a number behind its last formula, or that."""
    bold = [content for content in BOLD.findall(text.strip().rpartition("\n")[2]) if not content.rstrip().endswith(":")]
    if bold and (answer := _stated(bold[-1])):
        return answer
    spans = formulas(text)
    if spans and (predicate := PREDICATE.match(text, spans[-1][1])):
        return _stated(text[predicate.end() : predicate.end() + STATEMENT_CHARACTERS])
    _, _, behind = re.sub(r"[.。](?=\s|$)", "\n", text[spans[-1][1] :] if spans else "\n" + text).partition("\n")
    if numbers := NUMBER.findall(OR_PER_CENT.sub("", behind)):
        return str(numbers[-1])
    return _last_formulas(text, spans) if spans else None


def _last_formulas(text: str, spans: list[tuple[int, int, str]]) -> str:
    """The last formula of the text that is no condition ("when $x = 2$"), with those joined to it by "and"."""
    last = len(spans) - 1
    while last and CONDITION.search(text[spans[last - 1][1] : spans[last][0]]):
        last -= 1
    first = last
    while first and BETWEEN_ANSWERS.fullmatch(text[spans[first - 1][1] : spans[first][0]].strip(" ")):
        if _named_side(spans[first - 1][2]) != _named_side(spans[last][2]):
            break  # "$x = 3$ and $y = 4$" are no two solutions
        first -= 1
    if text[: spans[first][0]].rstrip().endswith("between"):
        first = last
    return ", ".join(content for _, _, content in spans[first : last + 1])


def _named_side(formula: str) -> str:
    """`"x"` of `"x = 3"`, "" without an equals sign."""
    return formula.rpartition("=")[0].strip()


def formulas(text: str) -> list[tuple[int, int, str]]:
    r"""(begin, end, content) of each `$...$`, `$$...$$`, `\(...\)` and `\[...\]`, in one pass."""
    marks = list(DELIMITER.finditer(text))
    last = {match[0]: match.start() for match in marks}
    found: list[tuple[int, int, str]] = []
    opened: re.Match[str] | None = None
    for match in marks:
        if opened is None:
            if match[0] in CLOSING and last.get(CLOSING[match[0]], -1) > match.start():
                opened = match
        elif match[0] == CLOSING[opened[0]]:
            if content := text[opened.end() : match.start()].strip():
                found.append((opened.start(), match.end(), content))
            opened = None
    return found


# --- comparing ------------------------------------------------------------------------------------------------------

REPEATING = re.compile(r"(?<![\d.])(\d+)\.(\d*)\\(?:overline|bar|dot)\s?\{?(\d+)\}?")
HALVES = re.compile("[¼-¾⅐-⅞]")
PLAIN_LIST = re.compile(r"-?[\d./]+(?:(?:, | and |, and )-?[\d./]+)+")
PLAIN_MIXED = re.compile(r"(-?)(\d{1,9}) (\d{1,9})/(\d{1,9})")
BASE = re.compile(r"\(?([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\)?_\{?\(?(?:base)?(\w+)\)?\}?")
NUMERALS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
BASES = {name: str(base) for base, name in enumerate(NUMERALS, 2)}
SYMBOLS = str.maketrans(
    {
        "π": r"\pi ",
        "²": "^2",
        "³": "^3",
        "×": r"\times ",
        "·": r"\cdot ",
        "−": "-",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
    }
)
CLOCK = re.compile(r"(\d+(?::\d+)+)(?:([ap])\.?m\.?)?", re.IGNORECASE)  # 10:30, 10:30 a.m.
LETTER = re.compile(r"\(?([A-F])\)?")  # (C) stands for its option, "(C) 5"
DRESS = re.compile(
    r"\\(?:text)?color\s?\{\w{1,20}\}|\\text\{\\?\$\}|^[\u4e00-\u9fff]{1,20}(?=[(\d\\-])|^(?:an?|the)\s(?=[A-Za-z]{3})"
)
SCIENTIFIC = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})$")
NAMED = re.compile(r"\\(?:text|mathrm)\s?\{[^{}]*\b(?:is|are|answer):?\s*\}")
UNIT = re.compile(
    r"(?<=[\d}\])])[\s~]*\\(?:text|mathrm|mbox|textrm)\s?\{\s?(?!and\b|or\b)[A-Za-z][A-Za-z ./]*\}(?:\^\{?\d\}?)?$"
)
UNIT_WORD = re.compile(
    r"(?<=\d)(?: ?(?:[cmk]m|kg)| (?:(?!and\b|or\b|pi\b|sqrt|sin|cos|tan|log)[A-Za-z]{3}[A-Za-z ]*|m|ft|in|g|hr|s))"
    r"(?:\^\{?\d\}?)?$"
)


def is_same(answer: str | None, gold: str) -> bool:
    """Whether two answers mean the same: equal after normalisation, or by symbolic comparison.

    ComparisonStopped where the symbolic comparison takes too long.
    """
    if answer is None or not answer.strip() or max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    if (clock := CLOCK.fullmatch(normalised(answer))) and (other_clock := CLOCK.fullmatch(normalised(gold))):
        halves = {half for half in (clock[2], other_clock[2]) if half}
        return clock[1] == other_clock[1] and len(halves) < 2
    answer, gold = undressed(answer), undressed(gold)
    one, other = normalised(answer), normalised(gold)
    if one == other:
        return True
    if (letter := LETTER.fullmatch(other)) and re.match(rf"\(?{letter[1]}\)", one):
        return True
    if (left := BASE.fullmatch(one)) and (right := BASE.fullmatch(other)):
        return left[1].lower() == right[1].lower() and _base(left[2]) == _base(right[2])
    return bool(one) and verifier.same(answer, gold)


def _base(name: str) -> str:
    return BASES.get(name, name)


def undressed(answer: str) -> str:
    """Without what does not change an answer: its unit, a per-cent sign, "the answer is"; repeating decimals and
    mixed numbers as fractions.

    Per cents count as upstream counts them: 10% is 10, not 0.1.
    """
    answer = DRESS.sub("", answer)
    answer = SCIENTIFIC.sub(r"\\times 10^{\1}", answer.replace("{.}", "."))
    answer = re.sub(r"\\mathrm\s?\{([ie])\}", r"\1", answer)
    answer = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", answer)
    answer = re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", answer)
    answer = NAMED.sub("", answer.strip().strip("$").rstrip(".。").strip())
    answer = re.sub(r"\s*(?:\\?%|\bper ?cent\b)", "", answer)
    answer = UNIT_WORD.sub("", UNIT.sub("", answer))
    answer = re.sub(r"(?:\\sqrt\s?|√\s?(?=\d))(\d{2,}|(?<=√)\d)", r"\\sqrt{\1}", answer.translate(SYMBOLS))
    answer = REPEATING.sub(lambda m: _fraction(_repeating(m[1], m[2], m[3])), answer)
    answer = HALVES.sub(lambda m: f" {unicodedata.normalize('NFKC', m[0])}".replace("\u2044", "/"), answer)
    if " and " in answer and PLAIN_LIST.fullmatch(answer):
        answer = answer.replace(", and ", ", ").replace(" and ", ", ")
    if (mixed := PLAIN_MIXED.fullmatch(answer.strip())) and 0 < int(mixed[3]) < int(mixed[4]):
        return mixed[1] + _fraction(int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4])))
    return answer.strip()


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    """0.1666... from `("0", "1", "6")`."""
    shift = 10 ** len(fixed)
    return Fraction(int(whole + fixed), shift) + Fraction(int(period), shift * (10 ** len(period) - 1))


def _fraction(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def normalised(answer: str) -> str:
    """One spelling for the dress an answer may wear: fraction macros, spacing, delimiters, `\\text`, degree signs."""
    answer = answer.strip().strip("$").strip()
    answer = re.sub(r"\\(?:[dtc]frac)(?![a-zA-Z])", r"\\frac", answer)
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![a-zA-Z])", "", answer)
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\[,;:! ]|\\quad|\\(?=[$%])|~", "", answer).replace(r"\varnothing", r"\emptyset")
    answer = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°", "", answer)
    answer = re.sub(r"\s+", "", answer).rstrip(".").replace("{,}", ",")
    return answer.replace(",", "") if re.fullmatch(r"[$-]*\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer


# --- the official reader --------------------------------------------------------------------------------------------

SUBSTITUTIONS = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"), ("\\le", "<"),
)  # fmt: skip
REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots", "\n", "\r", "\f",
)  # fmt: skip


def upstream_answer(text: str) -> str:
    """The official reading: the last box as it stands, else the first sentence that names its answer, normalised.

    A sentence ends at any full stop, so a decimal outside a box loses its decimals.
    """
    if (inside := boxed(text)) is not None:
        return inside
    sentences = text.split(".")
    named = (sentence for sentence in sentences if re.search("final answer|answer is", sentence.lower()))
    return minerva_normalised(next(named, sentences[0]))


def minerva_normalised(answer: str) -> str:
    """The normalisation of the Minerva paper (https://arxiv.org/abs/2206.14858, appendix D.1)."""
    answer = answer.split("=")[-1]
    for before, after in SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for expression in REMOVED:
        answer = answer.replace(expression, "")
    answer = sub_in_lines(r"(\\text\{)\((.*?)\)(\})", ")}", answer)
    answer = sub_in_lines(r"(\\(?:text|textbf|overline)\{)(.*?)(\})", "}", answer)
    answer = sub_in_lines(r"(\\boxed\{)(.*)(\})", "}", answer)
    for pattern in (r"finalansweris(.*)", r"answer?is:?(.*)", r"oxed\{(.*?)\}", r"\$(.*?)\$"):
        searched = _up_to_last("}", answer) if "oxed" in pattern else answer
        if found := re.findall(pattern, searched):
            answer = found[-1].strip()
    if "rac" in answer and "\\frac" not in answer:
        answer = answer.replace("rac", "\\frac")
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    return answer.replace(",", "") if answer.replace(",", "").isdigit() else answer


def sub_in_lines(pattern: str, end: str, text: str) -> str:
    """`re.sub(pattern, r"\\2", text)` in linear time, for a pattern that keeps to one line and ends on `end`."""
    lines = []
    for line in text.split("\n"):
        head = _up_to_last(end, line)
        lines.append(re.sub(pattern, r"\2", head) + line[len(head) :])
    return "\n".join(lines)


def _up_to_last(end: str, text: str) -> str:
    return "\n".join(line[: line.rfind(end) + len(end)] if end in line else "" for line in text.split("\n"))


def is_same_upstream(one: str, other: str) -> bool:
    """String equality after the normalisation of Hendrycks et al., extended by OpenCompass' second version."""
    return hendrycks_normalised(one) == hendrycks_normalised(other)


def hendrycks_normalised(answer: str) -> str:
    for text in ("\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$", "\\%", "%"):
        answer = answer.replace(text, "")
    answer = answer.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    answer = answer.split("\\text{ ")[0]  # units on the right
    answer = answer.replace(" .", " 0.").replace("{.", "{0.").rstrip(".").rstrip("/").strip()
    if answer.startswith("."):
        answer = "0" + answer
    if len(sides := answer.split("=")) == 2 and len(sides[0].strip()) <= 2:
        answer = sides[1]
    answer = re.sub(r"\\sqrt\s*(?=[^{\s])(\w)", r"\\sqrt{\1}", answer).replace(" ", "")
    answer = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\frac(\w)(?=\{)", r"\\frac{\1}", answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", answer)
