"""Which tokens of a text are scored, with which context: the published ways to cut a text for perplexity.

`ids[start : end]` is one window; its first `num_context` tokens are read and not scored. With `is_prefixed` the
end-of-text token stands before it, and the window's first token is scored after that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Window:
    start: int
    end: int
    num_context: int
    is_prefixed: bool = False

    @property
    def num_scored(self) -> int:
        return self.end - self.start - self.num_context


@dataclass(frozen=True, kw_only=True)
class Preset:
    """`windows(num_tokens, length, stride)`. `is_whole`: every token of the text is in some window, however short;
    otherwise windows have exactly `length` tokens and the rest of the text is left out.
    """

    windows: Callable[[int, int, int], list[Window]]
    is_whole: bool
    feeds_last: bool = True  # whether the last token, only a target, is fed to the model too: decides dynamic NTK
    needs_prefix: bool = False
    lengths: tuple[int, ...] = ()  # the protocol's own; (): from the model's training length
    rules: tuple[str, str, str]  # window, first token, beginning of text; for the record


def chunks(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Chunks one behind another, all their next-token losses (how Qwen's arXiv table was made)."""
    return [Window(start=i, end=i + length, num_context=1) for i in range(0, num_tokens - length + 1, length)]


def strided(num_tokens: int, length: int, stride: int) -> list[Window]:
    """A window every `stride` tokens; only what no window before it scored counts (transformers' perplexity page)."""
    windows: list[Window] = []
    done = 1  # the first token has nothing before it
    for start in range(0, num_tokens, stride):
        end = min(start + length, num_tokens)
        if end > done:
            windows.append(Window(start=start, end=end, num_context=max(1, done - start)))
        done = end
        if end == num_tokens:
            break
    return windows


def second_halves(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Chunks one behind another, of which the second half is scored (llama.cpp's perplexity tool)."""
    return [
        Window(start=i, end=i + length, num_context=length // 2 + 1)
        for i in range(0, num_tokens - length + 1, length)
    ]  # fmt: skip


def rolling(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Every token once: `length` inputs a window, the first after the end-of-text token; the last window reaches back
    to be full (lm-evaluation-harness, `loglikelihood_rolling`).
    """
    first = min(length, num_tokens)
    windows = [Window(start=0, end=first, num_context=0, is_prefixed=True)]
    for done in range(first, num_tokens, length):
        end = min(done + length, num_tokens)
        windows.append(Window(start=end - length - 1, end=end, num_context=done - (end - length - 1)))
    return windows


NO_BOS = "none: Qwen has no beginning-of-text token"
PRESETS = {
    "qwen-arxiv": Preset(
        windows=chunks,
        is_whole=False,
        rules=("chunks of exactly the length, side by side", "each chunk's first token is not scored", NO_BOS),
    ),
    "hf-stride": Preset(
        windows=strided,
        is_whole=True,
        rules=("a window every stride tokens, its new tokens scored", "the text's first token is not scored", NO_BOS),
    ),
    "llama.cpp-512": Preset(
        windows=second_halves,
        is_whole=False,
        lengths=(512,),
        rules=("chunks of exactly the length, side by side", "only positions length/2+1 on are scored", NO_BOS),
    ),
    "lm-eval-rolling": Preset(
        windows=rolling,
        is_whole=True,
        feeds_last=False,
        needs_prefix=True,
        rules=("disjoint targets after one token; the last window is full", "scored", "end-of-text before the text"),
    ),
}


def usable_tokens(
    num_tokens: Sequence[int], length: int, *, is_whole: bool, max_chunks: int | None = None
) -> list[int]:
    """How many tokens of each text are used: whole chunks of `length` (or all), in `max_chunks` dealt out in turn.

    One chunk of every text comes before the second of any, so that a bounded run sees as many texts as it can.
    """
    rounds = [-(-num // length) if is_whole else num // length for num in num_tokens]
    left = sum(rounds) if max_chunks is None else max_chunks
    dealt = [0] * len(rounds)
    while left > 0 and dealt != rounds:
        for i, most in enumerate(rounds):
            if left > 0 and dealt[i] < most:
                dealt[i] += 1
                left -= 1
    return [min(num, count * length) for num, count in zip(num_tokens, dealt)]
