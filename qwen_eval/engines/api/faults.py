"""What can go wrong with one request, by what follows from it. All messages are one line that is safe to print."""

from __future__ import annotations

from qwen_eval.terminal import plain_text

MAX_TEXT = 200  # characters of a server's own words


class Fault(Exception):
    """It may go well the next time: no connection, a busy server, a reply that cannot be read.

    `pause_s`: how long the server asks to wait. `is_busy`: it works, but has too much to do. `is_down`: there is none.
    """

    def __init__(
        self, reason: str, *, pause_s: float | None = None, is_busy: bool = False, is_down: bool = False
    ) -> None:
        super().__init__(reason)
        self.pause_s, self.is_busy, self.is_down = pause_s, is_busy, is_down


class RequestFailed(Exception):
    """This request has no answer: it was refused, or all its tries are spent. Others may have one."""


def safe_text(text: str, key: str | None = None) -> str:
    """The first words of what a server says: no control characters, and the API key is blotted out."""
    line = " ".join(text[: 20 * MAX_TEXT].split())
    if key and len(key) >= 4:
        line = line.replace(key, "[key]")
    return plain_text(line)[:MAX_TEXT]
