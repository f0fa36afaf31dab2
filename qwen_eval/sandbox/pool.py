"""`run_programs`: warm workers, one program at a time each, verdicts in order."""

from __future__ import annotations

import atexit
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from qwen_eval.sandbox.launch import RealMode, Worker, WorkerLost, is_possible
from qwen_eval.sandbox.program import Mode, Program, SandboxError, Verdict

MEMORY_BYTES = 1 << 30

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
            while True:
                try:
                    index = pending.get_nowait()
                except queue.Empty:
                    return
                if not worker.is_open:
                    worker = Worker(mode)  # on this thread's core
                worker, verdicts[index] = _judge(worker, programs[index], timeout_s, memory_bytes)
        finally:
            _give_back(worker)

    count = min(workers or _num_cores(), len(programs))
    with ThreadPoolExecutor(max_workers=max(1, count)) as threads:
        for future in [threads.submit(work) for _ in range(count)]:
            future.result()
    return [verdict for verdict in verdicts if verdict is not None]


def _judge(worker: Worker, program: Program, timeout_s: float, memory_bytes: int) -> tuple[Worker, Verdict]:
    """A worker that was lost is replaced, and the program judged once more: it need not be the culprit."""
    for _ in range(2):
        try:
            return worker, worker.run(program, timeout_s, memory_bytes)
        except WorkerLost:
            worker = Worker(worker.mode)
    return worker, Verdict(False, "error: the sandbox worker died twice on this program", 0.0)


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
    worker = Worker(mode)
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
