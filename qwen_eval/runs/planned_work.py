"""How many tokens an evaluation reads and writes, counted from its requests before anything is asked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_eval.core import Choose, Generate, Request, Score
from qwen_eval.engines.native.prefix_tree import MIN_PART_OF_RUNNING, build

BYTES_PER_TOKEN = 3  # where no tokenizer is at hand; between English (4 or more) and Chinese (2 to 3)


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text that the model reads. `shared`: how many of its first tokens another text may share."""

    ids: tuple[int, ...]
    shared: int
    num_scored: int  # positions of which the model's output is needed
    max_new_tokens: int = 0
    n: int = 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens of all first requests. `attended` is the sum, over the tokens read, of the tokens each one looks at."""

    num_requests: int
    prompt_tokens: int
    read_tokens: int  # after sharing
    attended: float
    scored_rows: int
    most_new_tokens: int  # all replies as long as they may be
    num_replies: int
    longest: int  # prompt and reply
    is_estimate: bool

    @property
    def shared_part(self) -> float:
        return 1 - self.read_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


Encode = Callable[[str], Sequence[int]]
RenderIds = Callable[[Request], tuple[int, ...]]


def work_of(
    requests: Sequence[Request], ids_of: RenderIds, encode: Encode, *, shares: bool, alpha_length: int | None,
    is_estimate: bool,
) -> Work:  # fmt: skip
    """`alpha_length`: the training length where dynamic NTK is on, since only texts of one alpha share a prefix.

    For an estimate `ids_of` and `encode` give bytes, of which `BYTES_PER_TOKEN` are counted as a token.
    """
    read = [item for request in requests for item in sequences(request, ids_of(request), encode)]
    scale = BYTES_PER_TOKEN if is_estimate else 1
    num_read, attended = _read(read, alpha_length) if shares else _read_apart(read)
    return Work(
        num_requests=len(requests),
        prompt_tokens=_tokens(sum(len(item.ids) for item in read), scale),
        read_tokens=_tokens(num_read, scale),
        attended=attended / scale**2,
        scored_rows=_tokens(sum(item.num_scored for item in read), scale) if is_estimate else
        sum(item.num_scored for item in read),
        most_new_tokens=sum(item.n * item.max_new_tokens for item in read),
        num_replies=sum(item.n for item in read if item.max_new_tokens),
        longest=max((_tokens(len(item.ids), scale) + item.max_new_tokens for item in read), default=0),
        is_estimate=is_estimate,
    )  # fmt: skip


def sequences(request: Request, ids: tuple[int, ...], encode: Encode) -> list[Text]:
    """What the engine reads for one request: one text, or one a choice where a choice has several tokens."""
    if isinstance(request, Generate):
        return [Text(ids=ids, shared=len(ids) - 1, num_scored=1, max_new_tokens=request.max_new_tokens, n=request.n)]
    if isinstance(request, Score):
        return [Text(ids=ids[:-1], shared=0, num_scored=max(0, len(ids) - max(1, request.num_context)))]
    assert isinstance(request, Choose)
    ids = request.kept(ids)
    tails = [tuple(encode(choice)) for choice in request.choices]
    if all(len(tail) == 1 for tail in tails):
        return [Text(ids=ids, shared=len(ids) - 1, num_scored=1)]
    return [Text(ids=(*ids, *tail[:-1]), shared=len(ids) - 1, num_scored=len(tail)) for tail in tails]


def _tokens(num: int, scale: int) -> int:
    return math.ceil(num / scale)


def _read_apart(read: Sequence[Text]) -> tuple[int, float]:
    return sum(len(item.ids) for item in read), sum(_attended(0, len(item.ids)) for item in read)


def _read(read: Sequence[Text], alpha_length: int | None) -> tuple[int, float]:
    """(tokens, attended) with every shared beginning read once, as the engine's prefix tree has it."""
    groups: dict[tuple[int, bool], list[Text]] = defaultdict(list)
    for item in read:
        length = len(item.ids)
        is_short = not alpha_length or length <= alpha_length
        alpha = 0 if is_short else math.ceil(math.log2(length / (alpha_length or 1)))
        groups[alpha, item.max_new_tokens > 0].append(item)
    found = [_tree(group, MIN_PART_OF_RUNNING if runs else 0.0) for (_, runs), group in groups.items()]
    return sum(num for num, _ in found), sum(attended for _, attended in found)


def _tree(group: Sequence[Text], min_part: float) -> tuple[int, float]:
    pending = [build([item.ids for item in group], [item.shared for item in group], min_part=min_part)]
    num, attended = 0, 0.0
    while pending:
        node = pending.pop()
        num += len(node.ids)
        attended += _attended(node.depth, len(node.ids))
        for leaf in node.leaves:
            rest = len(group[leaf].ids) - node.end
            num += rest
            attended += _attended(node.end, rest)
        pending += node.children
    return num, attended


def _attended(past: int, num: int) -> float:
    return num * (past + (num + 1) / 2)
