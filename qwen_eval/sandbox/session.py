"""A program that stays: one candidate in the cell, asked again and again until it is closed.

`run_programs` judges programs that end. An agent's program is a conversation: a notebook's cells, or a chat's snippets
that share their variables. A `Session` forks one candidate of a zygote of its own, loads a driver of ours into it, and
calls the driver's functions with plain data. After the first hostile snippet the driver is in hostile hands too: what
comes back is that candidate's word about itself, of an exact builtin type, and nothing here trusts it further.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from qwen_eval.sandbox import launch
from qwen_eval.sandbox.codec import Damaged, Handle, Hangup, Oversize, pack, send_order, unpack
from qwen_eval.sandbox.launch import RealMode
from qwen_eval.sandbox.orders import END, RUN
from qwen_eval.sandbox.program import Mode, SandboxError
from qwen_eval.sandbox.remote import CandidateError, Channel, OversizeAnswer, Unconfined
from qwen_eval.sandbox.selftest import self_test

MEMORY_BYTES = 2 << 30
LOAD_S = 20.0  # for the driver
REAP_S = 5.0
_BWRAP_TAIL = 7  # arguments of bubblewrap after the last file of the root
_counter = itertools.count()


class SessionLost(Exception):
    """The candidate ended, was killed or answered with damage; `reason` says which: "timed out", "killed", ..."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Host:
    """A zygote whose orders come from the harness. It holds one candidate at a time.

    `packages`: names in site-packages that the root holds beside Python and numpy, read-only.
    """

    def __init__(self, mode: RealMode, packages: Sequence[str] = ()) -> None:
        """Raises SandboxError where the confinement of `mode` cannot be had."""
        self.mode, self.packages = mode, tuple(packages)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._control, theirs = socket.socketpair()
        proc_fd = os.open("/proc" if mode != "unsafe" else "/", os.O_PATH if mode != "unsafe" else os.O_RDONLY)
        try:
            self._zygote = self._start(theirs.fileno(), proc_fd)
            with contextlib.suppress(Hangup):  # the wait below tells why
                send_order(self._control.fileno(), self._boot(proc_fd))
        finally:
            theirs.close()
            os.close(proc_fd)
        self._wait_ready()

    def _start(self, control_fd: int, proc_fd: int) -> subprocess.Popen[bytes]:
        python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", launch._BOOT_ZYGOTE, str(control_fd)]
        return subprocess.Popen(
            [*self._wall(), *python],
            env={"LD_BIND_NOW": "1"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            pass_fds=(control_fd, proc_fd),
            start_new_session=True,
        )

    def _wall(self) -> list[str]:
        if self.mode != "bubblewrap":
            return []
        arguments = launch._bubblewrap_arguments()
        more = [part for source, place in self._binds() for part in ("--ro-bind", source, place)]
        return [*arguments[:-_BWRAP_TAIL], "--dir", "/site", *more, *arguments[-_BWRAP_TAIL:]]

    def _boot(self, proc_fd: int) -> dict[str, Any]:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        message = launch._boot_message(self.mode, proc_fd, cores[next(_counter) % len(cores)])
        tree = message["arguments"]["tree"]
        if tree is not None:
            message["arguments"]["tree"] = {**tree, "binds": [*tree["binds"], *self._binds()]}
        return message

    def _binds(self) -> list[tuple[str, str]]:
        purelib = Path(sysconfig.get_paths()["purelib"])
        found = [purelib / name for name in self.packages if (purelib / name).exists()]
        return [(os.path.realpath(path), f"/site/{path.name}") for path in found]

    def _wait_ready(self) -> None:
        ready = b""
        if _readable(self._control, launch.START_S):
            with contextlib.suppress(ConnectionResetError):
                ready = self._control.recv(4096)
        if not ready or not json.loads(ready).get("ready"):
            lines = self.close().splitlines() or ["it ended at once"]
            raise SandboxError(f"sandbox={self.mode}: {lines[-1][:300]}")

    def fork(self) -> socket.socket:
        """The channel to a new candidate."""
        mine, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [RUN], [theirs.fileno()])
        return mine

    def reap(self) -> bool:
        """Kill the candidate, with its threads, and empty its folder; False where the zygote is lost."""
        try:
            self._control.sendall(END)
            return _readable(self._control, REAP_S) and len(self._control.recv(4)) == 4
        except OSError:
            return False

    def close(self) -> str:
        """End the zygote; what it complained of."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._zygote.wait(timeout=0.5)
        self._zygote.kill()
        self._zygote.wait()
        return launch.last_words(self._log)


def _readable(channel: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class Session:
    """One confined candidate with a driver loaded; its variables live until `close`.

    `cpu_s` bounds the computing of the whole session. Raises SandboxError where confinement cannot be had.
    """

    def __init__(
        self,
        driver: str,
        *,
        mode: Mode = "auto",
        cpu_s: int = 120,
        memory_bytes: int = MEMORY_BYTES,
        packages: Sequence[str] = (),
    ) -> None:
        real = cast("RealMode", self_test(mode)["mode"])
        self._host = _take(real, tuple(packages))
        self._socket = self._host.fork()
        self._channel = Channel(self._socket.fileno())
        self._lock = threading.Lock()
        self.is_open = True
        try:
            with self._within(LOAD_S):
                self._channel.load(driver, cpu_s, memory_bytes)
                self._channel.loaded()
        except Unconfined as error:
            self.close()
            raise SandboxError(f"sandbox={real}: {error}") from None

    def call(self, function: str, *args: Any, timeout_s: float) -> Any:
        """What the driver's function returns: plain data. Raises SessionLost; the session is closed then."""
        assert self.is_open, "a session that was lost is not asked again"
        try:
            with self._within(timeout_s):
                packed, _ = self._channel.ask("call", function, pack(list(args), _plain_only), None)
            return unpack(packed, _no_handle)
        except (Damaged, Oversize, OversizeAnswer, RecursionError) as error:
            self._lose(f"damaged answer ({type(error).__name__})")
        except CandidateError as error:
            self._lose(str(error)[:200])
        except Exception as error:
            if not getattr(error, "from_candidate", False):
                raise
            self._lose(f"{type(error).__name__}: {error}"[:200])

    @contextlib.contextmanager
    def _within(self, timeout_s: float) -> Any:
        """The channel is cut off after `timeout_s`, in whatever state of a message: reading then ends."""
        has_rung = threading.Event()

        def ring() -> None:
            has_rung.set()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(timeout_s, ring)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (Hangup, Damaged) as error:
            told = "killed" if isinstance(error, Hangup) else "damaged answer"
            self._lose("timed out" if has_rung.is_set() else told)
        finally:
            timer.cancel()
        if has_rung.is_set():
            self._lose("timed out")

    def _lose(self, reason: str) -> NoReturn:
        self.close()
        raise SessionLost(reason)

    def close(self) -> None:
        """End the candidate; its zygote waits for the next session."""
        with self._lock:
            if not self.is_open:
                return
            self.is_open = False
        is_whole = self._host.reap()  # with the channel open: a hangup would make it run on
        self._socket.close()
        _give_back(self._host, is_whole)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain_only(value: Any) -> Handle:
    raise TypeError(f"{type(value).__name__} is not plain data")


def _no_handle(handle: Handle) -> NoReturn:
    raise Damaged("an object that is not plain data")


# --- idle zygotes ----------------------------------------------------------------------------------------------------

_idle: dict[tuple[int, RealMode, tuple[str, ...]], list[Host]] = {}  # by process: a fork must not share them
_idle_lock = threading.Lock()


def _take(mode: RealMode, packages: tuple[str, ...]) -> Host:
    with _idle_lock:
        idle = _idle.get((os.getpid(), mode, packages))
        if idle:
            return idle.pop()
    return Host(mode, packages)


def _give_back(host: Host, is_whole: bool) -> None:
    if not is_whole:
        host.close()
        return
    with _idle_lock:
        _idle.setdefault((os.getpid(), host.mode, host.packages), []).append(host)


def close_hosts() -> None:
    """End this process's idle zygotes."""
    with _idle_lock:
        mine = [key for key in _idle if key[0] == os.getpid()]
        hosts = [host for key in mine for host in _idle.pop(key)]
    for host in hosts:
        host.close()
