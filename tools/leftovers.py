"""What a program left: processes of its session, and the shared memory that they had mapped."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
NAME = re.compile(rf"{SHARED_MEMORY}/(\S+)")
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


def mapped(session: int) -> set[str]:
    """The shared memory that its processes have mapped now."""
    found: set[str] = set()
    for pid in members(session):
        with suppress(OSError):
            found.update(NAME.findall(Path(f"/proc/{pid}/maps").read_text()))
    return found


def left(session: int, mapped_once: Collection[str]) -> dict[str, list[str]]:
    """After waiting for the last of it. `mapped_once`: what its processes had mapped while they ran."""
    until = time.monotonic() + LEFT_S
    while True:
        memory = sorted(name for name in mapped_once if (SHARED_MEMORY / name).exists())
        found = {"processes": sorted(members(session).values()), "shared_memory": memory}
        if not any(found.values()) or time.monotonic() > until:
            return found
        time.sleep(0.5)
