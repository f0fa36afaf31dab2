"""Answers of competition mathematics: finding the concluded one, and whether two of them are the same.

`is_same` compares meaning, through math-verify; `is_same_upstream` compares normalised strings as OpenCompass' second
version does. Neither evaluates a model's text as code.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading

MAX_CHARACTERS = 400  # no answer of the benchmark is a tenth of that; parsing time grows with nesting
TIME_LIMIT_S = 10.0

CUE = re.compile(r"(?:final\s+)?answer\s*(?:is|:)\s*:?\s*|答案\s*(?:是|为|[:：])\s*", re.IGNORECASE)
NEXT_ITEM = re.compile(r"(?<=\S)\s*\n\s*Problem:")
HOPE = re.compile(r"\.?\s*I hope it is correct.*", re.DOTALL)
MATH = re.compile(r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


# --- finding it -----------------------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` or `\fbox{}`, braces balanced; None when there is none that closes."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(?=[{ ])", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            return rest.split("$")[0].strip()  # \boxed 5
        depth = 0
        for i, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:i].strip()
    return None


def concluded_answer(text: str) -> str | None:
    """The answer a solution ends on: behind the last "final answer is", boxed, or the last formula or number."""
    if next_item := NEXT_ITEM.search(text):
        text = text[: next_item.start()]
    cues = list(CUE.finditer(text))
    stated = HOPE.sub("", text[cues[-1].end() :]) if cues else ""
    if (inside := boxed(stated)) or (inside := boxed(text)):
        return inside
    line = stated.strip().split("\n")[0]
    if formulas := MATH.findall(line):
        return _first(formulas[0])
    if line.strip(" .*:$"):
        return line.strip().rstrip(".").strip("*").strip()
    if re.search(r"\\(?:boxed|fbox)\s*\{", text):
        return None  # cut off within its box
    if formulas := MATH.findall(text):
        return _first(formulas[-1])
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    return numbers[-1] if numbers else None


def _first(groups: tuple[str, ...]) -> str:
    return next(group for group in groups if group).strip()


# --- comparing ------------------------------------------------------------------------------------------------------


def is_same(answer: str | None, gold: str) -> bool:
    """Whether two answers mean the same: equal after normalisation, or by symbolic comparison within a time limit."""
    if answer is None or not answer.strip():
        return False
    if normalised(answer) == normalised(gold):
        return True
    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    return _verifier.same(answer, gold)


class _Verifier:
    """math-verify in a process of its own: its time limits need the main thread, and sympy can hang in C.

    One line of JSON a question. A process that does not answer in time is killed, and the answer counts as different.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def same(self, answer: str, gold: str) -> bool:
        import json

        with self._lock:
            process = self._process if self._process and self._process.poll() is None else self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(TIME_LIMIT_S, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                return process.stdout.readline().strip() == "true"
            except (BrokenPipeError, OSError):
                return False
            finally:
                timer.cancel()

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwen_eval.extraction.math_verifier"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        return self._process


_verifier = _Verifier()


def normalised(answer: str) -> str:
    """One spelling for the dress an answer may wear: fraction macros, spacing, delimiters, `\\text`, degree signs."""
    answer = answer.strip().strip("$").strip()
    answer = re.sub(r"\\(?:[dtc]frac)(?![a-zA-Z])", r"\\frac", answer)
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![a-zA-Z])", "", answer)
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\[,;:! ]|\\quad|\\(?=[$%])|~", "", answer)
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
    answer = re.sub(r"(\\text\{)\((.*?)\)(\})", r"\2", answer)
    answer = re.sub(r"(\\(?:text|textbf|overline)\{)(.*?)(\})", r"\2", answer)
    answer = re.sub(r"(\\boxed\{)(.*)(\})", r"\2", answer)
    for pattern in (r"finalansweris(.*)", r"answer?is:?(.*)", r"oxed\{(.*?)\}", r"\$(.*?)\$"):
        if found := re.findall(pattern, answer):
            answer = found[-1].strip()
    if "rac" in answer and "\\frac" not in answer:
        answer = answer.replace("rac", "\\frac")
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    return answer.replace(",", "") if answer.replace(",", "").isdigit() else answer


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
