"""Progress on stderr: a bar on a terminal, a line from time to time in a log, nothing with quiet=true."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_EVERY_S = 10.0


class Progress:
    """Samples done, samples/s, tokens/s and time left. Rates are of this session: resumed samples cost nothing."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._bar: RichProgress | None = None

    def start(self, name: str, *, total: int, num_done: int = 0) -> None:
        self._name, self._total, self._num_resumed, self._num_done = name, total, num_done, num_done
        self._num_tokens = 0
        self._start_s = self._line_s = time.perf_counter()
        if not self._is_quiet and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._bar.add_task(name, total=total, completed=num_done, rates="")

    def advance(self, num_tokens: int) -> None:
        """One more sample is graded and stored."""
        self._num_done += 1
        self._num_tokens += num_tokens
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._num_done, rates=self.rates(now))
        elif not self._is_quiet and now - self._line_s >= LINE_EVERY_S:
            self._line_s = now
            print(f"{self._name}: {self._num_done}/{self._total}, {self.rates(now)}", file=sys.stderr, flush=True)

    def rates(self, now: float) -> str:
        """`"12.5 samples/s, 8041 tok/s, 1:05 left"`."""
        run_s = max(now - self._start_s, 1e-9)
        samples_per_s = (self._num_done - self._num_resumed) / run_s
        if samples_per_s == 0:
            return ""
        left_s = round((self._total - self._num_done) / samples_per_s)
        left = f"{left_s // 60}:{left_s % 60:02d}"
        return f"{samples_per_s:.3g} samples/s, {self._num_tokens / run_s:.0f} tok/s, {left} left"

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
    return RichProgress(*columns, console=Console(stderr=True), transient=True)
