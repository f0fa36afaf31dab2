"""A warm Python that forks one confined candidate after another. Runs inside the sandbox: standard library alone.

Talks to the judge over `control`: {"run": limits} with the candidate's channel as descriptor, then {"reap": grace_s},
answered by {"status": ...}. It never sees a program: the source goes through the channel to the candidate alone.
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
import random  # noqa: F401  # its own fork hook seeds each candidate afresh
import re  # noqa: F401
import shutil
import signal
import socket
import statistics  # noqa: F401
import string  # noqa: F401
import sys
import tempfile
import time
import typing
from typing import Any

from qwen_eval.sandbox import candidate, codec, confine, seccomp


class Cell:
    """How candidates are forked: each in a PID namespace, a tmpfs and a filter of its own."""

    def __init__(self, own_pid_namespace: int) -> None:
        self.own_pid_namespace = own_pid_namespace
        self.filter = seccomp.candidate_filter(pid=1)

    def fork(self) -> int:
        return confine.fork_candidate(self.own_pid_namespace)

    def confine(self, limits: confine.Limits) -> None:
        confine.own_tmpfs()
        confine.set_limits(limits)
        confine.drop_privileges(self.filter)

    def end(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)  # its whole namespace dies with it


class OpenField:
    """No confinement but limits, a session and a scratch folder: mode "unsafe"."""

    def fork(self) -> int:
        self.folder = tempfile.mkdtemp(prefix="candidate-")
        return os.fork()

    def confine(self, limits: confine.Limits) -> None:
        os.chdir(self.folder)
        confine.set_limits(limits)

    def end(self, pid: int) -> None:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def main(control_fd: int, proc_fd: int, tree: dict[str, Any] | None, is_confined: bool, extra_path: list[str]) -> None:
    """`tree` is given where the root is still the host's; in bubblewrap it has been made already."""
    control = socket.socket(fileno=control_fd)
    home: Cell | OpenField = OpenField()
    if is_confined:
        if tree is not None:
            confine.build_root(confine.Tree(**tree), proc_fd)
        home = Cell(confine.enter_cell(proc_fd))
        os.chdir("/tmp")
    sys.path += extra_path
    os.environ.clear()  # Python itself sets LC_CTYPE in an empty environment
    gc.collect()
    gc.freeze()
    control.sendall(json.dumps({"ready": True, "landlock": confine.landlock_version() if is_confined else 0}).encode())
    while _serve_one(control, home):
        pass


def _serve_one(control: socket.socket, home: Cell | OpenField) -> bool:
    message, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
    if not message:
        return False
    limits = confine.Limits(**json.loads(message)["run"])
    pid = home.fork()
    if pid == 0:
        _become_candidate(descriptors[0], home, limits)
    os.close(descriptors[0])
    order = control.recv(4096)
    _wait_briefly(pid, json.loads(order)["reap"] if order else 0.0)
    home.end(pid)
    _, status = os.waitpid(pid, 0)
    if order:
        control.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
    return bool(order)


def _wait_briefly(pid: int, grace_s: float) -> None:
    """Let a candidate that hung up finish dying, so that its own exit status is seen."""
    end = time.monotonic() + grace_s
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


def _become_candidate(channel: int, home: Cell | OpenField, limits: confine.Limits) -> typing.NoReturn:
    status = 125
    try:
        os.setsid()
        for number in (0, 1, 2):
            os.dup2(_null, number)
        os.dup2(channel, 3)
        os.closerange(4, 1 << 30)
        home.confine(limits)
        sys.argv[:] = [""]
        candidate.serve(3)
        status = 0
    except OSError as error:
        with contextlib.suppress(BaseException):
            codec.send_frame(3, ["", "unconfined", str(error)])
    finally:
        os._exit(status)


_null = os.open(os.devnull, os.O_RDWR)
