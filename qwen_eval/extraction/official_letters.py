"""The letter of a multiple-choice answer as the official chat scripts of MMLU and C-Eval extract it, errors included.

They always return a letter: as a last resort, that of the option most similar to the reply.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

FIRST_CHARACTERS = 100_000  # from the beginning: more than the scripts' own runs can generate

_NOT_YET_DENIED = r"(?![^ABCD]{0,20}?(?:n't|not))"
_NOT_DENIED_ZH = r"(?![^ABCD]{0,10}?(?:不|非)[^ABCD]{0,10}?(?:是|选|为|：|:|】))"
_ANYWHERE = r"(?<![a-zA-Z])(A|B|C|D)(?![a-zA-Z=])"
_OFFICIAL_MMLU = (  # tried in this order
    (
        rf"(?:(?:[Cc]hoose)|(?:(?:[Aa]nswer|[Cc]hoice){_NOT_YET_DENIED}[^ABCD]{{0,10}}?\b(?:|is|:|be))\b)"
        r"[^ABCD]{0,20}?\b(A|B|C|D)\b"
    ),
    r"\b(A|B|C|D)\b(?![^ABCD]{0,8}?(?:n't|not)[^ABCD]{0,5}?(?:correct|right))[^ABCD]{0,10}?\b(?:correct|right)\b",
    r"^(A|B|C|D)(?:\.|,|:|$)",
    _ANYWHERE,
)
_OFFICIAL_CEVAL = (
    (
        rf"(?:(?:选|选择|选定)[：:]?\s*|(?:(?:答案|选项){_NOT_DENIED_ZH}[^ABCD]{{0,10}}?(?:是|选|为|：|:|】))[^ABCD]{{0,10}}?)"
        r"(A|B|C|D)(?:选项)?(?:\)|。|\.|，|,|．|、|A|B|C|D|$|：|:|\)|）)"
    ),
    (
        r"(A|B|C|D)(?:选?项)?(?![^ABCD]{0,4}?(?:不|非)[^ABCD]{0,4}?(?:正确|对[的，。：]|符合))"
        r"[^ABCD]{0,4}?(?:正确|对[的，。：]|符合)"
    ),
    r"^[\(（]?(A|B|C|D)(?:。|\)|）|\.|，|,|．|：|:|$)",
    _ANYWHERE,
)


def official_mmlu_letter(reply: str, choices: Sequence[str]) -> str:
    """What `evaluate_chat_mmlu` reads: never nothing, in the last resort the option most like the reply."""
    return _first_match(_OFFICIAL_MMLU, mmlu_processed(reply[:FIRST_CHARACTERS], choices), choices)


def official_ceval_letter(reply: str, question: str, choices: Sequence[str]) -> str:
    """What `evaluate_chat_ceval` reads; as `official_mmlu_letter`, in Chinese."""
    return _first_match(_OFFICIAL_CEVAL, ceval_processed(reply[:FIRST_CHARACTERS], question, choices), choices)


def mmlu_processed(reply: str, choices: Sequence[str]) -> str:
    """The reply with each option's words replaced by its letter, the longest first, also inside other words."""
    for letter, words in _longest_first(choices):
        reply = re.sub(re.escape(words.rstrip(".")), letter, reply, flags=re.IGNORECASE)
    return reply


def ceval_processed(reply: str, question: str, choices: Sequence[str]) -> str:
    """As `mmlu_processed`, once the question's last sentence became "答案是" (before its blank) and "" (after it)."""
    parts = question.rstrip("。").split("。")[-1].split("_")
    for part, instead in ((parts[0], "答案是"), (parts[-1], "")):
        if len(part.strip()) > 4:
            reply = reply.replace(part, instead)
    for letter, words in _longest_first(choices):
        reply = reply.replace(words.rstrip("。"), letter)
    return reply


def _longest_first(choices: Sequence[str]) -> list[tuple[str, str]]:
    return sorted(zip(ascii_uppercase, choices), key=lambda item: -len(item[1]))


def _first_match(patterns: Sequence[str], text: str, choices: Sequence[str]) -> str:
    for pattern in patterns:
        if match := re.search(pattern, text):
            return match[1]
    from thefuzz import process, utils  # slow to import, and seldom needed

    if not utils.full_process(text):  # nothing to compare: every option is as unlike it, the first one is taken
        return "A"
    best: str = process.extractOne(text, list(choices))[0]
    return ascii_uppercase[list(choices).index(best)]
