"""Reading answers to L-Eval's exams: by its official rules (`official_*`), and by what a reply concludes."""

from __future__ import annotations

import re
from fractions import Fraction

from qwen_eval.extraction.letters import LETTERS, concluded_letter
from qwen_eval.extraction.numbers import concluded_number
from qwen_eval.extraction.symptoms import READ_CHARACTERS, answer_part

PARTIAL = 0.25  # of a question with several right letters, where only right ones are named
GUESS = "A"  # the official reading where no letter is found
OPTION_LINE = re.compile(r"^[^\S\n]*\(?([A-D])[.)]\s*(.*\S)", re.MULTILINE)
TRUTH = re.compile(r"\b(not\s+)?(true|false)\b")

_ONE = r"[(（]?[A-D][)）]?[.:：]?"
_LIST = re.compile(rf"\W*({_ONE}(?:(?:\s*(?:,|，|、|;|&|/|\band\b|和)\s*(?:and\s+)?|\s+|){_ONE})*)(?![A-Za-z'’])")
_CUE = re.compile(r"\banswers?\b[^.:\n]{0,40}?(?:\bis\b|\bare\b|:)|答案\s*(?:是|为|[:：])", re.IGNORECASE)


def options_of(question: str) -> list[str]:
    """The words of the options A to D; [] where the question does not list exactly these."""
    found = OPTION_LINE.findall(question)[-len(LETTERS) :]
    return [words for _, words in found] if [letter for letter, _ in found] == list(LETTERS) else []


# --- several letters -----------------------------------------------------------------------------------------------


def concluded_letters(reply: str) -> str:
    """All letters that the reply concludes, sorted: `"A, C and D"` -> `"ACD"`, `"The answers are (A) and (C)."`."""
    text = answer_part(reply).replace("*", "")
    behind = [text[match.end() :] for match in _CUE.finditer(text)]
    for statement in reversed(behind):
        if match := _LIST.match(statement):
            return _sorted_letters(match[1])
    listed = [match[1] for match in OPTION_LINE.finditer(text)]
    if len(listed) > 1:
        return _sorted_letters("".join(listed))
    opening = _LIST.match(text)
    return _sorted_letters(opening[1]) if opening else concluded_letter(reply) or ""


def letters_score(read: str, gold: str) -> float:
    """1 for exactly the right letters, 0.25 for a part of them and nothing else."""
    if read == gold:
        return 1.0
    return PARTIAL if read and set(read) < set(gold) else 0.0


# --- the official readings -----------------------------------------------------------------------------------------


def official_gold_letters(gold: str) -> str:
    """`"(B) Their subconscious ..."` -> `"B"`."""
    return re.sub("[^A-D]", "", (gold.split() or [""])[0]) or GUESS


def official_letters(reply: str, *, several: bool) -> str:
    """Where one letter is asked for, the first capital A to D anywhere in the reply, be it the A of "Also".

    Where several may be right: the run of letters that begins the reply; else the capitals before a space, a full stop
    or a bracket. "A" where there is none. A reply that is a piece of "ABCD" stands as it is, also when it is empty.
    """
    reply = reply[:READ_CHARACTERS]
    if reply in "ABCD":
        return reply
    if not several and (first := re.search("[A-D]", reply)):
        return first[0]
    run = re.match("[A-D]*", reply)
    opening = run[0] if run else ""
    if len(opening) > 1:
        return _sorted_letters(opening)
    rest = reply[len(opening) :].partition("Question")[0]
    return _sorted_letters(opening + "".join(re.findall(r"[A-Z](?=[\s.)])", rest))) or GUESS


def official_letters_score(read: str, gold: str) -> float:
    """As `letters_score`, but letters in another order are a part, and so is no letter at all."""
    if read == gold:
        return 1.0
    return PARTIAL if set(read) <= set(gold) else 0.0


def official_number(reply: str) -> str:
    """The digits, up to a full stop, of what follows "The answer is", else of the first paragraph's last word with one.

    The sign is lost, and so is everything behind the point.
    """
    reply = reply[:READ_CHARACTERS]
    stated = re.search(r"The answer is (\S+)", reply)
    words = [stated[1]] if stated else reply.partition("\n\n")[0].split(" ")[::-1]
    word = next((word for word in words if any(c.isdigit() for c in word)), "")
    return "".join(c for c in word.partition(".")[0] if c.isdigit())


def official_number_score(read: str, gold: str) -> float:
    gold = official_number(gold)
    return float(bool(read) and bool(gold) and int(read[:300]) == int(gold[:300]))


def official_truth(reply: str) -> str:
    """ "true" or "false", whichever the first word that holds one of them holds; "" where none does."""
    words = reply[:READ_CHARACTERS].lower().split()
    word = next((word for word in words if "true" in word or "false" in word), "")
    return "true" if "true" in word else "false" if word else ""


# --- numbers and truth ---------------------------------------------------------------------------------------------


def is_number(reply: str, gold: str) -> bool:
    return concluded_number(answer_part(reply)) == Fraction(gold.replace(",", "").strip())


def concluded_truth(reply: str) -> str:
    """The first "true" or "false" that the reply says; "not true" is false."""
    found = TRUTH.search(answer_part(reply).lower())
    if found is None:
        return ""
    is_true = (found[2] == "true") != bool(found[1])
    return "true" if is_true else "false"


def gold_truths(gold: str) -> tuple[str, str]:
    """`"True [fact: False]"` -> `("true", "false")`: by the document, and in the real world. ValueError otherwise."""
    found = re.fullmatch(r"\s*(true|false)\s*\[fact:\s*(true|false)\s*\]\s*", gold.lower())
    if found is None:
        raise ValueError(gold)
    return found[1], found[2]


def _sorted_letters(letters: str) -> str:
    return "".join(sorted({letter for letter in letters if letter in "ABCD"}))
