"""One run as a terminal of 80 columns and a log show it; `python tests/terminal_run.py` writes docs/terminal.md."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "terminal.md"
COMMAND = "python -m qwen_eval task=nano limit=60 task.max_new_tokens=32"
OURS = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ERASED = "\x1b[2K"
CONTROL = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")
RATE = re.compile(r"\d/s")


def in_terminal(cwd: Path, command: str = COMMAND) -> str:
    """All that a command writes to a terminal of 80 columns, control sequences included."""
    file, terminal = pty.openpty()  # pty.fork could deadlock where a test before left threads
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    environment = {**OURS, "COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, *command.split()[1:]], cwd=cwd, env=environment, **ends)
    os.close(terminal)
    drawn = b""
    while True:
        try:
            part = os.read(file, 1 << 16)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        drawn += part
    process.wait()
    os.close(file)
    return drawn.decode("utf-8", "replace")


def in_log(cwd: Path, command: str = COMMAND) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, *command.split()[1:]]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, env={**OURS, "COLUMNS": "80"}, timeout=300)


def frames(drawn: str) -> list[str]:
    """The lines that were drawn over, in order, without those that are drawn again unchanged."""
    moving = drawn[: drawn.rindex(ERASED)]
    lines = [line.strip() for line in re.split(r"[\r\n]", CONTROL.sub("\n", moving)) if line.strip()]
    return [line for line, before in zip(lines, ["", *lines]) if line != before]


def kept(drawn: str) -> str:
    """What is left on the screen at the end."""
    return CONTROL.sub("", drawn[drawn.rindex(ERASED) :]).replace("\r\n", "\n").strip("\n")


def kind(line: str) -> str:
    """A line without its numbers, its bar and its rates: `"nano · qwen-nano  0/60"` -> `"nano · qwen-nano"`."""
    return re.split(r"  |: ", line)[0]


def shown_frames(lines: list[str]) -> list[str]:
    """The first of each kind, and of those with rates the first, the middle and the last."""
    with_rates = [line for line in lines if RATE.search(line) and line.startswith("nano · ")]
    some = {with_rates[i] for i in (0, len(with_rates) // 2, -1)} if with_rates else set()
    found: list[str] = []
    for line in lines:
        is_new = kind(line) not in map(kind, found)
        if line not in found and (is_new or line in some):
            found.append(line)
    return found


def page(drawn: str, log: subprocess.CompletedProcess[str]) -> str:
    about = (
        f"One run of the embedded miniature, `{COMMAND}`, on a terminal and in a log. `python tests/terminal_run.py` "
        "writes this page, and a test compares it with a run."
    )
    terminal = (
        "In 80 columns. Each of these lines is drawn over the one before; at the end the last one is taken away. "
        "Of the lines with rates three are shown."
    )
    logged = (
        "Standard error, where it is no terminal. A line comes when something has lasted for a moment, then every ten "
        "seconds; there are no carriage returns. Standard output has the result alone, as above."
    )
    blocks = [
        "# What a run looks like", about,
        "## On a terminal", terminal, fenced(shown_frames(frames(drawn))), "What is left:", fenced([kept(drawn)]),
        "## In a log", logged, fenced([log.stderr.strip("\n")]),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def fenced(lines: list[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        PAGE.write_text(page(in_terminal(Path(one)), in_log(Path(two))))
