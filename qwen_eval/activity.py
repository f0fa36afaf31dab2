"""What the program is doing: any room says it here, and a command shows it. Where nobody watches it costs nothing.

with stage("reading the weights", total=num_bytes, unit="bytes") as reading:
    reading.advance(tensor.nbytes)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(kw_only=True, eq=False)
class Stage:
    """One thing that takes time. `total` is None where it is not known how much there is to do.

    `num_before` was done by an earlier session and is part of no rate. `tokens` gives those read and written so far,
    where the engine counts them as it goes; else they are counted with what is done.
    """

    text: str
    total: float | None = None
    unit: str = ""
    num_before: float = 0.0
    tokens: Callable[[], tuple[int, int]] | None = None
    is_brief: bool = False  # worth a line only where it lasts
    done: float = field(default=0.0, init=False)
    num_read: int = field(default=0, init=False)
    num_written: int = field(default=0, init=False)
    note: str = field(default="", init=False)
    start_s: float = field(default_factory=time.monotonic, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def advance(self, num: float = 1.0, *, read: int = 0, written: int = 0, note: str = "") -> None:
        """`num` more units are done; `read` and `written` tokens with them."""
        with self._lock:  # graders have a thread of their own
            self.done += num
            self.num_read += read
            self.num_written += written
            self.note = note or self.note


class Watcher(Protocol):
    """Shows stages. It looks at them when it likes; nothing is called for each step."""

    def began(self, stage: Stage) -> None: ...

    def ended(self, stage: Stage) -> None: ...


_watchers: list[Watcher] = []  # the innermost command's is the last


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Stages of any thread of this process are shown by `watcher` within the block."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def stage(
    text: str,
    *,
    total: float | None = None,
    unit: str = "",
    num_before: float = 0.0,
    tokens: Callable[[], tuple[int, int]] | None = None,
    is_brief: bool = False,
) -> Iterator[Stage]:
    """Say that this begins, and at the end of the block that it is over; stages may lie in one another."""
    found = Stage(text=text, total=total, unit=unit, num_before=num_before, tokens=tokens, is_brief=is_brief)
    watcher = _watchers[-1] if _watchers else None
    if watcher is None:
        yield found
        return
    watcher.began(found)
    try:
        yield found
    finally:
        watcher.ended(found)
