"""A chat template in a warm child process: with limits of time and memory; every error there becomes one line."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qwen_eval.core import ModelError
from qwen_eval.models.segments import Fields

RENDER_S = 10.0  # of one chat; published templates take a millisecond
START_S = 60.0
MEMORY_BYTES = 512 << 20
MAX_REPLY = 1 << 28  # bytes that are read from the child


class TemplateProcess:
    """One template in a warm child process with a limit of time for each order and of memory."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set."""
        with self._lock:
            return self._started()

    def render(self, rows: Sequence[Fields]) -> list[str | ModelError]:
        with self._lock:
            if self._process is None:
                self._started()
            reply = self._ask({"render": list(rows)}, RENDER_S)
        return [item["text"] if "text" in item else _refusal(item["error"]) for item in reply["texts"]]

    def _started(self) -> frozenset[str]:
        if self._process is None:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}\n"
                f"from qwen_eval.models.template_child import main\nmain({MEMORY_BYTES})"
            )
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            environment = {k: v for k, v in os.environ.items() if k in ("PATH", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")}
            self._process = subprocess.Popen([sys.executable, "-I", "-c", code], env=environment, **pipes)
            self._stop = weakref.finalize(self, _end, self._process)
        return frozenset(self._ask({"load": self._template}, START_S)["variables"])

    def _ask(self, order: Fields, limit_s: float) -> Fields:
        assert self._process is not None
        try:
            line = _exchange(self._process, json.dumps(order).encode() + b"\n", limit_s)
            reply: Fields = json.loads(line)
        except (OSError, ValueError, ModelError) as error:
            self._stop()
            self._process = None
            if isinstance(error, ModelError):
                raise
            raise _refusal("its process ended: it needs too much memory") from error
        if "error" in reply:
            raise _refusal(reply["error"])
        return reply


def _refusal(why: str) -> ModelError:
    return ModelError(f"the checkpoint's chat template cannot render this chat: {why}")


def _exchange(process: subprocess.Popen[bytes], order: bytes, limit_s: float) -> bytes:
    """The line that answers `order`; ModelError after `limit_s`, OSError where the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(order)
    process.stdin.flush()
    deadline = time.monotonic() + limit_s
    line = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise _refusal(f"it takes more than {limit_s:.0f} s")
            block = os.read(process.stdout.fileno(), 1 << 20)
            if not block or len(line) > MAX_REPLY:
                raise OSError("no reply")
            line += block
    return bytes(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
