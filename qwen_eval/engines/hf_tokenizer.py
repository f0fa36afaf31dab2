"""A tokenizer of transformers as tasks and engines know one: text that looks like a special token stays text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from qwen_eval.core import JSON, ConfigError, EngineError, Prompt
from qwen_eval.models.segments import pattern_of, texts_of
from qwen_eval.models.template import ChatTemplate, named_tokens, templates_of
from qwen_eval.models.tokenizer import IM_END, completion_ends, is_chat, is_control

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HfTokenizer:
    """Chats are rendered as in the native engine, so that both ask the same; see `ChatTemplate`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, thinking: str = "auto"
    ) -> None:
        self.inner = tokenizer
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        special = {str(t): i for i, t in added.items() if getattr(t, "special", False) or is_control(str(t))}
        if unmarked := [text for text, i in special.items() if not getattr(added[i], "special", False)]:
            tokenizer.add_tokens(unmarked, special_tokens=True)  # published as plain: they stay text in a text too
        self.special_tokens: Mapping[str, int] = special
        self._special = pattern_of(special)
        self.template = self._chat_template(system, thinking)

    def _chat_template(self, system: str | None, thinking: str) -> ChatTemplate | None:
        templates = templates_of(self.inner.chat_template, "the tokenizer")
        if not templates and thinking == "on":
            raise ConfigError("model.thinking=on: this checkpoint has no chat template with such a switch; use auto")
        if not templates:
            return None
        variables = named_tokens(dict(self.inner.special_tokens_map))
        return ChatTemplate(
            templates, variables=variables, special=self.special_tokens, system=system, thinking=thinking
        )

    @property
    def facts(self) -> dict[str, JSON]:
        """What decides how chats are rendered, for the result."""
        return {} if self.template is None else self.template.facts

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
            return self.beginning_ids + self.encode(prompt.text, parse_special=prompt.parse_special)
        if self.template is None:
            raise EngineError("this checkpoint has no chat template; ask it in base form with task.mode=base")
        if any(self._special.search(text) for text in texts_of(prompt)):
            return self.template.encode(prompt, self)
        rendered = self.template.text(prompt)  # whole: a tokenizer may begin each text with a blank of its own
        chat = rendered.removesuffix(prompt.prefill) if prompt.prefill else rendered
        return self.encode(chat, parse_special=True) + self.encode(prompt.prefill)

    def render_text(self, prompt: Prompt) -> str:
        return self.decode(self.render(prompt))

    def end_ids(self, prompt: Prompt, named: frozenset[int]) -> frozenset[int]:
        """What ends a completion, as in the native engine. `named`: by the checkpoint's generation_config.json."""
        own = self.inner.eos_token_id
        ends = completion_ends(prompt, self.special_tokens, named if own is None else named | {int(own)})
        mark = self.special_tokens.get(IM_END)  # of a model without <|endoftext|> that was tuned on ChatML
        return ends | {mark} if mark is not None and is_chat(prompt, self.special_tokens) else ends

    @cached_property
    def beginning_ids(self) -> list[int]:
        with_ends, plain = ([int(i) for i in self._ids_of_a(ends)] for ends in (True, False))
        return with_ends[: with_ends.index(plain[0])] if plain[:1] and plain[0] in with_ends else []

    def _ids_of_a(self, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.inner("a", add_special_tokens=add_special_tokens)["input_ids"]
        return ids
