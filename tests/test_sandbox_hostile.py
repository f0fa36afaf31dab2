"""Hostile programs: none gets out, none is judged passed, and the harness goes on, in every confinement there is.

Each attack runs against a test that the honest `def f(x): return x * x` passes. An attack that tries to reach outside
also tries to tell through the files it would write, looked for afterwards.
"""

# ruff: noqa: E501  (programs read best on one line)
from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from test_sandbox import CONFINED, MODES, judge

from qwen_eval.sandbox import Program, pool, run_programs

TEST = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(5) == 25\n"

# What wins only when it gets past the judge.
FORGERIES = {
    "os._exit(0) at once": "import os\nos._exit(0)",
    "os._exit(0) when called": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "sys.exit at once": "raise SystemExit(0)",
    "an always-equal object": "class A:\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
    "    __bool__ = lambda s: True\ndef f(x): return A()",
    "an always-equal int": "class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
    "def f(x): return A(1)",
    "an always-equal str": "class A(str):\n    __eq__ = lambda s, o: True\ndef f(x): return A('')",
    "an always-equal class": "class M(type):\n    __eq__ = lambda s, o: True\n    __hash__ = type.__hash__\n"
    "class A(metaclass=M): pass\ndef f(x): return A",
    "a lying __class__": "class A:\n    __class__ = int\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "an always-equal float": "class A(float):\n    __eq__ = lambda s, o: True\ndef f(x): return [A(0)][0]",
    "a stack-frame walk": "import sys\nneedle = ''.join(reversed(' == )3(etadidnac'))\ndef f(x):\n"
    "    frame = sys._getframe()\n    while frame:\n"
    "        for value in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]:\n"
    "            if isinstance(value, str) and value is not needle and needle in value: return x * x\n"
    "        frame = frame.f_back\n    return 0",
    "a heap walk": "import gc\nneedle = ''.join(reversed(' == )3(etadidnac'))\ndef f(x):\n"
    "    for o in gc.get_objects():\n"
    "        if isinstance(o, (list, tuple)) and any(type(i) is str and needle in i for i in o): return x * x\n"
    "    return 0",
    "builtins": "import builtins\nbuiltins.AssertionError = type('N', (BaseException,), {})\n"
    "builtins.abs = builtins.isinstance = lambda *a: True\ndef f(x): return 0",
    "int.__eq__ by ctypes": "import ctypes\nctypes.pythonapi.Py_IncRef(ctypes.py_object(9))\n"
    "ctypes.memmove(id(9) + 24, (8).to_bytes(4, 'little'), 4)\ndef f(x): return 8",
    "its own check": "def check(candidate): pass\ndef f(x): return 0",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0",
    "a tracer": "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return 0",
    "an exception hook": "import sys\nsys.excepthook = lambda *a: None\ndef f(x): raise ValueError",
    "AssertionError turned": "def f(x): raise StopIteration",
    "a thread that answers": "import os, threading, time\ndef spam():\n    while True:\n"
    "        os.write(3, b'\\x00\\x00\\x00\\x10[\"\",\"ok\",9,null]')\nthreading.Thread(target=spam, daemon=True).start()\n"
    "def f(x): return 0",
    "a forged frame before the question": "import os, json\nb = json.dumps(['', 'ok', 9, None]).encode()\n"
    "os.write(3, len(b).to_bytes(4, 'big') + b)\ndef f(x): return 0",
    "a result for another call": "import json, sys\nfrom qwen_eval.sandbox import candidate\nseen = []\n"
    "real = candidate.send_frame\ndef late(fd, m, *a):\n    seen.append(m)\n"
    "    real(fd, [seen[1][0], 'ok', 25, None] if len(seen) > 2 else m)\n"
    "candidate.send_frame = late\ndef f(x): return 9",
    "a verdict on every descriptor": "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'[\"passed\", 0.1]\\n' * 9)\n"
    "    except OSError: pass\ndef f(x): return 0",
    "a damaged frame": "import os\nos.write(3, b'\\x00\\x00\\x00\\x02{]')\ndef f(x): return 9",
    "a frame of 4 GiB": "import os\nos.write(3, b'\\xff\\xff\\xff\\xff')\ndef f(x): return 9",
    "a deep answer": "def f(x):\n    r = []\n    for _ in range(100000): r = [r]\n    return r",
    "a deep frame": "import os\nb = b'[' * 100000\nos.write(3, len(b).to_bytes(4, 'big') + b)\ndef f(x): return 9",
    "a closed channel": "import os\nos.closerange(0, 99)\ndef f(x): return 9",
    "an unknown tag": "from qwen_eval.sandbox import candidate\n"
    "candidate.pack = lambda v, e: {'__reduce__': ['os.system', 'true']}\ndef f(x): return 9",
    "a handle never given": "from qwen_eval.sandbox import candidate\ncandidate.pack = lambda v, e: {'h': 10**6}\n"
    "def f(x): return 9",
    "numbers that collide": "def f(x): return {n * (2**61 - 1) for n in range(60000)}",
    "SIGKILL to all": "import os\nos.kill(-1, 9)\ndef f(x): return 0",
    "a loop that ignores signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass",
    "an output flood": "import sys\ndef f(x):\n    while True: print('x' * 65536); sys.stderr.write('y' * 65536)",
    "an answer flood": "def f(x): return 'x' * (100 << 20)",
    "a memory bomb": "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 24))",
    "a disk bomb": "def f(x):\n    for n in range(10**6):\n        with open(str(n), 'wb') as g: g.write(bytes(1 << 20))",
    "a fork bomb": "import os\nwhile True:\n    os.fork()",
    "source too deep to compile": "x = " + "-" * 20000 + "1\ndef f(x): return x * x",
    "a long source that does not parse": "def f(x): return x * x\n" + "(" * 100000,
    "source with a lone surrogate": "def f(x): return x * x\ny = '\ud800'",
    "a thread bomb": "import threading, time\ndef f(x):\n    while True:\n"
    "        threading.Thread(target=time.sleep, args=(60,)).start()",
}  # fmt: skip


@pytest.mark.parametrize("mode", CONFINED)
def test_no_forgery_passes_and_the_next_program_is_judged_right(mode: str) -> None:
    honest = Program("honest", "def f(x): return x * x", TEST, "f")
    programs = [p for name, text in FORGERIES.items() for p in (Program(name, text, TEST, "f"), honest)]
    verdicts = run_programs(programs, 1.0, mode=mode, memory_bytes=512 << 20)
    assert [p.id for p, v in zip(programs, verdicts) if v.passed and p.id != "honest"] == []
    assert [v for p, v in zip(programs, verdicts) if p.id == "honest" and not v.passed] == []
    wrong = [(p.id, v.reason) for p, v in zip(programs, verdicts) if v.reason.startswith("error")]
    assert wrong == []  # each has a verdict, not a breakdown of the harness
    assert max(v.wall_s for v in verdicts) < 1.8


# Each does what must not work; OSError (and kin) is the refusal.
ESCAPES = {
    "reading the harness": "open(MARK).read()",
    "reading /etc/passwd": "open('/etc/passwd').read()",
    "reading a home folder": "[os.listdir(h) for h in ('/home', '/root/.ssh', '/root/.cache')]",
    "reading its packages": "import pytest",
    "listing /proc": "os.listdir('/proc/1')",
    "the environment of another": "open(f'/proc/{os.getppid()}/environ').read()",
    "its own environment": "os.environ['HOME']",
    "the true environment": "ctypes.c_char_p.in_dll(libc, 'environ').value.decode() or 1 / 0",
    "writing the root": "open('/escaped', 'w')",
    "writing the library": "open(os.__file__, 'a')",
    "writing outside": "open(MARK, 'w')",
    "making the root writable": "check(libc.mount(b'none', b'/', None, 4096 | 32, None))",
    "mounting": "check(libc.mount(b'proc', b'/tmp', b'proc', 0, None))",
    "a new namespace": "check(libc.unshare(0x10000000))",
    "chroot": "os.mkdir('x'); os.chroot('x')",
    "setuid": "os.setuid(0)",
    "TCP": "socket.socket()",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a unix socket": "socket.socket(socket.AF_UNIX)",
    "a netlink socket": "socket.socket(16, socket.SOCK_RAW, 0)",
    "TCP through ctypes": "check(libc.socket(2, 1, 0))",
    "the resolver": "socket.create_connection(('127.0.0.1', PORT), 1)",
    "fork": "os.fork()",
    "posix_spawn": "os.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {})",
    "posix_spawn of python": "os.posix_spawn(PYTHON, ['python', '-c', ''], {})",
    "subprocess": "subprocess.run(['/bin/true'])",
    "execve": "os.execve(PYTHON, ['python', '-c', ''], {})",
    "system through ctypes": "check(libc.system(b'exit 0') and -1)",
    "fork through ctypes": "check(libc.syscall(57))",
    "clone3 through ctypes": "check(libc.syscall(435, bytes(88), 88))",
    "ptrace of the parent": "check(libc.ptrace(16, os.getppid(), 0, 0))",
    "killing the parent": "os.getppid() and os.kill(os.getppid(), 9) or 1 / 0",
    "killing all": "os.kill(-1, 9)",
    "killing the group": "os.killpg(0, 9)",
    "killing by number": "[os.kill(n, 9) for n in range(2, 9)]",
    "signalling a thread of others": "check(libc.syscall(234, 1, 1, 9))",
    "slowing the parent down": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "moving the parent": "os.sched_setaffinity(os.getppid(), {0})",
    "moving itself to another core": "os.sched_setaffinity(0, range(4096))",
    "the parent's scheduling": "os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    "limiting the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
    "the parent's input and output": "check(libc.syscall(251, 1, os.getppid(), 3 << 13))",
    "a symlink outwards": "os.symlink(MARK, 'link'); open('link').read()",
    "a symlink upwards": "os.symlink('../../../..', 'up'); open('up' + MARK).read()",
    "writing through a symlink": "os.symlink(os.__file__, 'lib'); open('lib', 'a')",
    "a hard link": "os.link(os.__file__, 'hard')",
    "a device": "os.mknod('disk', 0o60600, os.makedev(254, 0))",
    "another's descriptor": "[os.fstat(n) for n in range(4, 64)]",
    "a path of a descriptor": "os.open('..', os.O_RDONLY, dir_fd=3)",
    "shared memory": "check(libc.shmget(1, 4096, 0o1600))",
    "a memory file": "os.memfd_create('x')",
    "raising a limit": "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
    "loading a kernel module": "check(libc.syscall(175, b'', 0, b''))",
    "a set-uid file that runs": "open('s', 'w').close(); os.chmod('s', 0o4755); os.execv('s', ['s'])",
}  # fmt: skip

ESCAPE = """
import ctypes, os, resource, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
MARK, PORT, PYTHON = {mark!r}, {port}, {python!r}
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), 'refused')
def f():
    try:
        {action}
    except (OSError, KeyError, ImportError, ValueError, ZeroDivisionError, AttributeError) as error:
        return 'blocked'
    return 'open'
"""


@pytest.mark.parametrize("mode", CONFINED)
def test_nothing_gets_out(mode: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.write_text("untouched")
    server = socket.create_server(("127.0.0.1", 0))
    python = os.path.realpath(sys.executable)
    fill = {"mark": str(mark), "port": server.getsockname()[1], "python": python}
    programs = [
        Program(name, ESCAPE.format(action=action, **fill), "assert f() == 'blocked'\n", "f")
        for name, action in ESCAPES.items()
    ]
    verdicts = run_programs(programs, 5.0, mode=mode)
    assert [(p.id, v.reason) for p, v in zip(programs, verdicts) if not v.passed] == []
    assert mark.read_text() == "untouched"
    server.setblocking(False)
    with server, pytest.raises(BlockingIOError):
        server.accept()


@pytest.mark.parametrize("mode", CONFINED)
def test_nothing_is_left_for_the_next_program(mode: str) -> None:
    leaves = Program("leaves", "import os\nopen('/tmp/note', 'w').close()\nos.umask(0)\ndef f(): return 9", "f()", "f")
    removes = Program("removes", "import os\nos.chdir('/')\ndef f():\n    os.rmdir('/tmp')", "f()", "f")
    finds = Program(
        "finds", "import os\ndef f(): return os.listdir('.'), os.getcwd()", "assert f() == ([], '/tmp')", "f"
    )
    verdicts = run_programs([leaves, finds, removes, finds], mode=mode, workers=1)
    assert [v.passed for v in verdicts] == [True, True, False, True]


# Each leaves a trace in what one worker's programs use in turn; the name says what the next one would see.
TRACES = {
    "a closed folder": "os.chmod('/tmp', 0)",
    "times": "os.utime('/tmp', (1, 1))",
    "a file that was there": "open('f', 'w').close(); os.unlink('f')",
    "an attribute": "try: os.setxattr('/tmp', 'user.note', b'x')\nexcept OSError: os.mkdir('d')",
    "a deep tree": "os.makedirs('a/b/c'); os.chmod('a', 0)",
    "a flag of standard output": "import fcntl; fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)",
    "a limit": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
    "a signal's handling": "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
    "a module": "sys.modules['left'] = sys; math.left = 1; json.left = 1",
}

LOOK = """
import fcntl, json, math, os, resource, signal, sys, time
is_ = os.stat('/tmp')
seen = [
    os.listdir('/tmp'), oct(is_.st_mode), is_.st_nlink, is_.st_size, os.getcwd(), os.getppid(),
    abs(is_.st_mtime - is_.st_ctime) < 0.001, fcntl.fcntl(0, fcntl.F_GETFL), fcntl.fcntl(1, fcntl.F_GETFL),
    resource.getrlimit(resource.RLIMIT_NOFILE), signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN, 'left' in sys.modules,
    hasattr(math, 'left'), hasattr(json, 'left'), os.listxattr('/tmp') if hasattr(os, 'listxattr') else [],
]
def f(): return seen
"""


@pytest.mark.parametrize("mode", CONFINED)
def test_the_next_program_sees_what_the_first_one_saw(mode: str) -> None:
    leaves = [
        Program(n, f"import json, math, os, sys\n{act}\ndef f(): return 9", "f()", "f") for n, act in TRACES.items()
    ]
    first = "assert f()[:4] == [[], '0o40700', 2, 40] and f()[4:6] == ['/tmp', 1] and f()[11:] == [False] * 3 + [[]]"
    flags = "assert [n & 0o6003 for n in f()[7:9]] == [2, 2] and f()[9] == (64, 64) and f()[10]"
    looks = Program("looks", LOOK, f"{first}\n{flags}\nassert f()[6]\n", "f")
    programs = [looks, *(p for leave in leaves for p in (leave, looks))]
    verdicts = run_programs(programs, mode=mode, workers=1)
    assert [
        (programs[i - 1].id, p.id, v.reason) for i, (p, v) in enumerate(zip(programs, verdicts)) if not v.passed
    ] == []


@pytest.mark.parametrize("mode", CONFINED)
def test_no_process_or_thread_outlives_its_verdict(mode: str) -> None:
    busy = (
        "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()\ndef f(): return 1"
    )
    assert judge("def f(): return 1", "assert f() == 1", mode, workers=1).passed
    worker = pool._idle[(os.getpid(), mode)][-1]  # type: ignore[index]
    before = descendants(worker.zygote.pid)
    assert judge(busy, "assert f() == 1", mode, workers=1).passed  # a right answer, whatever else runs beside
    assert descendants(worker.zygote.pid) == before
    assert all(len(os.listdir(f"/proc/{pid}/task")) == 1 for pid in before)


@pytest.mark.parametrize("mode", CONFINED)
def test_no_signal_reaches_the_parent(mode: str) -> None:
    """The kernel itself sends one when the channel has something to read, to whom its reader names: process 1 here,
    which every signal passes by that it has no handler for."""
    numbers = [n for n in range(1, 65) if n not in (32, 33)]
    sends = f"""import fcntl, os
numbers = iter({numbers})
def f():
    for number in numbers:
        fcntl.fcntl(3, 10, number)  # F_SETSIG
        fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())
        fcntl.fcntl(3, fcntl.F_SETFL, fcntl.fcntl(3, fcntl.F_GETFL) | os.O_ASYNC)
        return fcntl.fcntl(3, fcntl.F_GETOWN)
"""
    assert judge("def f(): return 1", "assert f() == 1", mode, workers=1).passed
    worker = pool._idle[(os.getpid(), mode)][-1]  # type: ignore[index]
    before = descendants(worker.zygote.pid)
    verdict = judge(sends, f"for _ in range({len(numbers)}):\n    assert f() == 1\n", mode, timeout_s=20.0, workers=1)
    assert verdict.passed, verdict.reason  # each was asked for
    assert worker.is_open
    assert descendants(worker.zygote.pid) == before


def descendants(pid: int) -> list[int]:
    children = [int(n) for t in Path(f"/proc/{pid}/task").iterdir() for n in (t / "children").read_text().split()]
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_zygote_or_judge_is_replaced(mode: str) -> None:
    program = Program("one", "def f(): return 1", "assert f() == 1", "f")
    run_programs([program], mode=mode, workers=1)
    for victim in ("zygote", "judge"):
        worker = pool._idle[(os.getpid(), mode)][-1]  # type: ignore[index]
        process = getattr(worker, victim)
        process.kill()
        process.wait()
        assert [v.passed for v in run_programs([program] * 3, mode=mode, workers=1)] == [True] * 3
