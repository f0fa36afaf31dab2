"""A checkpoint's own chat template: which one it is, how a chat is rendered with it, whether its model thinks.

Raises ModelError in one line for a template that fails, takes too long or too much memory, or refuses the chat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from qwen_eval.core import JSON, ConfigError, Message, ModelError, Prompt
from qwen_eval.models.segments import (
    Chat,
    ChatSegment,
    Fields,
    Marks,
    SpanTokenizer,
    encode_spans,
    matched,
    pattern_of,
    texts_of,
)
from qwen_eval.models.template_process import TemplateProcess

MAX_TEMPLATE = 1 << 20  # characters; published ones have at most a few thousand
THINKING_SWITCH = "enable_thinking"  # the variable that Qwen3's template and those like it read


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """`system` before a chat that begins with no system message of its own; None leaves it to the checkpoint."""
    if system is None or messages[0].role == "system":
        return messages
    return (Message(role="system", content=system), *messages)


class ChatTemplate:
    """Renders chats with one of `templates` (by name, "default" and perhaps "tool_use").

    `variables` are the surface forms of the tokenizer's named tokens (`bos_token` ...), which templates write.
    `special` are the surface forms that become special tokens. ConfigError where the template has no switch for the
    thinking that is asked for.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        variables: Mapping[str, str],
        special: Iterable[str],
        system: str | None = None,
        thinking: str = "auto",
    ) -> None:
        self.templates, self.system, self.thinking = dict(templates), system, thinking
        self._variables = dict(variables)
        self._special = pattern_of(special)
        self._children: dict[str, TemplateProcess] = {}
        self.segments = lru_cache(maxsize=256)(self._segments)
        self._check_thinking()

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without what is remembered, and without processes."""
        return {**self.__dict__, "segments": None, "_children": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.segments = lru_cache(maxsize=256)(self._segments)

    @property
    def digest(self) -> str:
        """Of everything here that decides how a chat is rendered."""
        decides = json.dumps([self.templates, self._variables], sort_keys=True)
        return hashlib.sha256(decides.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def facts(self) -> dict[str, JSON]:
        """For the result: which template this is and whether a reply begins with reasoning (None: it fails)."""
        try:
            return {"chat_template": self.digest, "thinks": self.thinks}
        except ModelError:  # a run in base form needs no template; one in chat form will say what is wrong
            return {"chat_template": self.digest, "thinks": None}

    def text(self, prompt: Prompt) -> str:
        """The rendered chat with its prefill."""
        return "".join(segment.text for segment in self.segments(prompt)[0])

    def encode(self, prompt: Prompt, tokenizer: SpanTokenizer) -> list[int]:
        """Token ids of a chat: contents stay text, and the part between two special tokens is one text.

        ModelError for a chat that quotes a special token if the template changes its contents: the content cannot be
        located then.
        """
        segments, is_known = self.segments(prompt)
        if not is_known and any(self._special.search(text) for text in texts_of(prompt)):
            raise ModelError(
                "a message of this chat quotes a special token and the chat template rewrites its messages: which "
                "tokens are the template's cannot be told; take the token's text out of the message"
            )
        return encode_spans(segments, self._special, tokenizer)

    @cached_property
    def thinks(self) -> bool:
        """Whether a reply begins with reasoning, as the generation prompt tells, else the template's switch."""
        text = self._rendered({}).rstrip()
        if text.endswith(("<think>", "</think>")):
            return text.endswith("<think>")
        if self._has_switch:
            return self.thinking == "on" or (self.thinking == "auto" and text != self._switched(False).rstrip())
        return "</think>" in self.templates.get("default", "")

    # --- rendering ---

    def _segments(self, prompt: Prompt) -> tuple[list[ChatSegment], bool]:
        """The rendered chat in pieces, and whether it is known which of them are contents."""
        messages = with_system(prompt.messages, self.system)
        marks = [Marks(self._special, every=True), Marks(self._special, every=False)]
        whole = Chat.of(messages, prompt.tools)
        marked = [Chat.of(messages, prompt.tools, mark) for mark in marks]
        marked = [chat for chat in marked if chat.marked]
        text, *texts = self._render(prompt, [whole, *marked])
        if isinstance(text, ModelError):
            raise text
        prefill = [ChatSegment(text=prompt.prefill, is_content=True)] if prompt.prefill else []
        for chat, rendered in zip(marked, texts):
            found = None if isinstance(rendered, ModelError) else matched(text, rendered, chat.marked)
            if found is not None:
                return [*found, *prefill], True
        return [ChatSegment(text=text, is_content=False), *prefill], False

    def _render(self, prompt: Prompt, chats: Sequence[Chat]) -> list[str | ModelError]:
        """Arguments of tool calls as objects, and once more as JSON text for templates that add them to a string."""
        child = self._child("tool_use" if prompt.tools and "tool_use" in self.templates else "default")
        texts = child.render([self._row(chat) for chat in chats])
        if isinstance(texts[0], ModelError) and any(message.tool_calls for message in prompt.messages):
            again = child.render([self._row(chat.with_argument_text()) for chat in chats])
            return texts if isinstance(again[0], ModelError) else again
        return texts

    def _row(self, chat: Chat) -> Fields:
        switch = {} if self.thinking == "auto" else {THINKING_SWITCH: self.thinking == "on"}
        row = {"messages": chat.rows, "tools": chat.tools, "documents": None, "add_generation_prompt": True}
        return {**self._variables, **row, **switch}

    def _child(self, name: str) -> TemplateProcess:
        if name not in self.templates:
            listed = ", ".join(sorted(self.templates))
            raise ModelError(f"the checkpoint's chat templates are named {listed}; one must be named {name}")
        if name not in self._children:
            self._children[name] = TemplateProcess(self.templates[name])
        return self._children[name]

    # --- thinking ---

    @cached_property
    def _has_switch(self) -> bool:
        return THINKING_SWITCH in self._child("default").variables

    def _switched(self, is_on: bool) -> str:
        return self._rendered({THINKING_SWITCH: is_on})

    def _rendered(self, switch: Fields) -> str:
        row = {**self._row(Chat.of([Message(role="user", content="x")])), **switch}
        text = self._child("default").render([row])[0]
        if isinstance(text, ModelError):
            raise text
        return text

    def _check_thinking(self) -> None:
        if self.thinking == "auto" or self._has_switch:
            return
        if self.thinks != (self.thinking == "on"):
            does = "always thinks" if self.thinks else "never thinks"
            raise ConfigError(
                f"model.thinking={self.thinking}: this checkpoint {does}, its chat template has no {THINKING_SWITCH}; "
                "use model.thinking=auto"
            )


# --- the checkpoint's files ------------------------------------------------------------------------------------------


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: `chat_template.jinja` and `additional_chat_templates/`, else those of tokenizer_config.json.

    {} where the checkpoint has none.
    """
    file = folder / "chat_template.jinja"  # where newer releases of transformers save it
    if file.is_file():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {path.stem if path != file else "default": _read_text(path) for path in (*more, file)}
    return templates_of(config.get("chat_template"), f"{folder}/tokenizer_config.json")


def templates_of(found: Any, where: str) -> dict[str, str]:
    """One text, transformers' list of `{"name": ..., "template": ...}`, or a mapping of names to texts."""
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        found = {str(item.get("name")): item.get("template") for item in found}
    templates = {"default": found} if isinstance(found, str) else found or {}
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise ModelError(f"{where}: chat_template is neither a text nor a list of named ones; get the file again")
    for name, text in templates.items():
        if len(text) > MAX_TEMPLATE:
            raise ModelError(f"{where}: the chat template {name} has {len(text):,} characters; get the file again")
    return {name: text for name, text in templates.items() if text}


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * MAX_TEMPLATE:
            raise ModelError(f"{path}: {path.stat().st_size:,} bytes are no chat template; get the file again")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as text ({error})") from error


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}` of a tokenizer_config.json, whose tokens are texts or objects with a content."""
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: value for key, value in contents.items() if isinstance(value, str)}
