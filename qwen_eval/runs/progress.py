"""Signs of life on stderr: a line that changes on a terminal, whole lines from time to time in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from qwen_eval.activity import Stage, watched_by
from qwen_eval.terminal import plain_text, text_width

if TYPE_CHECKING:
    from rich.live import Live

FIRST_LINE_S = 0.2  # in a log: a stage that is over sooner is not worth a line
LINE_EVERY_S = 10.0
REDRAWN_PER_S = 4
BAR_COLUMNS = 16
MIN_BAR_COLUMNS = 6
BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@contextmanager
def shown(*, is_quiet: bool) -> Iterator[None]:
    """Show the stages of the block, unless quiet."""
    if is_quiet:
        yield
        return
    display = TerminalDisplay(sys.stderr) if sys.stderr.isatty() else LogDisplay(sys.stderr)
    with watched_by(display):
        try:
            yield
        finally:
            display.close()


class TerminalDisplay:
    """The innermost stage, redrawn in place; nothing of it is left behind."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stages: list[Stage] = []
        self._live: Live | None = None

    def began(self, stage: Stage) -> None:
        self._stages.append(stage)
        if self._live is None:
            self._live = self._started()
        self._live.refresh()

    def ended(self, stage: Stage) -> None:
        self._stages.remove(stage)
        if not self._stages:
            self.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _started(self) -> Live:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(file=self._stream, highlight=False)

        def drawn() -> Text:
            line = terminal_line(list(self._stages), console.width, time.monotonic())
            return Text(line, no_wrap=True, overflow="crop")

        # standard output is not redirected: results go there, and it may be a file
        live = Live(
            get_renderable=drawn, console=console, transient=True, refresh_per_second=REDRAWN_PER_S,
            redirect_stdout=False,
        )  # fmt: skip
        live.start()
        return live


class LogDisplay:
    """A line when a stage has lasted a moment, then one every ten seconds; a line is never drawn over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stages: list[Stage] = []
        self._announced: set[int] = set()
        self._line_s = time.monotonic()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def began(self, stage: Stage) -> None:
        with self._changed:
            self._stages.append(stage)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="signs of life", daemon=True)
                self._thread.start()
            self._changed.notify()

    def ended(self, stage: Stage) -> None:
        with self._changed:
            self._stages.remove(stage)
            self._announced.discard(id(stage))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        with self._changed:
            while not self._is_closed:
                stage = self._stages[-1] if self._stages else None
                now = time.monotonic()
                due_s = None if stage is None else self._due_s(stage)
                if stage is not None and due_s is not None and due_s <= now:
                    self._say(stage, now)
                else:
                    self._changed.wait(None if due_s is None else due_s - now)

    def _due_s(self, stage: Stage) -> float:
        is_new = id(stage) not in self._announced and not stage.is_brief
        return stage.start_s + FIRST_LINE_S if is_new else self._line_s + LINE_EVERY_S

    def _say(self, stage: Stage, now: float) -> None:
        self._announced.add(id(stage))
        self._line_s = now
        print(log_line(stage, now), file=self._stream, flush=True)


# --- lines -----------------------------------------------------------------------------------------------------------


def log_line(stage: Stage, now: float) -> str:
    """`"gsm8k · qwen-7b: 12/50 samples, 3.1 samples/s, read 12,345 tokens, wrote 8,123, 0:12 left"`."""
    run_s = now - stage.start_s
    parts = [_amount(stage), *_rates(stage, run_s)] if stage.total is not None else []
    if stage.total is None and run_s >= 1:
        parts.append(f"{run_s:.0f} s")
    parts.append(stage.note)
    said = ", ".join(part for part in parts if part)
    return plain_text(f"{stage.text}: {said}" if said else stage.text)


def terminal_line(stages: Sequence[Stage], width: int, now: float) -> str:
    """One line of at most `width` columns: what happens within, the bar of what it is a part of, rate, time, tokens."""
    if not stages:
        return ""
    stage = next((each for each in reversed(stages) if each.total is not None), stages[-1])
    run_s = now - stage.start_s
    parts = [plain_text(stages[-1].text)]
    if stage.total is not None:
        parts += [_amount(stage, is_short=True), *_rates(stage, run_s, is_short=True), plain_text(stage.note)]
    elif run_s >= 1:
        parts.append(f"{run_s:.0f} s")
    parts = [part for part in parts if part]
    while len(parts) > 1 and text_width("  ".join(parts)) > width:
        parts.pop()
    room = min(BAR_COLUMNS, width - text_width("  ".join(parts)) - 2)
    if stage.total is not None and room >= MIN_BAR_COLUMNS:
        parts.insert(1, _bar(stage, room))
    return "  ".join(parts)


def _bar(stage: Stage, columns: int) -> str:
    share = min(1.0, (stage.num_before + stage.done) / stage.total) if stage.total else 1.0
    full = round(columns * share)
    return "━" * full + "─" * (columns - full)


def _amount(stage: Stage, *, is_short: bool = False) -> str:
    done, total = stage.num_before + stage.done, stage.total or 0.0
    if stage.unit == "bytes":
        size, name = next(((size, name) for size, name in BYTE_UNITS if total >= size), (1.0, "bytes"))
        return f"{done / size:.1f}/{total / size:.1f} {name}"
    return f"{done:.0f}/{total:.0f}" if is_short else f"{done:.0f}/{total:.0f} {stage.unit}".rstrip()


def _rates(stage: Stage, run_s: float, *, is_short: bool = False) -> list[str]:
    """Rate, time left, tokens. Rates are of this session: what was done before cost it nothing."""
    found = []
    if stage.done and run_s > 0 and stage.total is not None:
        per_s = stage.done / run_s
        unit = "" if is_short else f" {stage.unit}"
        rate = f"{per_s / 1e6:.0f} MB/s" if stage.unit == "bytes" else f"{per_s:.3g}{unit}/s"
        left_s = max(0, round((stage.total - stage.num_before - stage.done) / per_s))
        found += [rate, f"{left_s // 60}:{left_s % 60:02d} left"]
    read, written = stage.tokens() if stage.tokens else (stage.num_read, stage.num_written)
    if read or written:
        found.append(
            f"read {_short(read)} wrote {_short(written)}" if is_short else f"read {read:,} tokens, wrote {written:,}"
        )
    return found


def _short(number: int) -> str:
    """`950`, `12.3k`, `4.6M`."""
    return next(
        (f"{number / size:.1f}{name}" for size, name in ((1e6, "M"), (1e3, "k")) if number >= size), str(number)
    )
