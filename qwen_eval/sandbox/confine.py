"""Linux confinement through libc: namespaces, a read-only root, capabilities, rlimits, Landlock, the seccomp filter.

Three steps, each one way:
  `build_root`    a mount namespace whose root holds only what Python needs, read-only; no network, no /proc, no /sys
  `enter_cell`    an unprivileged user in a user and a PID namespace of its own
  `Confinement.lock_in`  in the candidate: no capability, limits, Landlock, seccomp
What can be made once a worker is (`Confinement`): the kernel takes longer over these than Python over a typical
candidate.
Every failure raises OSError: nothing runs half confined. Runs inside the sandbox: standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

from qwen_eval.sandbox import seccomp

NOBODY = 65534
TMPFS_BYTES = 16 << 20
CHANNEL = 3  # the candidate's only descriptor

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _NOATIME = 1, 2, 4, 8, 32, 1024
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
_KEPT_FLAGS = _RDONLY | _NOSUID | _NODEV | _NOEXEC | _NOATIME | 2048 | (1 << 21)  # with noatime, nodiratime, relatime
_DETACH = 2
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVS = 1, 4, 38
_CAP_SYS_ADMIN = 1 << 21
_CLOCK_REALTIME_COARSE = 5

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc["syscall"]  # the candidate's way, with nothing left to look up or to convert
_syscall.argtypes = [ctypes.c_long] * 5
_CAPSET, _SECCOMP, _PIVOT_ROOT = (126, 317, 155) if os.uname().machine == "x86_64" else (91, 277, 41)
_outer_ids = os.getuid(), os.getgid()  # as the namespace around sees them


def _call(name: str, *arguments: object) -> int:
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, pointer: object = 0) -> None:
    _call("prctl", option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


# --- the worker's root and user ------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """What the root holds: host path -> place inside, read-only; `links` are symbolic, `masks` emptied folders."""

    binds: Sequence[tuple[str, str]]
    links: Sequence[tuple[str, str]]  # (target, place)
    masks: Sequence[str]
    devices: Sequence[str] = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def build_root(tree: Tree, proc_fd: int) -> None:
    """Leave the host's network, IPC, host name, and its file system but for `tree`."""
    if not _is_admin(proc_fd):
        _call("unshare", _NEWUSER)
        _write_maps(proc_fd)
    _call("unshare", _NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP)
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "mode=0755")  # moved to / by the next lines: hides no source
    os.mkdir("/tmp/.host")
    _call("syscall", ctypes.c_long(_PIVOT_ROOT), b"/tmp", b"/tmp/.host")
    os.chdir("/")
    for source, place in tree.binds:
        _bind("/.host" + source, place, _NODEV)
    for place in tree.devices:
        _bind("/.host" + place, place, _NOEXEC)
    for target, place in tree.links:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.symlink(target, place)
    for place in tree.masks:
        _mount("tmpfs", place, "tmpfs", _RDONLY | _NOSUID | _NODEV | _NOEXEC, "mode=0755")
    os.makedirs("/tmp", exist_ok=True)
    _call("umount2", b"/.host", _DETACH)
    os.rmdir("/.host")
    _mount("none", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _is_admin(proc_fd: int) -> bool:
    with open(os.open("self/status", os.O_RDONLY, dir_fd=proc_fd)) as lines:
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return os.geteuid() == 0 and bool(effective & _CAP_SYS_ADMIN)


def _bind(source: str, place: str, flags: int) -> None:
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.close(os.open(place, os.O_CREAT | os.O_RDONLY, 0o444))
    _mount(source, place, "", _BIND)
    kept = os.statvfs(place).f_flag & _KEPT_FLAGS  # in a user namespace flags of the source are locked: say them again
    _mount("none", place, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | flags | kept)


def _write_maps(proc_fd: int) -> None:
    uid, gid = _outer_ids
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc_fd)
        with open(fd, "w") as file:
            file.write(text)


def enter_cell(proc_fd: int) -> None:
    """Become nobody, process 1 of a new PID namespace, which has no handler for any signal.

    `proc_fd` is the host's /proc, needed for the identity maps, and closed here.
    """
    global _outer_ids
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _prctl(_SET_DUMPABLE, 1)  # a change of uid clears it, and then /proc/self is root's
    _outer_ids = os.getuid(), os.getgid()
    _call("unshare", _NEWUSER | _NEWNS | _NEWPID)
    _write_maps(proc_fd)
    keeper = os.fork()
    if keeper:
        os.close(proc_fd)
        _, status = os.waitpid(keeper, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's, the only one there is
    os.close(proc_fd)
    _prctl(_SET_DUMPABLE, 0)


# --- the candidate -------------------------------------------------------------------------------------------------

_FIXED_LIMITS = {
    "FSIZE": TMPFS_BYTES,
    "NOFILE": 64,
    "NPROC": 32,  # threads, with the three processes of the cell
    "CORE": 0,
    "MSGQUEUE": 0,
    "MEMLOCK": 0,
}


def set_fixed_limits() -> None:
    """For this process and its children, for good."""
    for name, value in _FIXED_LIMITS.items():
        if hasattr(resource, f"RLIMIT_{name}"):
            _limit(getattr(resource, f"RLIMIT_{name}"), value)


def set_budget(cpu_s: int, memory_bytes: int) -> None:
    """Seconds of computing and bytes of address space, for this process."""
    _limit(resource.RLIMIT_CPU, cpu_s)
    _limit(resource.RLIMIT_AS, memory_bytes)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def keep_only(channel: int) -> None:
    """`channel` becomes descriptor `CHANNEL`, 0 to 2 lead nowhere, all others are closed."""
    null = os.open(os.devnull, os.O_RDWR)  # anew: what is set on an open file would be seen by the next program
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.dup2(channel, CHANNEL)
    os.closerange(CHANNEL + 1, 1 << 30)


class Confinement:
    """What the candidates of a worker share, one after another: an empty /tmp and the locks, made in advance."""

    def __init__(self) -> None:
        code = seccomp.candidate_filter()
        filter_ = struct.pack("@HP", len(code) // 8, _address(code))
        self._kept = [code, filter_, _OWN_CAPABILITIES, _NO_CAPABILITIES]  # the lines below hold addresses only
        self._last_locks = [
            (_CAPSET, _address(_OWN_CAPABILITIES), _address(_NO_CAPABILITIES), 0, 0),
            (_SECCOMP, 1, 0, _address(filter_), 0),
        ]
        _prctl(_SET_NO_NEW_PRIVS, 1)
        set_fixed_limits()
        self._mount_tmp()

    def _mount_tmp(self) -> None:
        """An empty /tmp as working directory, not to be told from one made for the next candidate alone."""
        options = f"size={TMPFS_BYTES},nr_inodes=1024,mode=0700,uid={NOBODY},gid={NOBODY}"
        _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC | _NOATIME, options)
        os.chdir("/tmp")
        self._untouched = _time_of_change()
        while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= self._untouched:
            time.sleep(0.001)  # a change within the tick of the making would not show
        self._ruleset = _landlock_ruleset()
        landlock = [(_RESTRICT_SELF, self._ruleset, 0, 0, 0)] if self._ruleset >= 0 else []
        self._locks = landlock + self._last_locks

    def renew(self) -> None:
        """Replace a /tmp that is not as it was made. Call it between candidates, when none is alive."""
        if _time_of_change() == self._untouched:
            return
        os.chdir("/")
        _call("umount2", b"/tmp", _DETACH)
        if self._ruleset >= 0:
            os.close(self._ruleset)
        self._mount_tmp()

    def fork(self) -> int:
        """Like os.fork. The parent is process 1 of their PID namespace, so the kernel ignores what signals the child
        may send it; and a child that can make no process, as seccomp sees to, needs no namespace of its own."""
        return os.fork()

    def lock_in(self, channel: int) -> int:
        """In the candidate: no other descriptor, no capability, files by Landlock, system calls by seccomp.

        Returns the descriptor that `channel` has from now on.
        """
        for number, *arguments in self._locks:
            if _syscall(number, *arguments) < 0:
                error = ctypes.get_errno()
                raise OSError(error, f"system call {number}: {os.strerror(error)}")
        keep_only(channel)
        return CHANNEL

    def end(self, pid: int) -> int:
        """Kill a candidate with its threads; its wait status, once all are gone."""
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]


_OWN_CAPABILITIES, _NO_CAPABILITIES = struct.pack("<Ii", 0x20080522, 0), bytes(24)


def _time_of_change() -> int:
    """Of /tmp: another one once anything was made, removed or changed there, and nobody can set it back."""
    return os.stat("/tmp").st_ctime_ns


def _address(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


# --- Landlock: reading everywhere in the root, writing in /tmp; nothing where the kernel has no Landlock ---------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_READ = 0b1100  # read a file, list a folder
_WRITE_FILE = 0b10


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def _landlock_ruleset() -> int:
    """A descriptor of the rules, -1 where the kernel has no Landlock."""
    version = landlock_version()
    if not version:
        return -1
    rights = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    attributes = struct.pack("<Q", rights)
    if version >= 4:
        attributes += struct.pack("<Q", 0b11)  # bind and connect TCP
    if version >= 6:
        attributes += struct.pack("<Q", 0b11)  # abstract unix sockets, signals to the outside
    ruleset = _call("syscall", _CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    for place, granted in (("/", _READ), ("/dev", _READ | _WRITE_FILE), ("/tmp", rights)):
        fd = os.open(place, os.O_PATH)
        _call("syscall", _ADD_RULE, ruleset, 1, struct.pack("<Qi", granted, fd), 0)
        os.close(fd)
    return ruleset
