"""Qwen v1's chat turn: which history fits, what the model reads, where its reply ends.

Facts of the original `make_context`, `decode_tokens` and stop-word processor. `protocol="upstream"` keeps their bugs:
the reply is cut out of the decoded text by a count of characters, and a reply that met the length limit loses its last
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from qwen_eval.core import Message, Prompt, Protocol_
from qwen_eval.models.tokenizer import ENDOFTEXT, V1_SYSTEM, ChatTokenizer, Errors, QwenTokenizer

ChatFormat: TypeAlias = Literal["chatml", "raw"]
Exchange: TypeAlias = Sequence[str]  # (question, reply)

MAX_WINDOW_SIZE = 6144  # tokens, generation_config.json of the chat checkpoints
FORCED_SCORE = 2.0**15  # what the original writes over the score of endoftext once a stop word has been read


def make_context(
    tokenizer: ChatTokenizer,
    query: str,
    *,
    history: Sequence[Exchange] = (),
    system: str = V1_SYSTEM,
    max_window_size: int = MAX_WINDOW_SIZE,
    chat_format: ChatFormat = "chatml",
) -> tuple[str, list[int]]:
    """The text and ids of a turn. In raw format the query alone, surface forms of specials parsed."""
    if chat_format == "raw":
        return query, tokenizer.encode(query, parse_special=True)
    kept = fitting_history(tokenizer, history, system=system, max_window_size=max_window_size)
    prompt = Prompt(messages=(*as_messages(kept, system=system), Message(role="user", content=query)))
    return tokenizer.render_text(prompt), tokenizer.render(prompt)


def as_messages(history: Sequence[Exchange], *, system: str) -> list[Message]:
    messages = [Message(role="system", content=system)]
    for question, reply in history:
        messages += [Message(role="user", content=question), Message(role="assistant", content=reply)]
    return messages


def fitting_history(
    tokenizer: ChatTokenizer, history: Sequence[Exchange], *, system: str, max_window_size: int
) -> Sequence[Exchange]:
    """The newest exchanges that, with the system message, stay strictly under the window.

    As in the original, neither the system message nor the question is ever cut, and the question is not counted.
    """
    size = _num_tokens(tokenizer, "system", system)
    first = len(history)
    while first > 0:
        question, reply = history[first - 1]
        # 1 each: the line breaks before the two blocks
        size += _num_tokens(tokenizer, "user", question) + _num_tokens(tokenizer, "assistant", reply) + 2
        if size >= max_window_size:
            break
        first -= 1
    return history[first:]


def decode_reply(
    tokenizer: ChatTokenizer,
    tokens: Sequence[int],
    *,
    context_length: int,
    raw_text_len: int = 0,
    chat_format: ChatFormat = "chatml",
    errors: Errors = "replace",
    protocol: Protocol_ = "robust",
) -> tuple[str, str]:
    """The reply within `tokens` (context and generated ids) and why it ended, in the original's words.

    `context_length` counts the context's tokens, `raw_text_len` its characters (needed under `upstream` only).
    """
    if protocol == "robust":
        return _decode_robust(tokenizer, tokens[context_length:], len(tokens), chat_format, errors)
    assert isinstance(tokenizer, QwenTokenizer), "the original decoded Qwen v1 only"
    if chat_format == "raw":
        return _decode_raw_upstream(tokenizer, tokens, raw_text_len, errors)
    return _decode_chatml_upstream(tokenizer, tokens, context_length, raw_text_len, errors)


def stop_words(tokenizer: ChatTokenizer, chat_format: ChatFormat) -> list[list[int]]:
    """The stop sequences of a format, as ids."""
    if chat_format == "raw":
        return [tokenizer.encode("Human:"), [tokenizer.endoftext_id]]
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


def is_forced_to_end(input_ids: Sequence[int], stops: Sequence[Sequence[int]], *, eos_id: int) -> bool:
    """Whether the original forces endoftext next: prompt and reply together end with a stop word other than endoftext.

    So a reply that ends with `<|im_end|>` has one more token after it.
    """
    ids = list(input_ids)
    return any(
        ids[len(ids) - len(stop) :] == list(stop) for stop in stops if list(stop) != [eos_id] and len(stop) <= len(ids)
    )


def _num_tokens(tokenizer: ChatTokenizer, role: str, content: str) -> int:
    return len(tokenizer.encode_block(role, content)) + 2  # and <|im_start|>, <|im_end|>


def _decode_robust(
    tokenizer: ChatTokenizer, reply: Sequence[int], num_tokens: int, chat_format: ChatFormat, errors: Errors
) -> tuple[str, str]:
    ends = tokenizer.eos_ids if chat_format == "chatml" else frozenset((tokenizer.endoftext_id,))
    end = next((i for i, token in enumerate(reply) if token in ends), len(reply))
    reason = f"Gen {tokenizer.decode(reply[end : end + 1])!r}" if end < len(reply) else f"Gen length {num_tokens}"
    return tokenizer.decode(reply[:end], errors=errors).strip(), reason


def _decode_raw_upstream(
    tokenizer: QwenTokenizer, tokens: Sequence[int], raw_text_len: int, errors: Errors
) -> tuple[str, str]:
    text = tokenizer.decode_upstream(tokens, errors=errors)[raw_text_len:]
    return text.replace(ENDOFTEXT, "").strip(), f"Gen length {len(tokens)}"


def _decode_chatml_upstream(
    tokenizer: QwenTokenizer, tokens: Sequence[int], context_length: int, raw_text_len: int, errors: Errors
) -> tuple[str, str]:
    ends = (tokenizer.im_start_id, tokenizer.im_end_id)
    end = next((i for i in range(context_length, len(tokens)) if tokens[i] in ends), None)
    if end is None:
        reason = f"Gen length {len(tokens)}"
        end = max(context_length, len(tokens) - 1)  # the bug: without a stop token the last token is dropped
    else:
        reason = f"Gen {tokenizer.decode_upstream([tokens[end]])!r}"
    return tokenizer.decode_upstream(tokens[:end], errors=errors)[raw_text_len:].strip(), reason
