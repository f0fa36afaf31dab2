"""Memory and kills: a judge stays within its limit, and a kill from outside never counts against a program."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from test_sandbox import CONFINED, MODES
from test_sandbox_hostile import descendants

from qwen_eval.sandbox import Program, SandboxError, pool, run_programs

ONE = Program("one", "def f(): return 1", "assert f() == 1", "f")
SLOW = Program("slow", "import time\ndef f():\n    time.sleep(0.6)\n    return 1", "assert f() == 1", "f")
TEST_THAT_CATCHES = "try:\n    assert f() == 1\nexcept Exception:\n    raise AssertionError from None"
GIB = 1 << 30


def only_worker(mode: str) -> pool.Worker:
    """The worker that the next program gets."""
    pool.close_workers()
    run_programs([ONE], mode=mode, workers=1)  # type: ignore[arg-type]
    [worker] = pool._idle[(os.getpid(), mode)]  # type: ignore[index]
    return worker


def kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


@contextlib.contextmanager
def beside(step: Callable[[], object]) -> Iterator[None]:
    """`step` again and again in a thread, until it returns something true or the block ends."""
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set() and not step():
            time.sleep(0.001)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def children() -> list[int]:
    mine = set(_descendants(os.getpid()))
    deeper = {pid for child in mine for pid in _descendants(child)}
    return sorted(mine - deeper)


def _descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return descendants(pid)
    return []


def is_judge(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as said:
        return "sandbox.judge" in said.read()
    return False


# --- killed from outside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", ["judge", "zygote", "outer zygote", "candidate"])
def test_a_program_whose_worker_is_killed_in_the_middle_is_judged_again(mode: str, victim: str) -> None:
    worker = only_worker(mode)
    idle = [worker.zygote.pid, *descendants(worker.zygote.pid)]
    killed = []

    def kill_it() -> bool:
        running = [pid for pid in _descendants(worker.zygote.pid) if pid not in idle]
        if not running:
            return False
        time.sleep(0.1)
        pids = {"judge": worker.judge.pid, "zygote": idle[-1], "outer zygote": idle[0], "candidate": running[0]}
        killed.append(kill(pids[victim]))
        return True

    catches = replace(SLOW, id="catches", test=TEST_THAT_CATCHES)
    with beside(kill_it):
        verdicts = run_programs([catches, ONE, ONE], 10.0, mode=mode, workers=1)  # type: ignore[arg-type]
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 3
    assert killed == [True]


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_that_is_killed_while_it_starts_is_started_again(mode: str) -> None:
    run_programs([ONE], mode=mode, workers=1)  # type: ignore[arg-type]
    pool.close_workers()
    killed: list[int] = []

    def kill_a_judge() -> bool:
        killed.extend(pid for pid in children() if pid not in killed and is_judge(pid) and kill(pid))
        return len(killed) >= 2

    with beside(kill_a_judge):
        verdicts = run_programs([ONE] * 5, 10.0, mode=mode, workers=1)  # type: ignore[arg-type]
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 5
    assert len(killed) == 2


@pytest.mark.parametrize("mode", CONFINED)
def test_where_every_worker_is_killed_no_program_fails_but_the_sandbox(mode: str) -> None:
    run_programs([ONE], mode=mode, workers=1)  # type: ignore[arg-type]
    pool.close_workers()
    others = set(children())

    def kill_all() -> None:
        for pid in set(children()) - others:
            kill(pid)

    with beside(kill_all), pytest.raises(SandboxError, match="killed from outside"):
        run_programs([SLOW], 10.0, mode=mode, workers=1)  # type: ignore[arg-type]
    assert run_programs([ONE], mode=mode, workers=1)[0].passed  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_a_program_that_kills_itself_fails_by_it(mode: str) -> None:
    at_once = Program("at once", "import signal\nsignal.raise_signal(9)", "f()", "f")
    called = Program("called", "import signal\ndef f(): signal.raise_signal(9)", "try: f()\nexcept: pass\n", "f")
    verdicts = run_programs([at_once, ONE, called, ONE], 10.0, mode=mode)  # type: ignore[arg-type]
    assert [verdict.reason for verdict in verdicts] == ["killed: SIGKILL", "passed", "killed: SIGKILL", "passed"]


def test_the_kernels_count_of_kills_is_read() -> None:
    with open("/proc/vmstat") as lines:
        [said] = [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    assert pool._num_kernel_kills() >= said


# --- memory ----------------------------------------------------------------------------------------------------------

# Each has its answers take the judge's memory, not the candidate's.
BOMBS = {
    "a set of a range": ("def f(): return range(10**15)", "assert set(f()) == {1}"),
    "answers kept": ("def f(): return 'x' * (8 << 20)", "kept = [f() for _ in range(10**6)]"),
    "lists in a list": ("def f(): return [[] for _ in range(5 << 20)]", "kept = [f() for _ in range(10**6)]"),
    "a huge number": ("def f(): return 1 << (50 << 20)", "kept = 1\nfor _ in range(10**6): kept *= f()"),
    "a decimal": ("from decimal import Decimal\ndef f(): return Decimal('1e99999999999')", "assert int(f()) == 1"),
}
BOMBED = """
import json, pathlib, resource, sys
sys.path.insert(0, {path!r})
from test_sandbox_killed import BOMBS, ONE
from qwen_eval.sandbox import Program, pool, run_programs
bombs = [Program(name, solution, test, "f") for name, (solution, test) in BOMBS.items()]
verdicts = run_programs([p for bomb in bombs for p in (bomb, ONE)], 1.0, mode={mode!r}, workers=1)
pool.close_workers()
# ru_maxrss of a process counts what its parent held before the exec: this process asks the kernel for its own peak
status = pathlib.Path("/proc/self/status").read_text()
own = int(status.partition("VmHWM:")[2].split()[0]) << 10
peaks = [own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10]
print(json.dumps([[verdict.reason for verdict in verdicts], peaks]))
"""


@pytest.mark.parametrize("mode", MODES[:1])
def test_five_bombs_take_no_more_than_a_gibibyte_of_the_judge(mode: str) -> None:
    code = BOMBED.format(path=os.path.dirname(__file__), mode=mode)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    reasons, (of_harness, of_workers) = json.loads(done.stdout)
    assert reasons[1::2] == ["passed"] * len(BOMBS)
    assert [reason for reason in reasons[::2] if reason not in ("memory", "timed out")] == []
    assert "memory" in reasons[::2]
    assert of_workers <= GIB  # judges and candidates, the largest of them
    assert of_harness < GIB // 4


def test_what_earlier_programs_left_in_a_judge_does_not_count_against_the_next() -> None:
    hoards = Program("hoards", "def f(): return 1", "import builtins\nbuiltins.hoard = bytearray(700 << 20)", "f")
    needs = Program("needs", "def f(): return 1", "kept = bytearray(500 << 20)\nassert f() == 1", "f")
    verdicts = run_programs([hoards, needs, needs], 20.0, mode="unsafe", workers=1)
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 3
