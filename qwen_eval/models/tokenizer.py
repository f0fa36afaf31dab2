"""Tokenizers: Qwen v1's from `qwen.tiktoken`, those of Qwen1.5 and later from `tokenizer.json`.

Chats follow the checkpoint's own template; Qwen v1 has none and is asked in ChatML. Text that looks like a special
token inside a message stays text. Token ids above the last special token are padding of the embedding matrix: they
decode to nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qwen_eval.core import ConfigError, DataError, Message, ModelError, Prompt
from qwen_eval.models.generation_config import end_ids_of, read_json
from qwen_eval.models.template import ChatTemplate, named_tokens, read_templates, with_system

Errors: TypeAlias = Literal["replace", "ignore", "strict"]

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NUM_EXTRA_TOKENS = 205  # <|extra_0|> .. <|extra_204|> of the published vocabulary
V1_SYSTEM = "You are a helpful assistant."

PRETOKEN = (  # single digits, unlike GPT-4's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# No pre-token reaches from a line break into a letter or digit: the regex above ends every run of white space at its
# last line break, and nothing composes with a line break under NFC. So text may be cut there without changing a token.
_SAFE_CUT = re.compile(r"(?<=\n\n)(?=[^\W_])")

# Somewhere between 600,000 and a million white-space characters in a row tiktoken overflows its stack and panics.
_MAX_BLANKS = 500_000
_TOO_BLANK = re.compile(rf"\s{{{_MAX_BLANKS}}}")


def is_chat(prompt: Prompt, special: Mapping[str, int]) -> bool:
    """Exact ids are a chat when ChatML's mark is among them. `special`: the tokenizer's special tokens."""
    return bool(prompt.messages) or (prompt.ids is not None and special.get(IM_START) in prompt.ids)


def completion_ends(prompt: Prompt, special: Mapping[str, int], named: frozenset[int]) -> frozenset[int]:
    """The ids that end a completion in every engine: those that the checkpoint names, `<|endoftext|>`, and, in a chat
    of a model that has this token, ChatML's marks.
    """
    if ENDOFTEXT not in special:
        return named
    ends = (ENDOFTEXT, IM_START, IM_END) if is_chat(prompt, special) else (ENDOFTEXT,)
    return named | {special[token] for token in ends if token in special}


class ChatTokenizer:
    """The shared part of both tokenizers: prompts to ids, ids to text. Implements `core.Tokenizer`.

    `special_tokens` maps surface form to id; `vocab_size` counts defined ids (a model's embedding may have more rows).
    """

    special_tokens: dict[str, int]
    vocab_size: int
    system: str | None = None  # put before a chat that has no system message of its own
    template: ChatTemplate | None = None  # None: ChatML

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without what is remembered."""
        return {key: value for key, value in self.__dict__.items() if key != "_encode_paragraph"}

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, b"" for ids that mean nothing (vocabulary padding, negative ids)."""
        raise NotImplementedError

    @property
    def pad_id(self) -> int:
        raise NotImplementedError

    @property
    def endoftext_id(self) -> int:
        """The token between two texts."""
        return self._special(ENDOFTEXT)

    @property
    def im_start_id(self) -> int:
        return self._special(IM_START)

    @property
    def im_end_id(self) -> int:
        return self._special(IM_END)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a chat's reply. Raw text ends at `endoftext_id` alone: see `end_ids`."""
        ends = (ENDOFTEXT, IM_START, IM_END)
        return frozenset(self.special_tokens[token] for token in ends if token in self.special_tokens)

    def end_ids(self, prompt: Prompt) -> frozenset[int]:
        """The ids that end a completion of this prompt."""
        return self.eos_ids if is_chat(prompt, self.special_tokens) else frozenset((self.endoftext_id,))

    def decode(self, ids: Sequence[int], *, errors: Errors = "replace", skip_special: bool = False) -> str:
        """Bytes that are not UTF-8 (a character cut in two) follow `errors`; ids without a meaning vanish."""
        skipped = self.special_ids if skip_special else frozenset[int]()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", errors)

    @property
    def beginning_ids(self) -> list[int]:
        """What the tokenizer itself puts before a raw text: its BOS, where it has one."""
        return []

    def render(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt; a chat ends in the assistant's header and the prefill."""
        if prompt.ids is not None:
            return list(prompt.ids)
        if prompt.text is not None:
            return self.beginning_ids + self.encode(prompt.text, parse_special=prompt.parse_special)
        if self.template is not None:
            return self.template.encode(prompt, self)
        ids: list[int] = []
        newline = self.encode("\n")
        for message in self._messages(prompt):
            ids += [self.im_start_id, *self.encode_block(message.role, message.content), self.im_end_id, *newline]
        return [*ids, self.im_start_id, *self.encode_block("assistant", prompt.prefill)]

    def render_text(self, prompt: Prompt) -> str:
        """The prompt as one string, for people to read: a special token and text that looks like it are the same."""
        if prompt.ids is not None:
            return self.decode(prompt.ids)
        if prompt.text is not None:
            return self.decode(self.beginning_ids) + prompt.text
        if self.template is not None:
            return self.template.text(prompt)
        blocks = [f"{IM_START}{message.role}\n{message.content}{IM_END}\n" for message in self._messages(prompt)]
        return "".join(blocks) + f"{IM_START}assistant\n{prompt.prefill}"

    def encode_block(self, role: str, content: str) -> list[int]:
        raise NotImplementedError

    def _messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """The chat as ChatML shows it."""
        if prompt.has_tools:
            raise ModelError("this checkpoint has no chat template, so it cannot be shown tools; ask it in ReAct form")
        return with_system(prompt.messages, self.system)

    def _special(self, token: str) -> int:
        if token not in self.special_tokens:
            raise ModelError(f"the tokenizer has no {token}: this checkpoint cannot be asked in chat form")
        return self.special_tokens[token]


class QwenTokenizer(ChatTokenizer):
    """Qwen v1: tiktoken ranks, then the specials in Qwen's order, whatever the number of ranks.

    `encode(text, parse_special=True)` is what the original's `tokenizer(text)` does: NFC, surface forms of specials
    become specials.
    """

    def __init__(
        self, ranks: dict[bytes, int], *, num_extra_tokens: int = NUM_EXTRA_TOKENS, system: str | None = None
    ) -> None:
        import tiktoken

        self.system = V1_SYSTEM if system is None else system

        specials = [ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(num_extra_tokens))]
        self.num_ranks = len(ranks)
        self.special_tokens = {token: self.num_ranks + i for i, token in enumerate(specials)}
        self.vocab_size = self.num_ranks + len(specials)
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PRETOKEN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self._bytes = [*sorted(ranks, key=ranks.__getitem__), *(token.encode() for token in specials)]
        self._remember()

    def _remember(self) -> None:
        self._encode_paragraph = lru_cache(maxsize=4096)(self._encoding.encode_ordinary)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """NFC first. Paragraphs are remembered: few-shot examples are tokenised once, not once a question."""
        text = _nfc(text)
        if parse_special and "<|" in text:
            return self.encode_allowing(text, self.special_tokens)
        ids: list[int] = []
        for paragraph in _SAFE_CUT.split(text):
            ids += self._encode_paragraph(paragraph)
        return ids

    def encode_allowing(self, text: str, allowed: Iterable[str]) -> list[int]:
        """NFC, and only the surface forms in `allowed` become special tokens; the others stay text."""
        text = _nfc(text)
        ids: list[int] = self._encoding.encode(text, allowed_special=set(allowed), disallowed_special=())
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    @property
    def pad_id(self) -> int:
        """`<|extra_0|>`, as the official evaluation scripts pad; endoftext in a vocabulary without extras."""
        return self.special_tokens.get("<|extra_0|>", self.endoftext_id)

    def encode_block(self, role: str, content: str) -> list[int]:
        return [*self.encode(role), *self.encode("\n"), *self.encode(content)]


class JsonTokenizer(ChatTokenizer):
    """Byte-level BPE of a `tokenizer.json`: Qwen1.5, 2, 2.5, 3 and what was trained from them.

    Without a chat template it is asked in ChatML, where a block is one string ("user\\n" + content): a message that
    begins with a line break gives other ids than under v1. `end_ids` end every completion.
    """

    def __init__(self, content: str, *, tokens: Mapping[str, str] | None = None, end_ids: Iterable[int] = ()) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders

        self._tokenizer = Tokenizer.from_str(content)
        if not isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            raise ModelError("tokenizer.json is not a byte-level one as Qwen's are; use engine=hf for this model")
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special or is_control(token.content)}
        self._tokenizer.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in special.values()]
        )
        self._added = {i: token.content.encode() for i, token in added.items()}
        self.special_tokens = {text: i for i, text in special.items()}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._named = dict(tokens or {})
        self._ends = frozenset(end_ids) | self._ids_of("eos_token")
        can_cut = json.dumps(PRETOKEN)[1:-1] in content
        self._cut = _SAFE_CUT.split if can_cut else _whole
        self._remember()

    def _remember(self) -> None:
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        self._encode_paragraph = lru_cache(maxsize=4096)(self._encode_text)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    @property
    def endoftext_id(self) -> int:
        """`<|endoftext|>`, else the tokenizer's own end of a text (DeepSeek-R1-Distill)."""
        ids = self._ids_of("eos_token")
        return super().endoftext_id if ENDOFTEXT in self.special_tokens or not ids else min(ids)

    @cached_property
    def beginning_ids(self) -> list[int]:
        with_ends, plain = (self._tokenizer.encode("a", add_special_tokens=whether).ids for whether in (True, False))
        return list(with_ends[: with_ends.index(plain[0])])

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        return super().eos_ids | self._ends

    def end_ids(self, prompt: Prompt) -> frozenset[int]:
        ends = completion_ends(prompt, self.special_tokens, self._ends)
        if not ends:
            raise ModelError("the checkpoint names no end token: neither its tokenizer nor generation_config.json does")
        return ends

    def _ids_of(self, name: str) -> frozenset[int]:
        found = self._tokenizer.token_to_id(self._named[name]) if name in self._named else None
        return frozenset() if found is None else frozenset((found,))

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """NFC and the paragraph memory as in `QwenTokenizer`. Tokens such as `<think>` count as text: always parsed."""
        pieces = self._special_pattern.split(text) if parse_special and self.special_tokens else [text]
        ids: list[int] = []
        for piece in pieces:
            if parse_special and piece in self.special_tokens:
                ids.append(self.special_tokens[piece])
                continue
            for paragraph in self._cut(piece):
                ids += self._encode_paragraph(paragraph)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return bytes(_BYTE_OF[character] for character in token) if token is not None else b""

    @property
    def pad_id(self) -> int:
        return min(self._ids_of("pad_token"), default=self.endoftext_id)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def _encode_text(self, text: str) -> list[int]:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates, as tiktoken does
        return self._tokenizer.encode(whole, add_special_tokens=False).ids

    def encode_block(self, role: str, content: str) -> list[int]:
        return self.encode(f"{role}\n{content}")


def _whole(text: str) -> list[str]:
    return [text]


def is_control(token: str) -> bool:
    """Whether an added token is written as only a template writes: `<|fim_prefix|>`, `<｜User｜>`, unlike `<think>`.

    Published tokenizers do not mark all of them as special; in a text they stay text all the same.
    """
    return re.fullmatch(r"<[|｜].*[|｜]>", token, re.DOTALL) is not None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _nfc(text: str) -> str:
    if len(text) >= _MAX_BLANKS and _TOO_BLANK.search(text):
        raise DataError(f"a text of {len(text):,} characters has {_MAX_BLANKS:,} blanks in a row; clean the data")
    return unicodedata.normalize("NFC", text)


def read_ranks(path: Path) -> dict[bytes, int]:
    """A `.tiktoken` file: one "base64 rank" a line, ranks 0..n-1 in order, all 256 bytes among them."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{path}: line {number} is not 'base64 rank'; get the file again") from error
    if list(ranks.values()) != list(range(len(lines))) or any(bytes([i]) not in ranks for i in range(256)):
        raise ModelError(f"{path}: {len(ranks)} ranks with gaps, doubles or missing bytes; get the file again")
    return ranks


def load_tokenizer(path: Path, *, system: str | None = None, thinking: str = "auto") -> ChatTokenizer:
    """The tokenizer of a checkpoint directory: `qwen.tiktoken` (Qwen v1) or `tokenizer.json` (later ones).

    `system` is the system message of chats without one; None keeps the checkpoint's own. `thinking` sets the switch of
    the template. A v1 vocabulary has 205 extra tokens unless `tokenizer_config.json` says
    `"num_extra_tokens": N`.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "tokenizer_config.json")
    if (ranks := folder / "qwen.tiktoken").is_file():
        num_extra = config.get("num_extra_tokens", NUM_EXTRA_TOKENS)
        if type(num_extra) is not int or num_extra < 0:
            raise ModelError(f"{folder}/tokenizer_config.json: num_extra_tokens={num_extra!r} is not a count")
        _refuse_thinking(thinking)
        return QwenTokenizer(read_ranks(ranks), num_extra_tokens=num_extra, system=system)
    if (file := folder / "tokenizer.json").is_file():
        return _load_hf(file, config, system, thinking)
    raise ModelError(f"{folder}: no qwen.tiktoken and no tokenizer.json; copy the checkpoint's tokenizer files there")


def _refuse_thinking(thinking: str) -> None:
    if thinking == "on":
        raise ConfigError("model.thinking=on: this checkpoint has no chat template with such a switch; use auto")


def _load_hf(file: Path, config: dict[str, Any], system: str | None, thinking: str) -> JsonTokenizer:
    tokens = named_tokens(config)
    try:
        content = file.read_text(encoding="utf-8")
        tokenizer = JsonTokenizer(content, tokens=tokens, end_ids=end_ids_of(file.parent))
    except ModelError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot read
        raise ModelError(f"{file}: not a readable tokenizer ({error}); get the file again") from error
    tokenizer.system = system
    if templates := read_templates(file.parent, config):
        tokenizer.template = ChatTemplate(
            templates, variables=tokens, special=tokenizer.special_tokens, system=system, thinking=thinking
        )
    else:
        _refuse_thinking(thinking)
    return tokenizer
