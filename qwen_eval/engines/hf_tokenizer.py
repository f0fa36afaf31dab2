"""A tokenizer of transformers as tasks and engines know one: text that looks like a special token stays text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qwen_eval.core import EngineError, Message, Prompt


class HfTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer
        added = [str(token) for token in tokenizer.get_added_vocab()] or ["\0"]
        self._special = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)))

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids without BOS or EOS."""
        ids = self.inner(text, add_special_tokens=False, split_special_tokens=not parse_special)["input_ids"]
        return [int(i) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        text = self.inner.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def render(self, prompt: Prompt) -> list[int]:
        """Raw text begins as the tokenizer begins a text (with BOS where it has one); chats follow its template."""
        if prompt.ids is not None:
            return list(prompt.ids)
        if prompt.text is not None:
            return self._beginning() + self.encode(prompt.text, parse_special=prompt.parse_special)
        if any(self._special.search(message.content) for message in prompt.messages):
            return self._render_piecewise(prompt)
        return self.encode(self._template(prompt.messages), parse_special=True) + self.encode(prompt.prefill)

    def _beginning(self) -> list[int]:
        first = self.inner("a")["input_ids"][:1]
        return [int(first[0])] if first and first[0] == self.inner.bos_token_id else []

    def _render_piecewise(self, prompt: Prompt) -> list[int]:
        """The template around marks that stand for the contents, which are then encoded as plain text."""
        marks = [f"content{number:04d}mark" for number in range(len(prompt.messages))]
        messages = tuple(Message(role=m.role, content=mark) for m, mark in zip(prompt.messages, marks))
        contents = {mark: message.content for mark, message in zip(marks, prompt.messages)}
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(marks)})", self._template(messages)):
            ids += self.encode(contents[piece]) if piece in contents else self.encode(piece, parse_special=True)
        return ids + self.encode(prompt.prefill)

    def _template(self, messages: Sequence[Message]) -> str:
        if not self.inner.chat_template:
            raise EngineError("this checkpoint has no chat template; ask it in base form with task.mode=base")
        rows = [{"role": message.role, "content": message.content} for message in messages]
        return str(self.inner.apply_chat_template(rows, tokenize=False, add_generation_prompt=True))
