"""Extraction of short answers of a known kind, as BIG-Bench Hard asks for them: an option, one of two words, a number,
closing brackets, a list of words.

The gold answer is used only to decide the kind. What follows the last "the answer is" (a
box and an answer tag are such cues) counts first, then how the reply ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from qwen_eval.extraction.letters import concluded_letter
from qwen_eval.extraction.numbers import concluded_number
from qwen_eval.extraction.symptoms import before_next_question, visible_answer

OPTIONS = "ABCDEFGHIJKLMNOPQR"
CLOSED = (("yes", "no"), ("true", "false"), ("valid", "invalid"))
CUE = re.compile(r"\banswer\b[^.:\n]{0,40}?(?:\bis\b|:)", re.IGNORECASE)

_OPTION_LINE = re.compile(r"^\(([A-R])\) ?(.*)$", re.MULTILINE)
_BRACKETS = r"[\[\](){}<>]"
_CUES = 10  # of the last ones
_END = 2_000  # characters in which the number that a reply ends on is looked for


def canonical(target: str) -> str:
    """A gold answer as `concluded_choice` spells it: option letter, lower-case word, plain number, or bare text."""
    target = target.strip()
    if option := re.fullmatch(r"\(?([A-R])\)?", target):
        return option[1]
    if re.fullmatch(rf"(?:{_BRACKETS}| )+", target):
        return target.replace(" ", "")
    return _words(target)


def concluded_choice(text: str, target: str, question: str = "") -> str | None:
    """The answer a reply ends on, of the kind that `target` is: never looks at which one `target` is."""
    reply = before_next_question(visible_answer(text))
    wanted = canonical(target)
    if re.fullmatch(r"[A-R]", wanted):
        return _option(reply, question)
    for words in CLOSED:
        if wanted in words:
            return _closed_word(_plain(reply), words)
    if re.fullmatch(r"-?\d+", wanted):
        return _number(reply)
    if re.fullmatch(f"{_BRACKETS}+", wanted):
        return _closing_brackets(reply, question)
    return _word_list(_plain(reply), question)


def _words(text: str) -> str:
    """Lower-case words without the punctuation between and the quotes around them."""
    return " ".join(re.sub(r"[,\"“”`.:;]|(?<!\w)'|'(?!\w)", " ", text.lower()).split())


# --- markup and cues ------------------------------------------------------------------------------------------------

_MARKUP = re.compile(r"\*\*|```\w{0,20}|`|\$|\\[()\[\]]|</?(?:b|strong|code|pre)>")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|texttt|mathtt) ?\{([^{}]*)\}")
_BOX = re.compile(r"\\(?:boxed|fbox) ?\{([^{}]*)\}")
_TAG = re.compile(r"<(final_)?answer>|</(final_)?answer>", re.IGNORECASE)
_SPACES = re.compile(r"[^\S\n]+")


def _plain(reply: str) -> str:
    """Without markup; a box or an answer tag becomes "the answer is ..." on a line of its own."""
    text = "\n".join(_SPACES.sub(" ", line).strip() for line in reply.split("\n"))
    text = _BOX.sub(r"\nThe answer is \1\n", _TEXT.sub(r"\1", text))
    text = _TAG.sub(lambda tag: "\n" if tag[0].startswith("</") else "\nThe answer is ", text)
    return _MARKUP.sub("", text)


def _statements(text: str) -> Iterator[str]:
    """What stands behind each cue, the last first: the rest of its line, or the block below where the line is empty."""
    for match in reversed(list(CUE.finditer(text))[-_CUES:]):
        line, _, below = text[match.end() : match.end() + _END].partition("\n")
        yield line if line.strip(" .:*") else below.lstrip("\n").split("\n\n")[0]


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def _first_found(text: str, read: Callable[[str], str | None]) -> str | None:
    """What `read` finds behind the cues, the last first."""
    return next((found for statement in _statements(text) if (found := read(statement)) is not None), None)


# --- the kinds ------------------------------------------------------------------------------------------------------


_ANSWER_MARK = re.compile(r"\A\s*A ?: ?(?=\(?[A-R]\)|Let\b)")  # of the few-shot form, not option A


def _option(reply: str, question: str) -> str | None:
    """The letter concluded, as in exams; else the only one in the last line. Letters not offered come last."""
    options = dict(_OPTION_LINE.findall(question))
    reply = _ANSWER_MARK.sub("", reply)
    offered = "".join(options) if len(options) > 1 else OPTIONS
    words = [options[letter].rstrip() for letter in offered] if len(options) > 1 else []
    for text in (reply, _last_line(_plain(reply))):
        for letters, choices in ((offered, words), (OPTIONS, [])):
            if letter := concluded_letter(text, choices, letters=letters):
                return letter
    return None


_REASON = re.compile(r",? (?:because|since|as it)\b[^.,\n]*")
_SUPPOSED = re.compile(
    r"\b(?:would|could) be (?:\w{1,20}ly )?valid\b|\ba valid argument (?:would|must|should|requires|needs)\b"
)
_NEGATED = re.compile(
    r"(?:\bnot\b|\bfar from\b|\bnon[- ]\Z|n['’]t\b|\bcannot\b|\bnever\b|\bnor\b|\bneither\b|\bfails? to)"
    r"(?: (?:be|been|is|are|considered|deemed|called|said|to|an?|the|that|it|this|argument|appears?|seems?|looks?|say"
    r"|think|believe|claim|conclude|make|\w{1,20}ly))*[ \"'(]*\Z",
    re.IGNORECASE,
)
_BOTH = r"\b(?:{0}|{1}) ?(?:or|and/or|/|nor) ?(?:{0}|{1})\b"
_MEANS = {"plausible": "yes", "implausible": "no"}


def _closed_word(text: str, words: tuple[str, str]) -> str | None:
    """One of two words: behind a cue the first, else a word at the beginning or alone at the end, else the last one.

    "not valid" is invalid. "valid or invalid?" says neither.
    """
    text = re.sub(_BOTH.format(*words), " ", text.lower())
    if words[0] == "valid":
        text = _SUPPOSED.sub(" ", _REASON.sub("", text))
    if words[0] == "true" and "=" in _last_line(text):  # not True = False
        text = text.rpartition("=")[2]
    if (found := _first_found(text, lambda statement: next(_said(statement, words), None))) is not None:
        return found
    if opening := re.match(rf"[\s\"'(]{{0,9}}({'|'.join(words)})(?=[.,;:!\n]|\Z)", text):
        return opening[1]
    said = list(_said(text, words)) or (list(_said(text, words, _MEANS)) if words[0] == "yes" else [])
    return said[-1] if said else None


def _said(text: str, words: tuple[str, str], means: dict[str, str] | None = None) -> Iterator[str]:
    """Each of the words in the text, turned into the other one where it is negated."""
    means = means or {word: word for word in words}
    for match in re.finditer(rf"\b(?:{'|'.join(means)})\b", text):
        word = means[match[0]]
        is_negated = _NEGATED.search(text[max(0, match.start() - 60) : match.start()]) is not None
        yield words[1 - words.index(word)] if is_negated else word


def _number(reply: str) -> str | None:
    def read(statement: str) -> str | None:
        value = concluded_number(statement)
        return None if value is None else str(value)

    found = _first_found(_plain(reply), read)
    return found if found is not None else read(reply[-_END:])


_LATEX_BRACKETS = {r"\{": "{", r"\}": "}", r"\langle": "<", r"\rangle": ">", r"\lbrace": "{", r"\rbrace": "}"}
_RUN = re.compile(rf"{_BRACKETS}(?: ?{_BRACKETS})*")
_PROSE_IN_BRACKETS = re.compile(r"\([^()\n]*[A-Za-z]{2}[^()\n]*\)")


def _closing_brackets(reply: str, question: str) -> str | None:
    """The brackets that close a sequence: behind a cue the first run of them, else a line of them, else the last run.

    Where the whole sequence is given, its beginning (the question's input) is left out.
    """
    text = _bracket_text(reply)
    opened = "".join(re.findall(_BRACKETS, question.rpartition("Input:")[2]))

    def runs(statement: str) -> list[str]:
        found = (run.replace(" ", "") for run in _RUN.findall(statement))
        return [run.removeprefix(opened) if run != opened else "" for run in found]

    def closing(statement: str) -> str | None:
        return next((run for run in runs(statement) if run and not re.search(r"[\[({<]", run)), None)

    if (found := _first_found(text, closing)) is not None:
        return found
    lines = [line for line in text.split("\n") if re.fullmatch(rf"(?:{_BRACKETS}| )+", line.strip())]
    for statement in (*reversed(lines), text):
        if found_runs := [run for run in runs(statement) if run and not re.search(r"[\[({<]", run)]:
            return found_runs[-1]
    return next((run for run in reversed(runs(text)) if run), None)


def _bracket_text(reply: str) -> str:
    """Quotes, commas, LaTeX and boxes gone, without losing a bracket that is the answer's own."""
    text = re.sub(r"\\(?:boxed|fbox) ?\{(.*)\}", r"\nThe answer is \1\n", reply)
    text = re.sub(r"\\(?:text|texttt|mathtt|mathrm) ?\{(.*)\}", r"\1", text)
    text = _TAG.sub(lambda tag: "\n" if tag[0].startswith("</") else "\nThe answer is ", text)
    text = _MARKUP.sub(" ", text)
    for latex, bracket in _LATEX_BRACKETS.items():
        text = text.replace(latex, bracket)
    text = re.sub(r"[\"'“”‘’,]|\\ ", " ", _PROSE_IN_BRACKETS.sub(" ", text))
    text = re.sub(rf"(?<={_BRACKETS})\s{{1,9}}(?:then|and|followed by)\s{{1,9}}(?={_BRACKETS})", " ", text)
    return _SPACES.sub(" ", text)


_LIST_MARK = re.compile(r"^[^\S\n]*(?:[-*•+]|\(?\d{1,3}[.):])[^\S\n]*", re.MULTILINE)
_BETWEEN = re.compile(r"->|→|=>|[\[\](){}<>|/]")


def _word_list(text: str, question: str) -> str | None:
    """The words of a list, in the order given: behind a cue, else the last lines that hold nothing but such words.

    `question` names them behind "List:"; where it does not, the words behind the cue, or of the last line.
    """
    known = set(_words(question.rpartition("List:")[2]).split()) if "List:" in question else set()
    text = _BETWEEN.sub(" ", _LIST_MARK.sub("", text))
    if not known:
        return _first_found(text, lambda statement: _words(statement) or None) or _words(_last_line(text)) or None
    return _first_found(text, lambda statement: _listed(statement, known)) or _last_block(text, known)


def _listed(statement: str, known: set[str]) -> str | None:
    """From the first to the last of the known words, with whatever stands between but "and" and numbers."""
    words = [word for word in _words(statement).split() if word in known or not (word == "and" or word.isdigit())]
    if set(words[-len(known) :]) == known:  # behind the list as it was given
        return " ".join(words[-len(known) :])
    at = [i for i, word in enumerate(words) if word in known]
    return " ".join(words[at[0] : at[-1] + 1]) if at else None


def _last_block(text: str, known: set[str]) -> str | None:
    """The last run of lines of known words alone (behind a colon, if there is one); else the last line with any."""
    block: list[str] = []
    for line in reversed(text.split("\n")):
        words = _words(line.rpartition(":")[2] or line).split()
        if words and all(word in known or word == "and" or word.isdigit() for word in words):
            block.append(" ".join(words))
            if ":" in line.rstrip(": "):
                break
        elif words and block:
            break
    if block:
        return _listed(" ".join(reversed(block)), known)
    return next((found for line in reversed(text.split("\n")) if (found := _listed(line, known))), None)
