"""The parts of a rendered chat that are content, and the token ids of the whole chat.

Rendered text alone does not tell a special token of the template from one that a message merely quotes. So a chat is
rendered twice, with its contents and with marks in their place: where the contents put for the marks give the same
text, it is known what is content.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from qwen_eval.core import Message, Prompt

Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChatSegment:
    """A piece of a rendered chat; `is_content` where the text came from a message, not from the template."""

    text: str
    is_content: bool


def pattern_of(special: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of the surface forms, as a group for `split`; nothing where there are none."""
    forms = sorted((form for form in special if form), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, forms))})" if forms else r"((?!))")


class Marks:
    """Marks in the place of texts.

    `every`: for each message's content, but for the blanks around it, which templates strip. Otherwise, and in calls
    and tools, for each special token that a text quotes: templates look into these texts, and rewrite some.
    """

    def __init__(self, special: re.Pattern[str], *, every: bool) -> None:
        self.contents: dict[str, str] = {}  # by mark
        self._special, self._every = special, every
        self._key = secrets.token_hex(8)

    def content(self, text: str) -> str:
        core = text.strip()
        if not self._every or not core:
            return self.leaf(text)
        start = text.index(core)
        return text[:start] + self._mark(core) + text[start + len(core) :]

    def leaf(self, text: str) -> str:
        return self._special.sub(lambda found: self._mark(found[0]), text)

    def _mark(self, text: str) -> str:
        mark = f"content{self._key}n{len(self.contents)}end"
        self.contents[mark] = text
        return mark


class NoMarks:
    """Leaves every text as it is."""

    contents: Mapping[str, str] = {}

    def content(self, text: str) -> str:
        return text

    leaf = content


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The input of a template; `marked` maps each mark to the text it replaces."""

    rows: list[Fields]
    tools: list[Any] | None
    marked: Mapping[str, str]

    @staticmethod
    def of(messages: Sequence[Message], tools: Sequence[str] = (), marks: Marks | NoMarks | None = None) -> Chat:
        marks = marks or NoMarks()
        rows = [_row_of(message, marks) for message in messages]
        described = [_marked_leaves(_parsed(tool), marks) for tool in tools] or None
        return Chat(rows=rows, tools=described, marked=marks.contents)

    def with_argument_text(self) -> Chat:
        """The arguments of calls as JSON text: some templates add them to a string."""
        return replace(self, rows=[_with_argument_text(row) for row in self.rows])


def _row_of(message: Message, marks: Marks | NoMarks) -> Fields:
    row: Fields = {"role": message.role, "content": marks.content(message.content)}
    if message.tool_calls:
        named = [(marks.leaf(call.name), _marked_leaves(_parsed(call.arguments), marks)) for call in message.tool_calls]
        row["tool_calls"] = [_call(name, arguments) for name, arguments in named]
    return row


def _call(name: str, arguments: Any) -> Fields:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _with_argument_text(row: Fields) -> Fields:
    if "tool_calls" not in row:
        return row
    functions = [call["function"] for call in row["tool_calls"]]
    return {
        **row,
        "tool_calls": [_call(f["name"], json.dumps(f["arguments"], ensure_ascii=False)) for f in functions],
    }


def _parsed(text: str) -> Any:
    """JSON as an object; other text, which a model may have written, stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _marked_leaves(value: Any, marks: Marks | NoMarks) -> Any:
    if isinstance(value, str):
        return marks.leaf(value)
    if isinstance(value, list):
        return [_marked_leaves(item, marks) for item in value]
    if isinstance(value, dict):
        return {marks.leaf(key): _marked_leaves(item, marks) for key, item in value.items()}
    return value


def texts_of(prompt: Prompt) -> list[str]:
    """Every text of a chat that is input: contents, calls, tools. Not the prefill, whose place is known."""
    calls = [text for message in prompt.messages for call in message.tool_calls for text in (call.name, call.arguments)]
    return [message.content for message in prompt.messages] + calls + list(prompt.tools)


def matched(text: str, marked: str, contents: Mapping[str, str]) -> list[ChatSegment] | None:
    """`text` in segments, if it is `marked` with the contents for their marks, plain or as in JSON; else None."""
    if not contents:
        return [ChatSegment(text=text, is_content=False)] if text == marked else None
    pieces = re.split(f"({'|'.join(map(re.escape, contents))})", marked)
    if not text.startswith(pieces[0]):
        return None
    segments, at = [ChatSegment(text=pieces[0], is_content=False)], len(pieces[0])
    for mark, literal in zip(pieces[1::2], pieces[2::2]):
        forms = (contents[mark], json.dumps(contents[mark], ensure_ascii=False)[1:-1])
        form = next((form for form in forms if text.startswith(form + literal, at)), None)
        if form is None:
            return None
        segments += [ChatSegment(text=form, is_content=True), ChatSegment(text=literal, is_content=False)]
        at += len(form) + len(literal)
    return segments if at == len(text) else None


class SpanTokenizer(Protocol):
    """What `encode_spans` needs: in `encode`, text that looks like a special token stays text."""

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...


def encode_spans(segments: Iterable[ChatSegment], special: re.Pattern[str], tokenizer: SpanTokenizer) -> list[int]:
    """Special tokens outside contents become their ids; each span between two of them is encoded as one text."""
    ids: list[int] = []
    span = ""
    for segment in segments:
        for piece in [segment.text] if segment.is_content else special.split(segment.text):
            if segment.is_content or piece not in tokenizer.special_tokens:
                span += piece
                continue
            ids += [*tokenizer.encode(span), tokenizer.special_tokens[piece]]
            span = ""
    return ids + tokenizer.encode(span)
