"""Reading the letter of a multiple-choice answer out of a reply: ours, and the official scripts' for comparison.

`concluded_letter` looks for what the reply concludes. Cues are read from strong to weak: "the answer is C" and its
kind (the last one counts), a reply that opens with the letter, "so C", "C is correct", the words of one option, the
only letter that is left standing. A letter that is denied ("not A", "B 错误") is never the answer, several letters
at one cue ("A or B") are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qwen_eval.extraction.symptoms import answer_part

LETTERS = "ABCD"

# --- as it is concluded --------------------------------------------------------------------------------------------

_FULL_WIDTH = str.maketrans({0xFF21 + i: chr(65 + i) for i in range(26)} | {0xFF41 + i: chr(97 + i) for i in range(26)})
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm|bf)\s*\{\s*([^{}]*?)\s*\}")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\(?([^{}]*?)\)?\s*\}")
_SMALL = re.compile(r"(?im)(\b(?:option|choice|answer(?: is)?:?)\s*[(\"']?)([a-d])(?=[)\"']?\s*[.。]?\s*$)")
_MARKUP = re.compile(r"\*+|`+|\$+|\\[()\[\]]|</?[a-z]+>")

_BRACKETS = "()（）[]【】\"'“”‘’「」{}"

# One letter or several at one place: "A", "(A)", "A、B和C", "A and B".
_JOINT = (
    r"\s*[)）\]]?\s*(?:,\s*and\b|,\s*or\b|[,、/&+，]|\b(?:and|or|nor)\b|和|与|及|或者?|以及|跟)\s*"
    r"(?:option\s+|choice\s+|选项)?[(（\[]?\s*"
)
_OPENING = r"[\s\"'“”‘’「『【（(\[:：]*"
_CLOSING = r"[\s\"'“”‘’」』】）)\]]*"
_NAMED = _OPENING + r"(?:(?:the\s+)?(?:option|choice|letter|answer|number)\b|选项|第)?" + _OPENING

_COPULA = r"(?:\b(?:is|are|was|be)\b|'s\b|:|：|=|\u2192|->)"
_SURELY = (
    r"(?:\s*(?:most\s+likely|likely|probably|indeed|therefore|thus|clearly|still|simply|actually|really|definitely"
    r"|then|also)\b)*"
)
_ANSWER_EN = (
    r"\b(?:answer|choice|option|solution|conclusion|response)\b(?!\s+[A-Z]\b)[^.!?;\n。！？；]{0,60}?"
    rf"{_COPULA}{_SURELY}|\banswer\b"
)
_CHOOSE_EN = (
    r"\b(?:choose|chose|choosing|pick|picked|picking|select|selected|selecting|go(?:ing)?\s+(?:with|for)|opt\s+for"
    r"|settle\s+on)\b"
)
_ANSWER_ZH = (
    r"(?:答案|选项|结论|结果)[^。！？；;\n]{0,30}?(?:应该是|应当是|应为|应是|就是|是|为|选择|选|即|：|:|=)"
    r"|答案\s*[】\]）)]?"
)
_CHOOSE_ZH = r"(?<![可备挑筛待])(?:选择|选定|选出|选)(?!项)(?:的?(?:应该?)?(?:是|为))?"
_ITEM = rf"{_CLOSING}(?:选?项)?\s*"  # what may stand between a letter and what is said of it
_STATEMENT = r"的?(?:说法|描述|表述|叙述|内容)"
_CONCLUDES = re.compile(rf"(?:{_ANSWER_EN}|{_CHOOSE_EN}|{_ANSWER_ZH}|{_CHOOSE_ZH}){_NAMED}\Z", re.IGNORECASE)
_CONCLUDED = re.compile(
    rf"{_ITEM}(?:"
    r"(?:is|must\s+be|would\s+be|should\s+be|seems\s+to\s+be)\s+(?:(?:therefore|thus|also)\s+)?"
    r"the\s+(?:\w+\s+){0,2}(?:answer|choice|option)\b"
    r"|(?:才?是|为|就是)(?:本题的?|该题的?|最终的?)?(?:正确|最佳|最终|唯一)?的?(?:答案|选项|选择)|符合(?:题意|题目|要求))",
    re.IGNORECASE,
)
_THEREFORE = re.compile(
    r"(?:\b(?:so|therefore|thus|hence|consequently|but|rather|leaves|leaving)\b"
    r"|所以|因此|因而|故|于是|综上|可知|而是|只有|剩下)"
    r"(?:\s*(?:only|it|it's|this|that|we|i)\b)*(?:\s*(?:have|get|must\s+be|is|be)\b)?[,，]?(?:为|是)?"
    rf"{_NAMED}\Z",
    re.IGNORECASE,
)
_THE_ONE_THAT_IS = re.compile(rf"(?:的|者)(?:应该?)?(?:是|为)[:：]?{_NAMED}\Z")
_CORRECT = re.compile(
    rf"{_ITEM}(?:(?:is|was|looks|seems|must\s+be|would\s+be|should\s+be)\s+(?:the\s+)?(?:most\s+|only\s+)?"
    r"(?:correct|right|true|best|accurate|appropriate)\b"
    rf"|(?:{_STATEMENT})?(?:是|为|最|才)*(?:正确|对(?:的|[，。,.]|$)|合适|恰当))",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"(?:\bnot\b(?!\s+only)|n't\b|\bcannot\b|\bnever\b|\bneither\b|\bnor\b|\brather\s+than\b|\binstead\s+of\b|\bexcept\b"
    r"|\b(?:exclud|eliminat|discard|reject)(?:e|es|ed|ing)?\b|\brul(?:e|es|ed|ing)\s+out\b"
    r"|不(?:能|应该?|可能?|会|要|该)?(?:选择|选|是|为)|别选|没有?选|排除|除了?|而非|并非|不属于)"
    rf"(?:\s*(?:be|is|the|to|choose|pick|select)\b)*(?:掉|了)?{_NAMED}\Z",
    re.IGNORECASE,
)
_DENIED = re.compile(
    rf"{_ITEM}(?:"
    r"(?:(?:is|are|was|were|does|do|can|could|would|will|must|should|seems?|looks?)\b\s*)?"
    r"(?:(?:both|all|also|clearly|simply)\s+)*"
    # "C, not A" and "C not only ..." deny nothing of C
    r"(?:\bnot\b(?!\s+(?:only\b|(?:option\s+)?[(（]?[A-Z]\b))|n['’]t\b|cannot\b"
    r"|(?:wrong|incorrect|false|invalid|impossible|(?:ruled\s+)?out|eliminated|excluded|irrelevant)\b)"
    rf"|(?:{_STATEMENT})?[都均也是显然明就全则]*"
    r"(?:不(?!选|仅|但|过|是[A-Z])|错|有误|非(?!常)|误|无关|(?:可以|应该?|应当|可)?被?排除))",
    re.IGNORECASE,
)
_HYPOTHESIS = re.compile(r"\b(?:if|suppose|assuming|whether|unless|had)\b|如果|假如|假设|若|是否|要是", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?。！？；;\n]")
# "A dog barks" at the start of a sentence is an article; "A is", "A because" a letter.
_ARTICLE = re.compile(
    r"\s+(?!(?:is|are|was|and|or|nor|because|since|as|would|will|must|should|could|can|cannot|seems|has|does|looks"
    r"|appears|but|not|then|by)\b)[a-z]"
)


@dataclass(frozen=True)
class _Mention:
    """Letters named at one place of the text, `text[start:end]`."""

    start: int
    end: int
    letters: tuple[str, ...]


@dataclass(frozen=True)
class _Reply:
    """A reply without its markup, with the mentions of letters in it and those that it denies."""

    text: str
    options: Mapping[str, str]  # letter -> its words

    def before(self, mention: _Mention) -> str:
        return self.text[max(0, mention.start - 120) : mention.start]

    def is_denied(self, mention: _Mention) -> bool:
        return bool(_DENIES.search(self.before(mention)) or _DENIED.match(self.text, mention.end))

    def is_supposed(self, mention: _Mention) -> bool:
        """Only considered: "if the answer is A", "is it A?"."""
        sentence = _SENTENCE_END.split(self.before(mention))[-1]
        return bool(_HYPOTHESIS.search(sentence) or re.match(_CLOSING + "[?？]", self.text[mention.end :]))


def concluded_letter(reply: str, choices: Sequence[str] = (), *, letters: str = LETTERS) -> str | None:
    """The letter that the reply concludes; None when it concludes none or several.

    `choices` are the words of the options, in the letters' order: a reply may name its option by them alone.
    """
    text = _plain(reply)
    options = {letter: _bare(_unmarked(words)) for letter, words in zip(letters, choices)}
    if len(bare := _bare(text).strip(_BRACKETS)) == 1:
        return bare.upper() if bare.upper() in letters else _named_option(text, options)
    found = _Reply(text, options)
    mentions = [m for m in _mentions(text, options, letters) if not _is_article(text, m)]
    standing = [m for m in mentions if not found.is_denied(m)]
    for stage in (_answer, _opening, _therefore, _correct):
        letter, is_settled = stage(found, standing)
        if is_settled:
            return letter
    return _named_option(text, options) or _only(m for m in standing if not found.is_supposed(m))


_Verdict = tuple[str | None, bool]  # letter, and whether this settles the matter (with None: several letters)


def _answer(reply: _Reply, standing: list[_Mention]) -> _Verdict:
    """The last of: "the answer is C", "选C", "C is the answer", `\\boxed{C}`, "the answer is <words>", a line "C"."""
    found: list[tuple[int, str | None]] = []
    for mention in standing:
        cue = _CONCLUDES.search(reply.before(mention)) or _CONCLUDED.match(reply.text, mention.end)
        if (cue or _is_whole_line(reply.text, mention)) and not reply.is_supposed(mention):
            found.append((mention.start, _single(mention)))
    for letter, words in reply.options.items():
        found += [(at, letter) for at in _concluded_words(reply, words)]
    return (max(found, key=lambda f: f[0])[1], True) if found else (None, False)


def _opening(reply: _Reply, standing: list[_Mention]) -> _Verdict:
    """A reply that begins "C. ...", "(C) ...", "C because"; not one that repeats the list of options."""
    heads = [m for m in standing if _opens_line(reply.text, m)]
    if len({m.letters for m in heads}) == 1 and not reply.text[: heads[0].start].strip(" \n(（[【"):
        return _single(heads[0]), True
    return None, False


def _therefore(reply: _Reply, standing: list[_Mention]) -> _Verdict:
    """The last "so C", "而是C"."""
    found = [m for m in standing if _THEREFORE.search(reply.before(m)) and not reply.is_supposed(m)]
    found = [m for m in found if _single(m)]
    return (found[-1].letters[0], True) if found else (None, False)


def _correct(reply: _Reply, standing: list[_Mention]) -> _Verdict:
    """ "C is correct", "正确的是C": said of one letter only, else it is no conclusion."""
    found = [
        m
        for m in standing
        if _CORRECT.match(reply.text, m.end) or _THE_ONE_THAT_IS.search(reply.before(m))
        if not reply.is_supposed(m)
    ]
    return (_only(found), True) if found else (None, False)


def _named_option(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose words the text holds; longer options hide the shorter ones they contain."""
    named: list[str] = []
    rest = text.casefold()
    for words in sorted({w.casefold() for w in options.values()}, key=len, reverse=True):
        pattern = _words_pattern(words)
        if pattern is not None and (spans := [m.span() for m in pattern.finditer(rest)]):
            if not all(_DENIES.search(rest[:start]) or _DENIED.match(rest, end) for start, end in spans):
                named += [letter for letter, other in options.items() if other.casefold() == words]
            rest = pattern.sub(lambda m: "\0" * len(m[0]), rest)
    return named[0] if len(named) == 1 else None


def _concluded_words(reply: _Reply, words: str) -> Iterator[int]:
    """Where the text concludes an option by its words: "The answer is Paris"."""
    pattern = _words_pattern(words)
    if pattern is None:
        return
    for match in pattern.finditer(reply.text.casefold()):
        mention = _Mention(match.start(), match.end(), ())
        ends = re.match(_CLOSING + r"(?:[.,;!。，；！\n]|$)", reply.text[match.end() :])
        if ends and _CONCLUDES.search(reply.before(mention)) and not _DENIES.search(reply.before(mention)):
            yield match.start()


def _mentions(text: str, options: Mapping[str, str], letters: str) -> Iterator[_Mention]:
    """Letters that stand alone, those joined by "and", "、" ... as one mention; none inside an option's own words."""
    hidden = text
    for words in options.values():
        pattern = _words_pattern(words)
        if pattern is not None:
            hidden = _hide(hidden, pattern)
    for match in _letter_pattern(letters).finditer(hidden):
        found = re.findall(rf"(?<![A-Za-z0-9])[{letters}{letters.lower()}](?![A-Za-z0-9])", match[0])
        run = match.groupdict().get("run")
        yield _Mention(match.start("at"), match.end(), tuple((run or "".join(found)).upper()))


def _hide(text: str, pattern: re.Pattern[str]) -> str:
    """The text with an option's words blanked out, where they are longer than a letter and what belongs to it."""
    folded = text.casefold()
    if len(folded) != len(text):
        return text
    for match in pattern.finditer(folded):
        text = text[: match.start()] + "\0" * len(match[0]) + text[match.end() :]
    return text


@lru_cache(maxsize=8)
def _letter_pattern(letters: str) -> re.Pattern[str]:
    """A capital that is no part of a word or formula, several joined ones, a run ("ABD"), or "(c)"."""
    one = rf"(?<![A-Za-z0-9.\-+\\])(?<![a-z]['’])[{letters}](?![A-Za-z0-9+#=^]|['’][A-Za-z]|-[A-Za-z0-9]|\.[A-Za-z])"
    joined = rf"{one}(?:{_JOINT}{one})*"
    run = rf"(?<![A-Za-z0-9])(?P<run>[{letters}]{{2,{len(letters)}}})(?![A-Za-z0-9])"
    return re.compile(rf"(?P<at>{joined}|{run}|(?<=[(（])[{letters.lower()}](?=[)）]))")


def _words_pattern(words: str) -> re.Pattern[str] | None:
    """Where an option is written out, as a whole word; None for an option that is itself just a letter or nothing."""
    if len(words) < 2 and not words.isdigit():
        return None
    folded = re.escape(words.casefold())
    return re.compile(rf"(?<![a-z0-9.]){folded}(?![a-z0-9]|\.\d)" if words[:1].isascii() else folded)


def _is_article(text: str, mention: _Mention) -> bool:
    """ "A dog barks": a capital A that begins a sentence."""
    if mention.letters != ("A",) or not _ARTICLE.match(text, mention.end):
        return False
    return not (before := text[: mention.start].rstrip(" \"'“‘(")) or before[-1] in ".!?\n。！？:：,，"


def _is_whole_line(text: str, mention: _Mention) -> bool:
    """The letter is all there is in the first or last line: "Let me see.\\n\\nC"."""
    lines = text.strip().split("\n")
    start = text.rfind("\n", 0, mention.start) + 1
    stop = text.find("\n", mention.end)
    line = text[start : stop if stop >= 0 else len(text)]
    return line.strip() in (lines[0].strip(), lines[-1].strip()) and _bare(line).strip(_BRACKETS) == "".join(
        mention.letters
    )


def _opens_line(text: str, mention: _Mention) -> bool:
    """Begins a line, or follows another option in it, as letters in a list of options do."""
    before = text[: mention.start].rstrip("(（[【 ")
    mark = re.match(r"\s*[)）\]】]?\s*(?:[.．。:：、,，)）]|$|\n|[-–—]\s|(?:because|since|as)\b)", text[mention.end :])
    return mark is not None and (
        not before or before[-1] == "\n" or bool(re.match(r"\s*[.．、)）]", text[mention.end :]))
    )


def _single(mention: _Mention) -> str | None:
    return mention.letters[0] if len(set(mention.letters)) == 1 else None


def _only(mentions: Iterator[_Mention] | list[_Mention]) -> str | None:
    """The letter when all mentions are of the same one."""
    letters = {letter for mention in mentions for letter in mention.letters}
    return letters.pop() if len(letters) == 1 else None


def _plain(reply: str) -> str:
    """What is said after any thinking, without markup; nothing when the thinking never ended."""
    text = answer_part(reply).translate(_FULL_WIDTH)
    text = _BOXED.sub(r" the answer is \1 ", _LATEX_TEXT.sub(r"\1", text))
    return _SMALL.sub(lambda m: m[1] + m[2].upper(), _unmarked(text))


def _unmarked(text: str) -> str:
    return _MARKUP.sub("", text.replace("__", " ")).strip()


def _bare(words: str) -> str:
    return words.strip().rstrip(".。．,，;；:：、!！").strip()


# --- as the official chat scripts read it --------------------------------------------------------------------------

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
    return _first_match(_OFFICIAL_MMLU, mmlu_processed(reply, choices), choices)


def official_ceval_letter(reply: str, question: str, choices: Sequence[str]) -> str:
    """What `evaluate_chat_ceval` reads; as `official_mmlu_letter`, in Chinese."""
    return _first_match(_OFFICIAL_CEVAL, ceval_processed(reply, question, choices), choices)


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
    return sorted(zip(LETTERS, choices), key=lambda item: -len(item[1]))


def _first_match(patterns: Sequence[str], text: str, choices: Sequence[str]) -> str:
    for pattern in patterns:
        if match := re.search(pattern, text):
            return match[1]
    from thefuzz import process, utils  # slow to import, and seldom needed

    if not utils.full_process(text):  # nothing to compare: every option is as unlike it, the first one is taken
        return LETTERS[0]
    best: str = process.extractOne(text, list(choices))[0]
    return LETTERS[list(choices).index(best)]
