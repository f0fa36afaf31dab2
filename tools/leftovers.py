"""What a program left: processes of its session, and shared memory that nobody has mapped."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
LEFT_S = 30  # how long something may take to go


def members(session: int) -> dict[int, str]:
    """Name by process id. vLLM's processes overwrite their environment and command line with a title."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            name, fields = entry.read_text().split("(", 1)[1].rsplit(")", 1)
            state, _, _, of_session = fields.split()[:4]
            if int(of_session) == session and state != "Z":
                found[int(entry.parent.name)] = name
    return found


def shared() -> set[str]:
    return set(os.listdir(SHARED_MEMORY))


def leaked(before: Collection[str]) -> list[str]:
    """New shared memory that no living process has mapped: what others are using is not ours."""
    new = shared() - set(before)
    for entry in Path("/proc").glob("[0-9]*/maps") if new else ():
        with suppress(OSError):
            mapped = entry.read_text()
            new = {name for name in new if f"{SHARED_MEMORY}/{name}" not in mapped}
    return sorted(new)


def left(session: int, before: Collection[str]) -> dict[str, list[str]]:
    """After waiting for the last of it."""
    until = time.monotonic() + LEFT_S
    while True:
        found = {"processes": sorted(members(session).values()), "shared_memory": leaked(before)}
        if not any(found.values()) or time.monotonic() > until:
            return found
        time.sleep(0.5)
