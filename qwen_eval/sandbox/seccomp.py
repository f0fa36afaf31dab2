"""A system call filter for one candidate: what a computation never needs is refused with EPERM.

Classic BPF written by hand, so that nothing has to be installed. Threads are allowed, processes are not: `clone` passes
only with CLONE_THREAD, and `clone3`, whose flags a filter cannot see, answers ENOSYS: libc falls back to `clone`.
Runs inside the sandbox: standard library alone.
"""

from __future__ import annotations

import errno
import platform
import struct

# name: (x86_64, aarch64); None where the architecture has no such call
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network and other ways to talk
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117), "kcmp": (312, 272),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    # the shape of the sandbox
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "mknod": (133, None), "mknodat": (259, 33),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
    # identity
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159), "setfsuid": (122, 151),
    "setfsgid": (123, 152), "capset": (126, 91), "personality": (135, 92),
    # memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # the kernel's wider surface
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "fanotify_init": (300, 262),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "lookup_dcookie": (212, 18), "uselib": (134, None),
    "sysfs": (139, None), "nfsservctl": (180, 42),
}  # fmt: skip

_CLONE = (56, 220)
_TGKILL = (234, 131)
_PRLIMIT = (302, 261)
_CLONE3 = 435
_AFTER_LAST = 470  # calls newer than this list are not there: ENOSYS
_CLONE_THREAD = 0x00010000

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW = 0x7FFF0000
_KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_ERRNO = 0x00050000

# BPF opcodes: ld abs, ld imm, ld mem, st, tax, and k, lsh x, rsh k, jeq, jge, jset, ret
_LOAD, _SET, _RECALL, _STORE, _TO_X, _AND, _SHIFT_BY_X, _SHIFT = 0x20, 0x00, 0x60, 0x02, 0x07, 0x54, 0x6C, 0x74
_EQUAL, _AT_LEAST, _BITS, _RETURN = 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian


def is_supported(machine: str = platform.machine()) -> bool:
    return machine in _AUDIT_ARCH


def candidate_filter(machine: str = platform.machine()) -> bytes:
    """The program (an array of struct sock_filter) for a candidate whose parent, process 1, is the only other one."""
    column = 0 if machine == "x86_64" else 1
    refuse, missing = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    lines = [
        _line(_LOAD, _ARCH), _line(_EQUAL, _AUDIT_ARCH[machine], 1, 0), _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
        # also catches x32, whose numbers carry bit 30
        _line(_AT_LEAST, _AFTER_LAST, 0, 1), _line(_RETURN, missing),
        _line(_EQUAL, _CLONE3, 0, 1), _line(_RETURN, missing),
        _line(_EQUAL, _CLONE[column], 0, 4), _line(_LOAD, _FIRST_ARGUMENT), _line(_BITS, _CLONE_THREAD, 1, 0),
        _line(_RETURN, refuse), _line(_RETURN, _ALLOW),
        _line(_EQUAL, _TGKILL[column], 0, 4), _line(_LOAD, _FIRST_ARGUMENT), _line(_EQUAL, 1, 0, 1),
        _line(_RETURN, refuse), _line(_RETURN, _ALLOW),
        _line(_EQUAL, _PRLIMIT[column], 0, 4), _line(_LOAD, _FIRST_ARGUMENT), _line(_EQUAL, 0, 1, 0),
        _line(_RETURN, refuse), _line(_RETURN, _ALLOW),
    ]  # fmt: skip
    numbers = [numbers[column] for numbers in _REFUSED.values()]
    return b"".join([*lines, *_refuse_all({n for n in numbers if n is not None}, refuse), _line(_RETURN, _ALLOW)])


def _refuse_all(numbers: set[int], refuse: int) -> list[bytes]:
    """`refuse` where the loaded number is one of `numbers`, by a bit in a 32-bit mask for each number // 32.

    A comparison a number would do, at five times the price: each candidate installs the filter anew, and the kernel
    first walks a filter of mere comparisons for every call there is.
    """
    lines = [
        _line(_AND, 31), _line(_TO_X, 0), _line(_SET, 1), _line(_SHIFT_BY_X, 0), _line(_STORE, 0),
        _line(_LOAD, _NUMBER), _line(_SHIFT, 5),
    ]  # fmt: skip
    for word in sorted({number // 32 for number in numbers}):
        mask = sum(1 << number % 32 for number in numbers if number // 32 == word)
        lines += [_line(_EQUAL, word, 0, 4), _line(_RECALL, 0), _line(_BITS, mask, 0, 1), _line(_RETURN, refuse)]
        lines += [_line(_RETURN, _ALLOW)]
    return lines


def _line(opcode: int, operand: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", opcode, skip_if_true, skip_if_false, operand)
