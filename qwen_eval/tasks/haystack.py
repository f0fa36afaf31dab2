"""Prompts of an exact number of tokens with sentences at exact places in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_eval.core import ConfigError, Prompt, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The token ids around a long text: before it, and after it up to where the answer begins."""

    head: tuple[int, ...] = ()
    tail: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Buried:
    """A whole prompt. `starts[i]` is the index of needle i's first token; `room` counts the haystack's own tokens."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    room: int


def base_frame(tokenizer: Tokenizer, question: str) -> Frame:
    return Frame(tail=tuple(tokenizer.encode(question)))


def chat_frame(tokenizer: Tokenizer, question: str) -> Frame:
    """What a chat template puts around a user's text that ends in `question`.

    The text itself is never tokenised with the template: what two renderings of one-letter texts share is the frame,
    so no token reaches from ChatML into the text.
    """
    first, second = (tokenizer.render(Prompt.user(letter + question)) for letter in "X7")
    head = _common(first, second)
    tail = _common(first[head:][::-1], second[head:][::-1])
    assert head + tail < len(first), "two texts cannot render alike"
    return Frame(head=tuple(first[:head]), tail=tuple(first[len(first) - tail :]))


def bury(
    haystack: Sequence[int], needles: Sequence[Sequence[int]], depths: Sequence[float], frame: Frame, length: int
) -> Buried:
    """Exactly `length` tokens: head, haystack with the needles in it, tail. The haystack is repeated where it ends.

    Needle i comes after `round(depths[i] / 100 * room)` tokens of the haystack. ConfigError when nothing of the
    haystack would fit.
    """
    room = length - len(frame.head) - len(frame.tail) - sum(map(len, needles))
    if room < 1:
        raise ConfigError(f"task.lengths={length}: question and needles alone take {length - room} tokens")
    order = sorted(range(len(needles)), key=lambda i: depths[i])
    ids, starts, taken = list(frame.head), [0] * len(needles), 0
    for i in order:
        offset = round(depths[i] / 100 * room)
        ids += _repeated(haystack, taken, offset)
        taken = offset
        starts[i] = len(ids)
        ids += needles[i]
    ids += [*_repeated(haystack, taken, room), *frame.tail]
    assert len(ids) == length, (len(ids), length)
    return Buried(ids=tuple(ids), starts=tuple(starts), room=room)


def _repeated(ids: Sequence[int], start: int, end: int) -> list[int]:
    """Tokens `start` to `end` of the endless repetition of `ids`."""
    num = len(ids)
    if end <= num:
        return list(ids[start:end])
    return [ids[i % num] for i in range(start, end)]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    num = 0
    for a, b in zip(first, second):
        if a != b:
            break
        num += 1
    return num
