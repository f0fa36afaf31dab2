"""math-verify in a process of its own, because its time limits need the main thread and sympy can hang in C.

`verifier.same` asks; `python -m qwen_eval.extraction.math_verifier` answers: it reads `[gold, answer]` lines and writes
`true` or `false` lines. math-verify parses LaTeX with a grammar; nothing of the text is evaluated as code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import subprocess
import sys
import threading

MEMORY_BYTES = 4 << 30
SECONDS = 5  # of one parse or comparison
TIME_LIMIT_S = 15.0  # of one question: two parses and a comparison, after which the process is killed
START_LIMIT_S = 120.0  # importing sympy takes seconds on a busy machine
TOLERANCE = 1e-6  # relative: 1.414214 passes for the square root of 2, 1/2^98 never for 1/2^99
READY = "ready"


class Verifier:
    """One line of JSON a question. A process that is late is killed, and the answers count as different.

    A process that someone else killed (out of memory) is started again, once a question.
    """

    def __init__(self, limit_s: float = TIME_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Of the process that compares; started if it does not run."""
        return self._running().pid

    def same(self, answer: str, gold: str) -> bool:
        question = json.dumps([gold, answer])
        with self._lock:
            try:
                for _ in range(2):
                    reply, is_late = self._ask(question)
                    if reply or is_late:
                        return reply == "true"
            except BaseException:  # interrupted: its answer to this question must not be read as one to the next
                self._stop()
                raise
            return False

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()  # a dead process that nobody waited for still looks alive

    def _ask(self, question: str) -> tuple[str, bool]:
        """The process's line, "" when it died; and whether it was killed for being late."""
        process = self._running()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, OSError):
            process.stdin.write(question + "\n")
            process.stdin.flush()
        reply, is_late = _line(process, self._limit_s)
        if not reply or is_late:
            self._stop()
        return reply, is_late

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            assert _line(self._process, START_LIMIT_S)[0] == READY, "math-verify did not start"
        return self._process


def _line(process: subprocess.Popen[str], limit_s: float) -> tuple[str, bool]:
    """The next line, and whether there was none because the time was up."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, kill)
    timer.start()
    assert process.stdout is not None
    try:
        return process.stdout.readline().strip(), late.is_set()
    finally:
        timer.cancel()


verifier = Verifier()


# --- the process ----------------------------------------------------------------------------------------------------


def is_same(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    try:
        golds, answers = (parse(f"\\boxed{{{text}}}", parsing_timeout=SECONDS) for text in (gold, answer))
        # either may be the inequality of the other's interval; math-verify turns only its first argument into a set
        pairs = ((golds, answers), (answers, golds)) if golds and answers else ()
        if not any(verify(*pair, timeout_seconds=SECONDS) for pair in pairs):
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


def main() -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (the import takes seconds: it must not count against the first question)

    print(READY, flush=True)
    for line in sys.stdin:
        question: tuple[str, str] = json.loads(line)
        gold, answer = question
        print(json.dumps(is_same(gold, answer)), flush=True)


if __name__ == "__main__":
    main()
