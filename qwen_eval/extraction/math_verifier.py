"""math-verify in a process of its own, because a comparison has to be stopped and sympy can hang in C.

`verifier.same` asks; `python -m qwen_eval.extraction.math_verifier` answers: it reads `[gold, answer]` lines and writes
`true` or `false` lines. math-verify parses LaTeX with a grammar; nothing of the text is evaluated as code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import subprocess
import sys
import threading
import time

from qwen_eval.core import QwenEvalError

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 5.0  # of one question, ten times what real answers take; a busy machine does not change who is stopped
TIME_LIMIT_S = 45.0  # of one question on the clock, for a process that gets hardly any processor
START_LIMIT_S = 120.0  # importing sympy takes seconds on a busy machine
ATTEMPTS = 2
TOLERANCE = 1e-6  # relative: 1.414214 passes for the square root of 2, 1/2^98 never for 1/2^99
READY = "ready"


class ComparisonStopped(Exception):
    """No answer: the comparison took too long, or its process was killed at each attempt."""


class Verifier:
    """One line of JSON a question. A process that is stopped for its time is not asked again, and the next one starts
    at once, beside what the caller does. A process that someone else killed (out of memory) is asked once more.

    A question holds its caller for at most `limit_s`, and for the start of the process before it.
    """

    def __init__(self, limit_s: float = TIME_LIMIT_S, cpu_s: float = CPU_SECONDS) -> None:
        self._limit_s, self._cpu_s = limit_s, cpu_s
        self._process: subprocess.Popen[str] | None = None
        self._is_ready = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Of the process that compares; started if it does not run."""
        return self._running().pid

    def same(self, answer: str, gold: str) -> bool:
        """Whether both mean the same. ComparisonStopped where that was not found out."""
        question = json.dumps([gold, answer])
        with self._lock:
            left_s = self._limit_s
            try:
                for _ in range(ATTEMPTS):
                    process, begin = self._running(), time.monotonic()
                    if reply := _asked(process, question, left_s):
                        return reply == "true"
                    left_s -= time.monotonic() - begin
                    self._start_anew()
                    if process.returncode == -signal.SIGPROF or left_s <= 0:
                        break
            except BaseException:  # interrupted: its answer to this question must not be read as one to the next
                self._stop()
                raise
            raise ComparisonStopped(question)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()  # a dead process that nobody waited for still looks alive

    def _start_anew(self) -> None:
        self._stop()
        self._start()

    def _start(self) -> subprocess.Popen[str]:
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._cpu_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        return self._process

    def _running(self) -> subprocess.Popen[str]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        if not self._is_ready:
            if _line(process, START_LIMIT_S) != READY:
                self._stop()
                raise QwenEvalError(
                    f"math-verify did not start within {START_LIMIT_S:.0f} s; see what "
                    f"`python -m {__name__} < /dev/null` says, and run the same command again"
                )
            self._is_ready = True
        return process


def _asked(process: subprocess.Popen[str], question: str, limit_s: float) -> str:
    """The process's line; "" when it died or was killed for being late."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, OSError):
        process.stdin.write(question + "\n")
        process.stdin.flush()
    return _line(process, limit_s)


def _line(process: subprocess.Popen[str], limit_s: float) -> str:
    """The next line; the process is killed where there is none in time."""
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    assert process.stdout is not None
    try:
        return process.stdout.readline().strip()
    finally:
        timer.cancel()


verifier = Verifier()


# --- the process ----------------------------------------------------------------------------------------------------


def is_same(gold: str, answer: str) -> bool:
    """Without a time limit of its own: `main` stops the process."""
    from math_verify import parse, verify

    try:
        golds, answers = (parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in (gold, answer))
        # either may be the inequality of the other's interval; math-verify turns only its first argument into a set
        pairs = ((golds, answers), (answers, golds)) if golds and answers else ()
        if not any(verify(*pair, timeout_seconds=0) for pair in pairs):
            return False
        return _is_close(golds[0], answers[0])
    except Exception:  # whatever sympy trips over: answers that cannot be compared are not the same
        return False


def _is_close(gold: object, answer: object) -> bool:
    """Whether two numbers agree relative to their size; math-verify rounds to six decimals. True for anything else."""
    import sympy

    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr) and gold.is_number and answer.is_number):
        return True
    return bool(abs(sympy.N(gold - answer, 30)) <= TOLERANCE * abs(sympy.N(gold, 30)))


def main(cpu_seconds: float = CPU_SECONDS) -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (the import takes seconds: it must not count against the first question)

    print(READY, flush=True)
    for line in sys.stdin:
        question: tuple[str, str] = json.loads(line)
        gold, answer = question
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends the process, in the midst of C code too
        reply = is_same(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
