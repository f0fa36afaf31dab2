"""How a worker starts: a judge beside the harness, and a zygote inside the confinement of a mode."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import IO, Any, Literal, TypeAlias, TypedDict

from qwen_eval.sandbox import seccomp
from qwen_eval.sandbox.codec import Damaged, Hangup, Oversize, receive_frame, send_order
from qwen_eval.sandbox.orders import OUT_OF_MEMORY
from qwen_eval.sandbox.program import Program, SandboxError, Verdict

RealMode: TypeAlias = Literal["bubblewrap", "namespaces", "unsafe"]

START_S = 20.0
START_TRIES = 4
END_S = 5.0  # for processes that have lost each other
LOG_BYTES = 1 << 20  # that are read of what a zygote complains of
GRACE_S = 0.5  # the judge times out by itself; this is for a judge stuck in one long operation
_INSIDE = ("orders", "codec", "seccomp", "confine", "candidate", "zygote")  # in the order of their imports
_KILLS = (signal.SIGKILL, signal.SIGTERM)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_BOOT_ZYGOTE = """
import marshal, os, sys, types
control = int(sys.argv[1])
def read(size):
    data = b""
    while len(data) < size:
        data += os.read(control, size - len(data)) or sys.exit(1)
    return data
boot = marshal.loads(read(int.from_bytes(read(4), "big")))
for package in ("qwen_eval", "qwen_eval.sandbox"):
    sys.modules[package] = types.ModuleType(package)
for name, code in boot["modules"]:
    full = "qwen_eval.sandbox." + name
    module = sys.modules[full] = types.ModuleType(full)
    setattr(sys.modules["qwen_eval.sandbox"], name, module)
    exec(code, module.__dict__)
sys.modules["qwen_eval.sandbox.zygote"].main(control, **boot["arguments"])
"""

_BOOT_JUDGE = """
import sys
sys.path.insert(0, sys.argv[4])
from qwen_eval.sandbox.judge import main
main(*map(int, sys.argv[1:4]))
"""

_workers_on: Counter[int] = Counter()  # this process's open workers by core
_cores_lock = threading.Lock()


def _claim_core() -> int:
    """The core with the fewest workers; of equals another one in each process.

    Judge and candidate take turns, a message each: on one core a turn takes a third of the time that waking another
    core takes.
    """
    with _cores_lock:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        first = os.getpid() % len(cores)
        core = min([*cores[first:], *cores[:first]], key=_workers_on.__getitem__)
        _workers_on[core] += 1
        return core


class WorkerLost(Exception):
    """A process of a worker that ended in the middle. `reason` is the verdict where the program brings it about.

    `is_outside`: no program can; it was killed by somebody else, such as the kernel when memory is short.
    """

    def __init__(self, reason: str, *, is_outside: bool) -> None:
        super().__init__(reason)
        self.reason, self.is_outside = reason, is_outside


def start_worker(mode: RealMode) -> Worker:
    """A new worker, tried again where one is killed while it starts. Raises SandboxError."""
    for _ in range(START_TRIES - 1):
        with contextlib.suppress(WorkerLost):
            return Worker(mode)
    try:
        return Worker(mode)
    except WorkerLost as lost:
        raise SandboxError(f"sandbox={mode}: killed from outside at each of {START_TRIES} starts ({lost})") from None


class Worker:
    """One judge and one zygote. Judges one program at a time."""

    def __init__(self, mode: RealMode) -> None:
        """Raises SandboxError where the confinement of `mode` cannot be had, WorkerLost where it is killed."""
        self.mode = mode
        self.num_judged = 0
        self.core = _claim_core()
        self._zygote_log = tempfile.TemporaryFile()  # noqa: SIM115
        self._zygote_said = ""  # known once it is closed
        self.harness, judge_end = socket.socketpair()
        self.harness_fd = self.harness.fileno()
        control, zygote_end = socket.socketpair()
        self.judge = self.zygote = None
        proc_fd = os.open("/proc", os.O_PATH) if mode != "unsafe" else os.open("/", os.O_RDONLY)
        try:
            self.zygote = self._start_zygote(zygote_end.fileno(), proc_fd)
            self.judge = self._start_judge(judge_end.fileno(), control.fileno())
            send_order(control.fileno(), _boot_message(mode, proc_fd, self.core))
        except Hangup:
            pass  # the wait below tells why
        except SandboxError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise SandboxError(f"sandbox={mode}: no process can be started ({error.strerror})") from None
        finally:
            for end in (judge_end, control, zygote_end):
                end.close()
            os.close(proc_fd)
        self.info = self._wait_ready()

    def _start_zygote(self, control_fd: int, proc_fd: int) -> subprocess.Popen[bytes]:
        python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _BOOT_ZYGOTE, str(control_fd)]
        command = [*_bubblewrap_arguments(), *python] if self.mode == "bubblewrap" else python
        return subprocess.Popen(
            command,
            env={"LD_BIND_NOW": "1"},  # else each candidate binds what it calls, in pages of its own
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._zygote_log,
            pass_fds=(control_fd, proc_fd),
            start_new_session=True,
        )

    def _start_judge(self, harness_fd: int, control_fd: int) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        numbers = map(str, (harness_fd, control_fd, self.core))
        command = [sys.executable, "-I", "-B", "-c", _BOOT_JUDGE, *numbers, root]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(harness_fd, control_fd), start_new_session=True
        )

    def _wait_ready(self) -> dict[str, Any]:
        try:
            if not self._readable(START_S):
                raise TimeoutError
            info: dict[str, Any] = receive_frame(self.harness_fd)
        except (TimeoutError, Hangup, Damaged, Oversize):
            lost = self._loss(is_starting=True)
            if lost.is_outside:
                raise lost from None
            lines = self._zygote_said.splitlines() or [lost.reason]
            raise SandboxError(f"sandbox={self.mode}: {lines[-1][:300]}") from None
        return info

    def _readable(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self.harness_fd, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1000))

    def run(self, program: Program, timeout_s: float, memory_bytes: int) -> Verdict:
        """Raises WorkerLost when judge, zygote or candidate was killed; the program may be at fault or not."""
        request = {
            "solution": str(program.solution),  # of a subclass of str, as numpy's, which is no plain data
            "test": str(program.test),
            "prelude": str(program.prelude),
            "entry_point": str(program.entry_point),
            "timeout_s": float(timeout_s),
            "memory_bytes": int(memory_bytes),
        }
        start = time.perf_counter()
        try:
            send_order(self.harness_fd, request, 1 << 30)
            if not self._readable(timeout_s + GRACE_S):
                self.close()
                return Verdict(False, "timed out", time.perf_counter() - start)
            verdict: tuple[str, float] = receive_frame(self.harness_fd)
            reason, wall_s = verdict
        except (Hangup, Damaged, Oversize):
            lost = self._loss()
            if lost.reason != "memory" or self.num_judged:  # earlier programs may have left something in its memory
                raise lost from None
            reason, wall_s = lost.reason, time.perf_counter() - start
        if reason == "killed: SIGKILL":  # by the kernel when memory is short, or by the program itself
            raise WorkerLost(reason, is_outside=False)
        self.num_judged += 1
        return Verdict(reason == "passed", reason, wall_s)

    def _loss(self, *, is_starting: bool = False) -> WorkerLost:
        """Close, and say how it ended. Confined programs kill neither process, nor does any that has not begun."""
        judge, zygote = self._close(END_S)
        if judge == OUT_OF_MEMORY:
            return WorkerLost("memory", is_outside=False)
        # a zygote's status comes through its parents, as 128 + n or as -n & 255
        killed = judge in [-n for n in _KILLS] or zygote in [code for n in _KILLS for code in (-n, 128 + n, 256 - n)]
        is_other = is_starting or self.mode != "unsafe"
        ends = f"judge {'killed' if judge is None else judge}, zygote {'killed' if zygote is None else zygote}"
        return WorkerLost(f"error: its worker ended ({ends})", is_outside=killed and is_other)

    @property
    def is_open(self) -> bool:
        return self.harness.fileno() >= 0

    def close(self) -> None:
        """Hang up, upon which an idle judge ends and the zygote after it; what does not is killed."""
        self._close(GRACE_S)

    def _close(self, wait_s: float) -> list[int | None]:
        """The exit statuses of judge and zygote; None for one that had to be killed."""
        if self.is_open:
            with _cores_lock:
                _workers_on[self.core] -= 1
        self.harness.close()
        statuses = [_end(process, wait_s) for process in (self.judge, self.zygote)]
        self._zygote_said = self._zygote_said or last_words(self._zygote_log)
        return statuses


def last_words(log: IO[bytes]) -> str:
    """What a process that has ended wrote to its `log`, which is closed; "" where it was closed before."""
    if log.closed:
        return ""
    with log:
        log.seek(0)
        return log.read(LOG_BYTES).decode(errors="replace").strip()


def _end(process: subprocess.Popen[bytes] | None, wait_s: float) -> int | None:
    if process is None:
        return None
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(wait_s)
    process.kill()
    process.wait()
    return None


def _boot_message(mode: RealMode, proc_fd: int, core: int) -> dict[str, Any]:
    return {
        "modules": _modules(),
        "arguments": {
            "proc_fd": proc_fd,
            "core": core,
            "tree": _tree() if mode == "namespaces" else None,
            "is_confined": mode != "unsafe",
            "extra_path": ["/site"] if mode != "unsafe" else sys.path,
        },
    }


@functools.cache
def _modules() -> list[tuple[str, CodeType]]:
    """Compiled here, since what a compiler leaves in the memory of a zygote is copied with every fork."""
    folder = Path(__file__).parent
    sources = [(name, (folder / f"{name}.py").read_text(encoding="utf-8")) for name in _INSIDE]
    return [(name, compile(source, f"{name}.py", "exec", dont_inherit=True)) for name, source in sources]


class _TreeFields(TypedDict):
    """Of `confine.Tree`."""

    binds: list[tuple[str, str]]
    links: list[tuple[str, str]]
    masks: list[str]
    devices: tuple[str, ...]


@functools.cache
def _tree() -> _TreeFields:
    """What Python needs of the host: its binary, its library, the system's shared libraries; numpy where we have it.

    Packages installed beside are hidden, as are home folders, /etc, /proc, /sys and the project.
    """
    python, stdlib = os.path.realpath(sys.executable), os.path.realpath(sysconfig.get_paths()["stdlib"])
    places = ["/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    places += [os.path.join(os.path.realpath(sys.base_prefix), "lib"), stdlib, python]
    binds: list[tuple[str, str]] = []
    links: list[tuple[str, str]] = []
    for place in places:
        if os.path.islink(place):
            links.append((os.readlink(place), place))
        elif os.path.exists(place) and not any(place.startswith(known + "/") for _, known in binds):
            binds.append((place, place))
    folders = {place for _, place in binds}
    masks = [hidden for folder in folders for hidden in _package_folders(folder)]
    purelib = sysconfig.get_paths()["purelib"]
    for name in ("numpy", "numpy.libs"):
        if os.path.isdir(os.path.join(purelib, name)):
            binds.append((os.path.realpath(os.path.join(purelib, name)), f"/site/{name}"))
    return {"binds": binds, "links": links, "masks": sorted(set(masks)), "devices": _DEVICES}


def _package_folders(folder: str) -> list[str]:
    names = ("site-packages", "dist-packages", "python*/site-packages", "python*/dist-packages")
    return [place for name in names for place in glob.glob(os.path.join(glob.escape(folder), name))]


def _bubblewrap_arguments() -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("sandbox=bubblewrap: no bwrap on the PATH; install bubblewrap or pass sandbox=namespaces")
    tree = _tree()
    arguments = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:  # a true change of user inside needs these two; they are gone before any candidate runs
        arguments += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    places = [place for _, place in tree["binds"]] + list(tree["devices"])
    for folder in sorted({str(parent) for place in places for parent in Path(place).parents} - {"/"}):
        arguments += ["--dir", folder]  # said by name they are 0755; made on the way they would be closed to nobody
    for source, place in tree["binds"]:
        arguments += ["--ro-bind", source, place]
    for device in tree["devices"]:
        arguments += ["--dev-bind", device, device]
    for target, place in tree["links"]:
        arguments += ["--symlink", target, place]
    for place in tree["masks"]:
        arguments += ["--tmpfs", place, "--remount-ro", place]
    return [*arguments, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/", "--"]


def is_possible() -> bool:
    """False where no confinement is to be had at all: not Linux, or a machine whose system calls are not listed."""
    return sys.platform == "linux" and seccomp.is_supported()
