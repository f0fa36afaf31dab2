"""A warm Python that forks one confined candidate after another. Runs inside the sandbox: standard library alone.

Obeys the judge over `control`, a byte an order: `RUN` brings the channel of the candidate to be forked as descriptor,
`END` and `END_SOON` (which lets one that hung up finish dying) are answered by its exit status. It never sees a
program: the source goes through the channel to the candidate alone.

Each page that it or a candidate writes after a fork is copied, which is most of what a candidate costs: so this file
imports little that candidates do not ask for, and does little between two forks.
"""

from __future__ import annotations

# Imported here once, so that a candidate finds them loaded.
import bisect  # noqa: F401
import collections
import collections.abc  # noqa: F401
import contextlib
import copy  # noqa: F401
import datetime  # noqa: F401
import functools  # noqa: F401
import gc
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import operator  # noqa: F401
import os
import re  # noqa: F401
import signal
import string  # noqa: F401
import struct
import sys
import time
import typing
from _socket import CMSG_SPACE, socket  # `socket` is 10 times the pages
from typing import Any

from qwen_eval.sandbox import candidate, codec, confine
from qwen_eval.sandbox.orders import END_SOON, RUN

GRACE_S = 0.1


class OpenField:
    """No confinement but limits, a session and a scratch folder: mode "unsafe"."""

    def __init__(self) -> None:
        self._folders: dict[int, str] = {}

    def fork(self) -> int:
        import tempfile  # here, since a confined candidate never needs it

        folder = tempfile.mkdtemp(prefix="candidate-")
        pid = os.fork()
        if pid:
            self._folders[pid] = folder
        else:
            os.chdir(folder)
        return pid

    def lock_in(self, channel: int) -> int:
        confine.keep_only(channel)
        confine.set_fixed_limits()
        return confine.CHANNEL

    def end(self, pid: int) -> int:
        import shutil

        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folders.pop(pid), ignore_errors=True)
        return os.waitpid(pid, 0)[1]

    def renew(self) -> None:
        pass


def main(
    control_fd: int, proc_fd: int, core: int, tree: dict[str, Any] | None, is_confined: bool, extra_path: list[str]
) -> None:
    """`tree` is given where the root is still the host's; in bubblewrap it has been made already."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    control = socket(fileno=control_fd)
    home: confine.Confinement | OpenField = OpenField()
    if is_confined:
        if tree is not None:
            confine.build_root(confine.Tree(**tree), proc_fd)
        confine.enter_cell(proc_fd)
        home = confine.Confinement()
    _import_random()
    candidate.rehearse()
    sys.path += extra_path
    sys.argv[:] = [""]
    os.environ.clear()  # Python itself sets LC_CTYPE in an empty environment
    gc.collect()
    gc.freeze()
    control.sendall(json.dumps({"ready": True, "landlock": confine.landlock_version() if is_confined else 0}).encode())
    _serve(control, home)


def _import_random() -> None:
    """Without its fork hook, which seeds anew and takes longer than the fork: all candidates draw the same numbers."""
    register, os.register_at_fork = os.register_at_fork, lambda **_: None
    import random
    import statistics  # noqa: F401

    os.register_at_fork = register
    random.seed(0)


def _serve(control: socket, home: confine.Confinement | OpenField) -> None:
    fd, room = control.fileno(), CMSG_SPACE(struct.calcsize("i"))
    while True:
        order, descriptors, _, _ = control.recvmsg(1, room)
        if order != RUN:
            return
        [[_, _, packed]] = descriptors
        [channel] = struct.unpack("i", packed)
        pid = home.fork()
        if not pid:
            _become_candidate(channel, home)
        os.close(channel)
        order = os.read(fd, 1)
        if order == END_SOON:
            _wait_briefly(pid)
        status = home.end(pid)
        if not order:
            return
        home.renew()
        os.write(fd, struct.pack("<i", os.waitstatus_to_exitcode(status)))


def _wait_briefly(pid: int) -> None:
    """Let a candidate that hung up finish dying, so that its own exit status is seen."""
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


def _become_candidate(channel: int, home: confine.Confinement | OpenField) -> typing.NoReturn:
    status = 125
    try:
        os.setsid()
        channel = home.lock_in(channel)
        candidate.serve(channel, confine.set_budget)
        status = 0
    except OSError as error:
        with contextlib.suppress(BaseException):
            codec.send_frame(channel, ["", "unconfined", str(error)])
    finally:
        os._exit(status)
