"""Which requests a worker gets next: batches of common beginnings, smaller towards the end of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from qwen_eval.core import Generate, Prompt, Request

BATCHES_AHEAD = 2  # a batch is this part of a worker's even share of what is left: late ones even out the ends
MIN_REQUESTS = 64  # of a batch: a decode step of fewer rows takes hardly less time
CHARACTERS_PER_TOKEN = 4  # a rough size is enough: workers that are done ask for more


class BatchQueue:
    """The requests of one run that no worker holds, in an order in which common beginnings stand together.

    A prefix is computed once in a batch. So a batch ends between two groups (subjects, with their examples) where one
    ends near the wanted size.
    """

    def __init__(self, requests: Sequence[Request], num_workers: int) -> None:
        texts = [beginning(request.prompt) for request in requests]
        self._order = sorted(range(len(requests)), key=lambda i: (type(requests[i]).__name__, texts[i]))
        ordered = [texts[i] for i in self._order]
        self._shared = [0, *(num_shared(a, b) for a, b in itertools.pairwise(ordered))]
        self._sizes = [
            len(text) - shared + CHARACTERS_PER_TOKEN * _new_tokens(requests[i])
            for i, text, shared in zip(self._order, ordered, self._shared)
        ]
        self._place = {index: place for place, index in enumerate(self._order)}
        self._left = list(range(len(requests)))  # places in the order
        self._most: dict[int, int] = {}  # place of a suspect -> requests of its batch at most
        self._num_workers = num_workers
        self._least = min(MIN_REQUESTS, -(-len(requests) // num_workers))

    def __len__(self) -> int:
        return len(self._left)

    @property
    def is_suspect_next(self) -> bool:
        """Whether a worker died over the next batch."""
        return bool(self._left) and self._left[0] in self._most

    def take(self) -> list[int]:
        """Indexes of the next batch; [] when nothing is left. Suspects and others are in different batches."""
        num = self._num_alike(self._left[0]) if self.is_suspect_next else self._cut(self._wanted())
        num = next((n for n in range(num) if (self._left[n] in self._most) != self.is_suspect_next), num)
        batch, self._left = self._left[:num], self._left[num:]
        return [self._order[place] for place in batch]

    def give_back(self, indexes: Iterable[int], *, most: int | None = None) -> None:
        """Requests that a worker did not answer: they are the next ones, where they stood before.

        `most`: it died over them. They are suspects, asked in batches of so many at most.
        """
        places = [self._place[index] for index in indexes]
        if most is not None:
            self._most |= dict.fromkeys(places, most)
        self._left = sorted([*self._left, *places])

    def _num_alike(self, first: int) -> int:
        """How many suspects may stand in one batch with the first of them."""
        return min(self._most[first], len(self._left))

    def _wanted(self) -> int:
        """How many requests make the wanted size."""
        room = sum(self._sizes[place] for place in self._left) / (BATCHES_AHEAD * self._num_workers)
        num = 0
        while num < len(self._left) and (room > 0 or num < self._least):
            room -= self._sizes[self._left[num]]
            num += 1
        return num

    def _cut(self, num: int) -> int:
        """The latest end of a group in the second half of `num` requests, else `num`."""
        if num >= len(self._left):
            return num
        candidates = range(num, max(num // 2, self._least) - 1, -1)
        best = min(candidates, key=lambda n: self._shared[self._left[n]], default=num)
        return best if 2 * self._shared[self._left[best]] < self._shared[self._left[num]] else num


def beginning(prompt: Prompt) -> str:
    """A text by which prompts that begin alike stand together; that of token ids has a character for each."""
    if prompt.ids is not None:
        return "".join(map(chr, prompt.ids))
    if prompt.text is not None:
        return prompt.text
    return "".join(f"{message.role}\n{message.content}\0" for message in prompt.messages) + prompt.prefill


def num_shared(a: str, b: str) -> int:
    """How many characters two texts share at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _new_tokens(request: Request) -> int:
    return request.max_new_tokens * request.n if isinstance(request, Generate) else 0
