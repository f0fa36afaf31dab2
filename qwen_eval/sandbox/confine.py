"""Linux confinement through libc: namespaces, a read-only root, capabilities, rlimits, Landlock, the seccomp filter.

Three steps, each one way:
  `build_root`    a mount namespace whose root holds only what Python needs, read-only; no network, no /proc, no /sys
  `enter_cell`    an unprivileged user in a user namespace of its own, able to make one PID namespace per candidate
  `lock_down`     in the candidate: its own tmpfs, no capability, limits, Landlock, seccomp
Every failure raises OSError: nothing runs half confined. Runs inside the sandbox: standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Sequence
from dataclasses import dataclass

NOBODY = 65534
TMPFS_BYTES = 16 << 20

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_KEPT_FLAGS = _RDONLY | _NOSUID | _NODEV | _NOEXEC | 1024 | 2048 | (1 << 21)  # with noatime, nodiratime, relatime
_DETACH = 2
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SIGKILL = 9
_CAP_SYS_ADMIN = 1 << 21

_libc = ctypes.CDLL(None, use_errno=True)
_outer_ids = os.getuid(), os.getgid()  # as the namespace around sees them


@dataclass(frozen=True)
class Limits:
    """What one candidate may use. `memory_bytes` is its address space."""

    cpu_s: int
    memory_bytes: int
    file_bytes: int = TMPFS_BYTES
    num_files: int = 64
    num_tasks: int = 32  # threads, with the two processes that keep the cell


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


@dataclass(frozen=True)
class Tree:
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
    _call("syscall", *_pivot_root(b"/tmp", b"/tmp/.host"))
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


def _pivot_root(new: bytes, old: bytes) -> tuple[object, ...]:
    number = 155 if os.uname().machine == "x86_64" else 41
    return ctypes.c_long(number), ctypes.c_char_p(new), ctypes.c_char_p(old)


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


def enter_cell(proc_fd: int) -> int:
    """Become nobody, first process of a new PID namespace; return a descriptor of that namespace.

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
    _prctl(_SET_PDEATHSIG, _SIGKILL)
    own = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc_fd)
    os.close(proc_fd)
    _prctl(_SET_DUMPABLE, 0)
    return own


def fork_candidate(own_pid_namespace: int) -> int:
    """Like os.fork; the child is process 1 of a PID namespace of its own, which dies with it."""
    _call("unshare", _NEWPID)
    pid = os.fork()
    if pid:
        _call("setns", own_pid_namespace, _NEWPID)
    return pid


# --- the candidate -------------------------------------------------------------------------------------------------


def own_tmpfs() -> None:
    """A fresh, small, private /tmp as working directory; gone with the last process that sees it."""
    _call("unshare", _NEWNS)
    options = f"size={TMPFS_BYTES},nr_inodes=1024,mode=0700,uid={NOBODY},gid={NOBODY}"
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)
    os.chdir("/tmp")


def set_limits(limits: Limits) -> None:
    for name, value in (
        ("CPU", limits.cpu_s),
        ("AS", limits.memory_bytes),
        ("FSIZE", limits.file_bytes),
        ("NOFILE", limits.num_files),
        ("NPROC", limits.num_tasks),
        ("CORE", 0),
        ("MSGQUEUE", 0),
        ("MEMLOCK", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_privileges(seccomp_filter: bytes) -> None:
    """No capability, none to be had again, files by Landlock, system calls by `seccomp_filter`. The last step."""
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _restrict_files()
    header, nothing = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    _call("capset", header, nothing)
    program = struct.pack("@HP", len(seccomp_filter) // 8, _address(seccomp_filter))
    _prctl(_SET_SECCOMP, 2, program)


def _address(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


# --- Landlock: reading everywhere in the root, writing in /tmp; nothing where the kernel has no Landlock ---------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_READ = 0b1100  # read a file, list a folder
_WRITE_FILE = 0b10


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def _restrict_files() -> None:
    version = landlock_version()
    if not version:
        return
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
    _call("syscall", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
