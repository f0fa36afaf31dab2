"""Extraction of the letter of a multiple-choice answer; that of the official scripts is in `official_letters`.

`concluded_letter` looks for the conclusion of the reply. Cues are tried from strong to weak: "the answer is C" and the
like (the last one counts), a list that judges each option, a reply that begins with the letter, "so C", "C is correct",
the words of one option, the only letter that is not denied. A denied letter ("not A", "B 错误") is never the answer;
several letters at one cue ("A or B") give none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qwen_eval.extraction.symptoms import before_next_question, visible_answer

LETTERS = "ABCD"

_MENTIONS = 200  # letters looked at, at the beginning and at the end of a reply
_LINE = 400  # characters of a line that judges or is an option

# --- as it is concluded --------------------------------------------------------------------------------------------

_FULL_WIDTH = str.maketrans({0xFF21 + i: chr(65 + i) for i in range(26)} | {0xFF41 + i: chr(97 + i) for i in range(26)})
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm|bf) ?\{([^{}]*)\}")
_BOXED = re.compile(r"\\(?:boxed|fbox) ?\{([^{}]*)\}")
_SMALL = re.compile(r"(?im)(\b(?:option|choice|answer)(?: is)?:? ?[(\"']?)([a-z])(?=[)\"']? ?[.。]? ?$)")
_SPACES = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n{3,}")
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
    rf"{_COPULA}{_SURELY}|\banswer\b|\b(?:correct|right|best)\s+one\s+{_COPULA}"
)
_CHOOSE_EN = (
    r"\b(?:choose|chose|choosing|pick|picked|picking|select|selected|selecting|go(?:ing)?\s+(?:with|for)|opt\s+for"
    r"|settle\s+on)\b"
)
_ANSWER_ZH = (
    r"(?:答案|(?<![A-Z])选项|结论|结果)[^。！？；;\n]{0,30}?(?:应该是|应当是|应为|应是|就是|是|为|选择|选|即|：|:|=)"
    r"|答案\s*[】\]）)]?"
)
_CHOOSE_ZH = r"(?<![可备挑筛待误])(?<!易错)(?:选择|选定|选出|选)(?!项)(?:的?(?:应该?)?(?:是|为))?"
# what follows second thoughts: "wait, so it should be C", "不是，是C"
_CORRECTED = (
    r"\b(?:it|this|that)\s+(?:should|must|has\s+to)\s+(?:actually\s+)?be|(?:不是|不对|错了)[,，。：]?\s*(?:应该?|而)?是"
)
_ITEM = rf"{_CLOSING}(?:选?项)?\s*"  # what may stand between a letter and what is said of it
_STATEMENT = r"的?(?:说法|描述|表述|叙述|内容)"
# "B项说法错误，当选": what an exam key says of the option to choose, be it a wrong statement
_CHOSEN = (
    r"[^A-Z。；;\n]{0,30}?(?:(?<![不未没])当选(?=\s*(?:[。，；,.;!！)）]|$|\n))"
    r"|(?<!不)(?:为|是)(?:本题|该题)?的?(?:正确|最佳)?(?:答案|选项)|(?<!不)(?<!不太)符合(?:题意|题目|要求))"
)
_IS_CHOSEN = re.compile(_CHOSEN)
_CONCLUDES = re.compile(
    rf"(?:{_ANSWER_EN}|{_CHOOSE_EN}|{_ANSWER_ZH}|{_CHOOSE_ZH}|{_CORRECTED}){_NAMED}\Z", re.IGNORECASE
)
_CONCLUDED = re.compile(
    rf"{_ITEM}(?:"
    r"(?:is|must\s+be|would\s+be|should\s+be|seems\s+to\s+be)\s+(?:(?:therefore|thus|also)\s+)?"
    r"the\s+(?:\w+\s+){0,2}(?:answer|choice|option)\b"
    r"|(?:才?是|为|就是)(?:本题的?|该题的?|最终的?)?(?:正确|最佳|最终|唯一)?的?(?:答案|选项|选择)"
    rf"|{_CHOSEN})",
    re.IGNORECASE,
)
_ANNOUNCES = re.compile(
    r"\b(?:options|choices|each|every|analy[sz]\w*)\b|选项(?:如下|内容)|分析|解析|逐|各", re.IGNORECASE
)
_THEREFORE = re.compile(
    r"(?:\b(?:so|therefore|thus|hence|consequently|but|rather|leaves|leaving|left\s+with)\b"
    r"|所以|因此|因而|故|于是|综上|可知|而是|只有|剩下)"
    r"(?:\s*(?:only|it|it's|this|that|we|i)\b)*(?:\s*(?:have|get|must\s+be|is|be)\b)?[,，]?(?:为|是)?"
    rf"{_NAMED}\Z",
    re.IGNORECASE,
)
_THE_ONE_THAT_IS = re.compile(rf"(?:的|者)(?:应该?)?(?:是|为)[:：]?{_NAMED}\Z")
_CORRECT = re.compile(
    rf"{_ITEM}(?:(?:is|was|looks|seems|must\s+be|would\s+be|should\s+be)\s+(?:the\s+)?(?:most\s+|only\s+)?"
    r"(?:correct|right|true|best|better|accurate|appropriate)\b"
    rf"|(?:{_STATEMENT})?(?:是|为|最|才)*(?:正确|对(?:的|[，。,.]|$)|合适|恰当))",
    re.IGNORECASE,
)
# What a list says of its options: "B. nucleus - correct", "B ✓", "| B | wrong |".
_SAID_OF_IT = r"(?:(?:this\s+)?(?:option|statement|one)?\s*(?:is|was)\s+|选?项|说法|是|为)?(?:the\s+)?"
_LEAD = rf"[\s:：\-–—|.．、,，)）\]】(（\"'“”]*{_SAID_OF_IT}\s*"
_NO_PAIR = r"\b(?!, ?(?:true|false|right|wrong)\b)"  # "True, False" is an option, no verdict
_ALONE = r"(?=[\s.,;!)。，；]*$)"  # "Yes, because ..." is an option too
_RIGHT = re.compile(
    rf"{_LEAD}(?:(?:correct|right|true){_NO_PAIR}|(?:yes|是){_ALONE}|正确|符合|对(?=$|[\s。，,.；;)）])|[✓✔✅☑]|√(?!\w))",
    re.IGNORECASE,
)
_WRONG = re.compile(
    rf"{_LEAD}(?:(?:not\s+(?:correct|right|true)|incorrect|wrong|false){_NO_PAIR}|(?:no|否){_ALONE}|不正确|不符合|不对|错|有误|[✗✘❌✖×])",
    re.IGNORECASE,
)
_AT_END = re.compile(r"(?:[-–—:：(（\[|]|->|→|=)\s*([^-–—:：(（\[|\n]{1,20})\s*$", re.MULTILINE)

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
    r"|[^A-Z。；;\n]{0,30}?不(?:当选|入选|应选)"
    rf"|(?:{_STATEMENT})?[都均也是显然明就全则]*"
    r"(?:不(?!选|仅|但|过|是[A-Z])|错|有误|非(?!常)|误|无关|(?:可以|应该?|应当|可)?被?排除))",
    re.IGNORECASE,
)
_ITEM_MARK = re.compile(r"\s*[)）\]】]?\s*(?:[.．。:：、,，)）]|$|\n|[-–—]\s|(?:because|since|as)\b)")
_ITEM_DOT = re.compile(r"\s*[.．、)）]")
_ENDS = re.compile(_CLOSING + r"(?:[.,;!。，；！\n]|$)")
_ASKED = re.compile(_CLOSING + "[?？]")
_HYPOTHESIS = re.compile(r"\b(?:if|suppose|assuming|whether|unless|had)\b|如果|假如|假设|若|是否|要是", re.IGNORECASE)
# "Many people choose A": not the choice of the reply
_OTHERS = re.compile(
    r"\b(?:many|some|most|others|people|students|you\s+(?:might|may|could))\b[^.,;:!?\n]{0,30}"
    r"\b(?:choose|chose|picks?|picked|selects?|selected|say|think|opt\s+for|go\s+(?:with|for))\b[^.,;:!?\n]{0,15}\Z",
    re.IGNORECASE,
)
# "The answer is B. Wait, ...": what follows counts, if it concludes anything
_SECOND_THOUGHT = re.compile(
    r"(?:^|[.!?。！？；;\n]|\.\.\.|……)\s{0,4}(?:hmm{1,8}|oh|no|哦|嗯|啊)?[\s,，]{0,4}"
    r"(?:wait|hold\s+on|scratch\s+that|等等|等一下|不对(?=[,，。！])|更正|我?重新(?:考虑|思考|审视|分析|检查))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？；;\n]")
# "A dog barks" at the start of a sentence is an article; "A is", "A because" a letter.
_ARTICLE = re.compile(
    r"\s+(?!(?:is|are|was|and|or|nor|because|since|as|would|will|must|should|could|can|cannot|seems|has|does|looks"
    r"|appears|but|not|then|by)\b)[a-z]"
)
_PRONOUN = re.compile(r"['’]|\s+(?!(?:is|are|was|and|or|because|since)\b)[a-z]")


def _window(text: str, end: int) -> str:
    """What stands before a place, as far as a cue may reach."""
    return text[max(0, end - 120) : end]


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
    letters: str
    mentions: Sequence[_Mention] = ()

    @staticmethod
    def of(text: str, options: Mapping[str, str], letters: str) -> _Reply:
        found = [m for m in _mentions(text, options, letters) if not _is_article(text, m)]
        return _Reply(text, options, letters, _outer(found))

    @cached_property
    def outer_lines(self) -> tuple[str, str]:
        """The first and the last line."""
        lines = self.text.strip().split("\n")
        return lines[0].strip(), lines[-1].strip()

    def before(self, mention: _Mention) -> str:
        return _window(self.text, mention.start)

    def is_denied(self, mention: _Mention) -> bool:
        if _IS_CHOSEN.match(self.text, mention.end):
            return False
        is_denied = _DENIED.match(self.text, mention.end) or _DENIED.match(self.text, self.end_with_words(mention))
        return bool(_DENIES.search(self.before(mention)) or is_denied)

    def end_with_words(self, mention: _Mention) -> int:
        """The end of "B. nucleus" for a mention of B; its own end where the option's words do not follow."""
        words = self.options.get(mention.letters[0], "").casefold()
        following = self.text[mention.end : mention.end + 4 + len(words)].casefold()
        at = following.find(words) if words else -1
        return mention.end if at < 1 or following[:at].strip(" .:：、)）") else mention.end + at + len(words)

    def is_supposed(self, mention: _Mention) -> bool:
        """Only considered: "if the answer is A", "is it A?"."""
        before = self.before(mention)
        is_hypothesis = _HYPOTHESIS.search(_SENTENCE_END.split(before)[-1]) or _OTHERS.search(before)
        return bool(is_hypothesis or _ASKED.match(self.text, mention.end))


def concluded_letter(reply: str, choices: Sequence[str] = (), *, letters: str = LETTERS) -> str | None:
    """The letter that the reply gives as its answer; None for none or several.

    `choices` are the words of the options, in the letters' order: a reply may name its option by them alone.
    """
    options = {letter: _bare(_unmarked(words)) for letter, words in zip(letters, choices)}
    text = _plain(before_next_question(visible_answer(reply)))
    return _concluded_anew(text, options, letters) or _concluded(text, options, letters)


def _concluded_anew(text: str, options: Mapping[str, str], letters: str) -> str | None:
    """What the reply concludes after its last second thought: "B. Wait, ..., so C"."""
    thoughts = list(_SECOND_THOUGHT.finditer(text))
    if not thoughts:
        return None
    found = _Reply.of(text[thoughts[-1].end() :], options, letters)
    standing = [m for m in found.mentions if not found.is_denied(m)]
    return next((letter for stage in (_answer, _therefore) if (letter := stage(found, standing)[0])), None)


def _concluded(text: str, options: Mapping[str, str], letters: str) -> str | None:
    if len(bare := _bare(text).strip(_BRACKETS)) == 1:
        same = [letter for letter, words in options.items() if words == bare]
        return bare.upper() if bare.upper() in letters else same[0] if len(same) == 1 else _named_option(text, options)
    found = _Reply.of(text, options, letters)
    standing = [m for m in found.mentions if not found.is_denied(m)]
    for stage in (_answer, _only_right_one, _opening, _therefore, _correct):
        letter, is_settled = stage(found, standing)
        if is_settled:
            return letter
    return _named_option(text, options) or _only(m for m in standing if not found.is_supposed(m))


_Verdict = tuple[str | None, bool]  # letter, and whether this settles the matter (with None: several letters)


def _answer(reply: _Reply, standing: list[_Mention]) -> _Verdict:
    """The last of: "the answer is C", "选C", "C is the answer", `\\boxed{C}`, "the answer is <words>", a line "C"."""
    found: list[tuple[int, str | None]] = []
    for mention in standing:
        cue = _concludes(reply.before(mention)) or _CONCLUDED.match(reply.text, mention.end)
        if (cue or _is_whole_line(reply, mention)) and not reply.is_supposed(mention):
            found.append((mention.start, _single(mention)))
    for letter, words in reply.options.items():
        found += [(at, letter) for at in _concluded_words(reply, words)]
    return (max(found, key=lambda f: f[0])[1], True) if found else (None, False)


def _concludes(before: str) -> bool:
    """Whether the text ends in a cue; not one that announces a list: "Let us look at each option:"."""
    cue = _CONCLUDES.search(before)
    return cue is not None and not ("\n" in cue[0] and _ANNOUNCES.search(before[-60:].rpartition("\n")[0]))


def _only_right_one(reply: _Reply, standing: list[_Mention]) -> _Verdict:
    """A list that judges at least two options, by their letters or their words, and finds one of them right."""
    mentions = [m for m in reply.mentions if _single(m)]
    mentions += [m for letter, words in reply.options.items() for m in _mentions_of_words(reply.text, letter, words)]
    mentions = _outer(sorted(mentions, key=lambda m: m.start))
    judged: dict[str, set[bool]] = {}
    for mention, following in zip(mentions, [*mentions[1:], None]):
        said = _verdict(reply.text[reply.end_with_words(mention) : following.start if following else len(reply.text)])
        if said is not None:
            judged.setdefault(mention.letters[0], set()).add(said)
    right = [letter for letter, said in judged.items() if said == {True}]
    return (right[0], True) if len(right) == 1 and len(judged) > 1 else (None, False)


def _verdict(behind: str) -> bool | None:
    """Whether the text behind an option says right or wrong, there or at the end of the line."""
    line = behind.split("\n")[0][:_LINE]
    at_end = _AT_END.search(line)
    for part in (line, *([at_end[1]] if at_end else [])):
        if _WRONG.match(part):
            return False
        if _RIGHT.match(part):
            return True
    return None


def _mentions_of_words(text: str, letter: str, words: str) -> Iterator[_Mention]:
    if (pattern := _words_pattern(words)) is not None:
        for match in pattern.finditer(text.casefold()):
            yield _Mention(match.start(), match.end(), (letter,))


def _opening(reply: _Reply, standing: list[_Mention]) -> _Verdict:
    """A reply that begins "C. ...", "(C) ...", "C because"; not one that repeats the list of options."""
    heads = [m for m in standing if _opens_line(reply.text, m)]
    if not heads or reply.text[: heads[0].start].strip(" \n(（[【"):
        return None, False
    letters = [m.letters for m in heads]
    is_list = len(set(letters)) > 1 and letters == sorted(letters) and letters[0] == (next(iter(reply.letters)),)
    return (None, False) if is_list else (_single(heads[0]), True)


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
            if not all(_DENIES.search(_window(rest, start)) or _DENIED.match(rest, end) for start, end in spans):
                named += [letter for letter, other in options.items() if other.casefold() == words]
            rest = pattern.sub(lambda m: "\0" * len(m[0]), rest)
    return named[0] if len(named) == 1 else None


def _concluded_words(reply: _Reply, words: str) -> Iterator[int]:
    """Where the text concludes an option by its words: "The answer is Paris", "答案是乙"."""
    pattern = _words_pattern(words, least=1)
    if pattern is None:
        return
    for mention in _outer([_Mention(*match.span(), ()) for match in pattern.finditer(reply.text.casefold())]):
        ends = _ENDS.match(reply.text, mention.end)
        cue = (ends and _concludes(reply.before(mention))) or _CONCLUDED.match(reply.text, mention.end)
        if cue and not _DENIES.search(reply.before(mention)):
            yield mention.start


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
    pieces, end = [], 0
    for match in pattern.finditer(folded):
        pieces += [text[end : match.start()], "\0" * len(match[0])]
        end = match.end()
    return "".join([*pieces, text[end:]])


@lru_cache(maxsize=8)
def _letter_pattern(letters: str) -> re.Pattern[str]:
    """A capital that is no part of a word or formula, several joined ones, a run ("ABD"), or "(c)"."""
    one = rf"(?<![A-Za-z0-9.\-+\\])(?<![a-z]['’])[{letters}](?![A-Za-z0-9+#=^]|['’][A-Za-z]|-[A-Za-z0-9]|\.[A-Za-z])"
    joined = rf"{one}(?:{_JOINT}{one})*"
    run = rf"(?<![A-Za-z0-9])(?P<run>[{letters}]{{2,{len(letters)}}})(?![A-Za-z0-9])"
    return re.compile(rf"(?P<at>{joined}|{run}|(?<=[(（])[{letters.lower()}](?=[)）]))")


def _words_pattern(words: str, *, least: int = 2) -> re.Pattern[str] | None:
    """Where an option is written out, as a whole word; None for one of fewer than `least` characters or nothing."""
    if (len(words) < least and not words.isdigit()) or not words:
        return None
    folded = re.escape(words.casefold())
    return re.compile(rf"(?<![a-z0-9.]){folded}(?![a-z0-9]|\.\d)" if words[:1].isascii() else folded)


def _is_article(text: str, mention: _Mention) -> bool:
    """ "A dog barks": a capital A that begins a sentence. "I think" where there is an option I."""
    if mention.letters != ("A",) or not _ARTICLE.match(text, mention.end):
        return mention.letters == ("I",) and bool(_PRONOUN.match(text, mention.end))
    return not (before := _window(text, mention.start).rstrip(" \"'“‘(")) or before[-1] in ".!?\n。！？:：,，"


def _is_whole_line(reply: _Reply, mention: _Mention) -> bool:
    """The letter is all there is in the first or last line: "Let me see.\\n\\nC"."""
    start = reply.text.rfind("\n", 0, mention.start) + 1
    stop = reply.text.find("\n", mention.end)
    if mention.start - start > _LINE or (stop if stop >= 0 else len(reply.text)) - mention.end > _LINE:
        return False
    line = reply.text[start : stop if stop >= 0 else len(reply.text)]
    return line.strip() in reply.outer_lines and _bare(line).strip(_BRACKETS) == "".join(mention.letters)


def _opens_line(text: str, mention: _Mention) -> bool:
    """Begins a line, or follows another option in it, as letters in a list of options do."""
    before = _window(text, mention.start).rstrip("(（[【 ")
    if not _ITEM_MARK.match(text, mention.end):
        return False
    return not before or before[-1] == "\n" or bool(_ITEM_DOT.match(text, mention.end))


def _outer(found: list[_Mention]) -> list[_Mention]:
    """The mentions; the first and last ones of a text that names letters without end."""
    return found if len(found) <= 2 * _MENTIONS else found[:_MENTIONS] + found[-_MENTIONS:]


def _single(mention: _Mention) -> str | None:
    return mention.letters[0] if len(set(mention.letters)) == 1 else None


def _only(mentions: Iterator[_Mention] | list[_Mention]) -> str | None:
    """The letter when all mentions are of the same one."""
    letters = {letter for mention in mentions for letter in mention.letters}
    return letters.pop() if len(letters) == 1 else None


def _plain(text: str) -> str:
    """The text without markup, its spaces and empty lines collapsed: no pattern meets a long run of them."""
    text = _EMPTY_LINES.sub("\n\n", "\n".join(_SPACES.sub(" ", line).strip() for line in text.split("\n")))
    text = _LATEX_TEXT.sub(lambda m: m[1].strip(), text.translate(_FULL_WIDTH))
    text = _BOXED.sub(lambda m: f" the answer is {m[1].strip(' ()')} ", text)
    return _SMALL.sub(lambda m: m[1] + m[2].upper(), _unmarked(text))


def _unmarked(text: str) -> str:
    return _MARKUP.sub("", text.replace("__", " ")).strip()


def _bare(words: str) -> str:
    return words.strip().rstrip(".。．,，;；:：、!！").strip()
