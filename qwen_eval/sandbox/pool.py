"""`run_programs`: warm workers, one program at a time each, verdicts in order."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from qwen_eval.sandbox.launch import RealMode, Worker, WorkerLost, is_possible, start_worker
from qwen_eval.sandbox.program import Mode, Program, SandboxError, Verdict

MEMORY_BYTES = 1 << 30
TRIES_ALONE = 3

_lock = threading.Lock()
_idle: dict[tuple[int, RealMode], list[Worker]] = {}  # by process: a fork of the harness must not share workers
_busy: Counter[int] = Counter()  # workers taken, by core


def resolve_mode(mode: Mode) -> RealMode:
    """The confinement `mode` means here, proven by a worker. Raises SandboxError, never falls to "unsafe"."""
    if mode == "unsafe":
        return mode
    if not is_possible():
        raise SandboxError(
            f"sandbox={mode}: generated programs are confined on Linux (x86_64, aarch64) only; {_WAY_OUT}"
        )
    if mode != "auto":
        _give_back(_take(mode))
        return mode
    reasons = []
    wanted: tuple[RealMode, ...] = ("bubblewrap", "namespaces") if shutil.which("bwrap") else ("namespaces",)
    for name in wanted:
        try:
            _give_back(_take(name))
            return name
        except SandboxError as error:
            reasons.append(str(error))
    raise SandboxError(f"generated programs cannot be confined here ({'; '.join(reasons)}); {_WAY_OUT}")


_WAY_OUT = "sandbox=unsafe runs them unconfined, as you"


def run_confined(
    programs: Sequence[Program], timeout_s: float, mode: RealMode, workers: int | None, memory_bytes: int
) -> list[Verdict]:
    """`run_programs` without the self-test."""
    verdicts: list[Verdict | None] = [None] * len(programs)
    pending: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(programs)):
        pending.put(index)

    def work() -> None:
        worker = _take(mode)
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {worker.core})  # this thread's, which else waits for cores that others keep
            while (index := _next(pending)) is not None:
                if not worker.is_open:
                    worker = start_worker(mode)  # on this thread's core
                with contextlib.suppress(WorkerLost):
                    verdicts[index] = worker.run(programs[index], timeout_s, memory_bytes)
        finally:
            _give_back(worker)

    count = min(workers or _num_cores(), len(programs))
    with ThreadPoolExecutor(max_workers=max(1, count)) as threads:
        futures = [threads.submit(work) for _ in range(count)]
        try:
            for future in futures:
                with contextlib.suppress(SandboxError):  # no worker to be had: others may do its work
                    future.result()
        except BaseException:
            while _next(pending) is not None:
                pass
            raise
    return [
        verdict or _judge_alone(program, timeout_s, mode, memory_bytes) for program, verdict in zip(programs, verdicts)
    ]


def _next(pending: queue.SimpleQueue[int]) -> int | None:
    try:
        return pending.get_nowait()
    except queue.Empty:
        return None


def _judge_alone(program: Program, timeout_s: float, mode: RealMode, memory_bytes: int) -> Verdict:
    """Judge one whose worker was lost, in fresh workers with no program beside it: it need not be the culprit.

    It is where it ends each of them and nobody else can have. Raises SandboxError where somebody else did.
    """
    num_kills = _num_kernel_kills()
    for _ in range(TRIES_ALONE):
        worker = start_worker(mode)
        try:
            return worker.run(program, timeout_s, memory_bytes)
        except WorkerLost as error:
            lost = error
        finally:
            worker.close()
    if lost.is_outside or _num_kernel_kills() > num_kills:
        raise SandboxError(
            f"sandbox={mode}: a process of the sandbox was killed from outside each time it judged {program.id}; "
            "where memory is short, free some (a program may use 1 GiB, the judge beside it as much)"
        )
    return Verdict(False, lost.reason, 0.0)


def _num_kernel_kills() -> int:
    """How many processes the kernel has killed for memory since the machine started; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _take(mode: RealMode) -> Worker:
    with _lock:
        idle = _idle.get((os.getpid(), mode))
        if idle:
            worker = min(idle, key=lambda worker: _busy[worker.core])
            idle.remove(worker)
            _busy[worker.core] += 1
            return worker
    worker = start_worker(mode)
    with _lock:
        _busy[worker.core] += 1
    return worker


def _give_back(worker: Worker) -> None:
    with _lock:
        _busy[worker.core] -= 1
        if worker.is_open:
            _idle.setdefault((os.getpid(), worker.mode), []).append(worker)


@atexit.register
def close_workers() -> None:
    """End this process's idle workers."""
    with _lock:
        mine = [key for key in _idle if key[0] == os.getpid()]
        workers = [worker for key in mine for worker in _idle.pop(key)]
    for worker in workers:
        worker.close()
