"""Reading replies of an OpenAI-compatible API. Nothing in one is believed: Fault for any part of another type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_eval.core import JSON, Choose, Completion, Completions, FinishReason, Generate, TokenLogprobs
from qwen_eval.engines.api.faults import Fault, safe_text

ENDS: Mapping[JSON, FinishReason] = {
    "stop": "eos",
    "eos": "eos",
    "eos_token": "eos",  # text-generation-inference's two
    "stop_sequence": "eos",
    "end_turn": "eos",
    "max_tokens": "length",
    "sensitive": "filtered",
    "tool_calls": "eos",
    "function_call": "eos",
    "length": "length",
    "content_filter": "filtered",
}
ROUNDING = 1e-3  # a log-probability may come out above zero, and a sum of probabilities above one, by so much
IMPOSSIBLE = -9999.0  # what servers write for a probability of 0: vLLM this, llama.cpp the lowest number of a float


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that were paid for."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Reply:
    choices: tuple[Mapping[str, JSON], ...]
    usage: Usage


def read_reply(found: JSON, num_choices: int = 1) -> Reply:
    """The choices in the order of their index, and the usage."""
    body = _mapping(found, "the reply")
    if body.get("error"):  # some servers say so with status 200
        raise Fault(f"an error for a reply: {safe_text(str(body['error']))}")
    rows = [_mapping(row, "a choice") for row in _list(body.get("choices"), "choices")]
    if len(rows) < num_choices:
        raise Fault(f"{len(rows)} of {num_choices} completions")
    rows.sort(key=_index)
    return Reply(choices=tuple(rows[:num_choices]), usage=_usage(body.get("usage")))


def _index(row: Mapping[str, JSON]) -> int:
    at = row.get("index")
    return at if type(at) is int else 0


def _usage(found: JSON) -> Usage:
    if not isinstance(found, dict):
        return Usage()
    details = found.get("prompt_tokens_details")
    return Usage(
        prompt_tokens=_count(found.get("prompt_tokens")),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        completion_tokens=_count(found.get("completion_tokens")),
    )


def completions_of(reply: Reply, request: Generate, *, repeated: str = "") -> Completions:
    """A filtered or refused completion ends as "filtered": it is no answer of the model's own.

    `repeated`: the beginning of the message, where the server puts it before the continuation.
    """
    num_tokens = reply.usage.completion_tokens // len(reply.choices)
    return Completions(completions=tuple(_completion(row, request, num_tokens, repeated) for row in reply.choices))


def text_of(reply: Reply) -> str:
    return _text(reply.choices[0])[0]


def _completion(row: Mapping[str, JSON], request: Generate, num_tokens: int, repeated: str) -> Completion:
    text, is_refused = _text(row)
    if not (is_refused or text.startswith(repeated)):
        raise Fault("a reply that does not begin with the message that it continues")
    text = text.removeprefix(repeated)
    end = row.get("finish_reason")
    if not isinstance(end, str) or end not in ENDS:
        raise Fault(f"a completion that ended with {safe_text(str(end))}")
    reason = "filtered" if is_refused else ENDS[end]
    ends = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
    if ends and reason != "filtered":  # some servers leave the stop string in
        text, reason = text[: min(ends)], "stop"
    return Completion(text=text, finish_reason=reason, num_tokens=num_tokens)


def _text(row: Mapping[str, JSON]) -> tuple[str, bool]:
    """(text, whether the server refused)."""
    if "message" not in row:
        text = row.get("text")
        if not isinstance(text, str):
            raise Fault("a completion without text")
        return text, False
    message = _mapping(row["message"], "a message")
    text = _content(message.get("content"))
    calls = [_call(call) for call in _list(message.get("tool_calls") or [], "tool_calls")]
    if message.get("function_call"):  # the older form of one call
        calls.append(_call({"function": message["function_call"]}))
    return "\n".join([*([text] if text else []), *calls]), bool(message.get("refusal"))


def _content(found: JSON) -> str:
    """A text, or the parts of one without those that hold the reasoning."""
    if found is None or isinstance(found, str):
        return found or ""
    parts = [_mapping(part, "a part") for part in _list(found, "content")]
    texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
    if not all(isinstance(text, str) for text in texts) or (parts and not texts):
        raise Fault("a message whose content is no text")
    return "".join(map(str, texts))


def _call(found: JSON) -> str:
    """A call that the server has read out of the text, put back as Qwen writes it."""
    function = _mapping(_mapping(found, "a call").get("function"), "a function")
    name, arguments = function.get("name"), function.get("arguments") or "{}"
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise Fault("a call whose name or arguments are no text")
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


# --- log-probabilities -----------------------------------------------------------------------------------------------


def top_logprobs(row: Mapping[str, JSON]) -> dict[str, float]:
    """Token -> log-probability of the likeliest first tokens; {} where there are none.

    In the form of completions or in that of chats: llama.cpp's server answers both with the latter.
    """
    found = row.get("logprobs")
    if found is None:
        return {}
    found = _mapping(found, "logprobs")
    if found.get("content"):
        first = _mapping(_list(found["content"], "logprobs.content")[0], "a token")
        tops = _list(first.get("top_logprobs") or [], "top_logprobs")
        pairs = [(_mapping(item, "a token").get("token"), _mapping(item, "a token").get("logprob")) for item in tops]
    else:
        tops = _list(found.get("top_logprobs") or [], "top_logprobs")
        pairs = list(_mapping(tops[0], "top_logprobs").items()) if tops and tops[0] else []
    return _distribution(pairs)


def _distribution(pairs: Sequence[tuple[JSON, JSON]]) -> dict[str, float]:
    named: dict[str, float] = {}
    for token, value in pairs:
        if not isinstance(token, str):
            raise Fault("a token that is no text")
        named[token] = max(_logprob(value), named.get(token, IMPOSSIBLE))  # two tokens may show the same text
    if math.fsum(map(math.exp, named.values())) > 1 + ROUNDING * max(1, len(named)):
        raise Fault("log-probabilities whose probabilities add up to more than one")
    return named


def _logprob(value: JSON) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= ROUNDING:
        raise Fault(f"a log-probability of {safe_text(str(value))[:20]}")
    return float(max(value, IMPOSSIBLE))


def choice_bounds(found: Mapping[str, float], request: Choose) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(log-probability of each choice, indexes of those that are only bounds).

    A choice outside the list is at most as likely as the last token in it, and as what the list leaves of one. One of
    several tokens is at most as likely as its first.
    """
    left = 1.0 - math.fsum(map(math.exp, found.values()))
    outside = min(min(found.values()), math.log(left) if left > 1e-12 else min(found.values()))
    values, bounded = [], []
    for index, choice in enumerate(request.choices):
        if choice in found:
            values.append(found[choice])
            continue
        firsts = [value for token, value in found.items() if token.strip() and choice.startswith(token)]
        values.append(max([outside, *firsts]))
        bounded.append(index)
    return tuple(values), tuple(bounded)


@dataclass(frozen=True, kw_only=True)
class Echo:
    """A given text as the server read it. `logprobs` is None at the first token; `best` are those of the likeliest."""

    tokens: tuple[str, ...]
    logprobs: tuple[float | None, ...]
    best: tuple[float | None, ...]
    offsets: tuple[int, ...]  # characters; () where the server does not say


def read_echo(row: Mapping[str, JSON]) -> Echo:
    """The log-probabilities of the prompt, from a completion with `echo`."""
    found = _mapping(row.get("logprobs"), "logprobs")
    tokens = _list(found.get("tokens"), "tokens")
    values = _list(found.get("token_logprobs"), "token_logprobs")
    tops = _list(found.get("top_logprobs") or [None] * len(values), "top_logprobs")
    offsets = found.get("text_offset") or []
    if not len(tokens) == len(values) == len(tops) or not all(isinstance(token, str) for token in tokens):
        raise Fault("an echo whose tokens and log-probabilities do not match")
    if not isinstance(offsets, list) or not all(type(at) is int for at in offsets):
        raise Fault("an echo without text offsets")
    return Echo(
        tokens=tuple(map(str, tokens)),
        logprobs=tuple(None if value is None else _logprob(value) for value in values),
        best=tuple(max(map(_logprob, top.values())) if isinstance(top, dict) and top else None for top in tops),
        offsets=tuple(offsets) if len(offsets) == len(tokens) else (),
    )


def scored(echo: Echo, ids: Sequence[int], num_context: int) -> TokenLogprobs:
    """Of the tokens `ids` behind the first `num_context`; Fault where the server read another number of tokens."""
    first = max(1, num_context)
    values = echo.logprobs[first : len(ids)]
    if len(echo.logprobs) < len(ids) or None in values:
        raise Fault(f"log-probabilities of {len(echo.logprobs)} tokens for a text of {len(ids)}")
    kept = [value for value in values if value is not None]
    num_greedy = sum(
        best is not None and value >= best for value, best in zip(kept, echo.best[first : len(ids)], strict=True)
    )
    return TokenLogprobs(token_ids=tuple(ids[first:]), logprobs=tuple(kept), num_greedy=num_greedy)


# --- types -----------------------------------------------------------------------------------------------------------


def _mapping(found: JSON, what: str) -> Mapping[str, JSON]:
    if not isinstance(found, dict):
        raise Fault(f"{what} of type {type(found).__name__}")
    return found


def _list(found: JSON, what: str) -> list[JSON]:
    if not isinstance(found, list):
        raise Fault(f"{what} of type {type(found).__name__}")
    return found


def _count(found: JSON) -> int:
    return found if type(found) is int and found >= 0 else 0
