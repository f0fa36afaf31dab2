"""Before any score: right programs pass, wrong ones fail, and the confinement holds on this machine, now."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from qwen_eval.sandbox.launch import RealMode
from qwen_eval.sandbox.pool import MEMORY_BYTES, resolve_mode, run_confined
from qwen_eval.sandbox.program import Mode, Program, SandboxError, Verdict

_CHECKED = "def check(candidate):\n    assert candidate([3, 1, 2]) == [1, 2, 3]\n"

_RIGHT = {
    "sorts": ("def solve(xs):\n    return sorted(xs)\n", _CHECKED),
    "in place": ("def solve(xs):\n    xs.sort()\n", "xs = [2, 1]\nsolve(xs)\nassert xs == [1, 2]\n"),
}
_WRONG = {
    "wrong answer": "def solve(xs):\n    return xs\n",
    "leaves": "import os\nos._exit(0)\n",
    "equals everything": (
        "class Any:\n    def __eq__(self, other):\n        return True\ndef solve(xs):\n    return Any()\n"
    ),
    "raises": "def solve(xs):\n    raise AssertionError\n",
}
# Each tries to do one thing and answers "blocked" only when it was stopped.
_PROBES = {
    "network": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a process": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "fork": "import os\nos.fork()",
    "writing outside": "open('/probe', 'w')",
    "the harness's files": "open(HERE)",
    "/proc": "open('/proc/self/status')",
    "/etc/passwd": "open('/etc/passwd')",
    "the environment": "import os\nif not os.environ: raise OSError",
    "a signal to others": "import os\nos.kill(-1, 0)",
}
_PROBE = """
def solve():
    try:
{body}
    except OSError:
        return 'blocked'
    return 'open'
"""

_results: dict[RealMode, dict[str, Any]] = {}
_lock = threading.Lock()


def run_programs(
    programs: Sequence[Program],
    timeout_s: float = 3.0,
    *,
    mode: Mode = "auto",
    workers: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> list[Verdict]:
    """Judge each program; verdicts in the order of `programs`. Nothing a program does raises.

    `timeout_s` is the wall limit of one program with its test. `workers`: one a core. The first call of a process runs
    the self-test. Raises SandboxError where confinement cannot be had and `mode` is not "unsafe".
    """
    if not programs:
        return []
    real = resolve_mode(mode)
    self_test(real)
    return run_confined(programs, timeout_s, real, workers, memory_bytes)


def self_test(mode: Mode = "auto") -> dict[str, Any]:
    """What was tried and found, once a process and mode; raises SandboxError where something is not as it must be.

    In mode "unsafe" only the judging is tested: nothing is blocked there.
    """
    real = resolve_mode(mode)
    with _lock:
        if real not in _results:
            _results[real] = _test(real)
        return _results[real]


def _test(mode: RealMode) -> dict[str, Any]:
    right = [Program(name, solution, test, "solve") for name, (solution, test) in _RIGHT.items()]
    wrong = [Program(name, solution, _CHECKED, "solve") for name, solution in _WRONG.items()]
    probes = [] if mode == "unsafe" else [_probe(name, body) for name, body in _PROBES.items()]
    programs = [*right, *wrong, *probes]
    verdicts = run_confined(programs, 10.0, mode, 1, MEMORY_BYTES)
    wrong_ids = {program.id for program in wrong}
    for program, verdict in zip(programs, verdicts):
        if verdict.passed == (program.id in wrong_ids):
            raise SandboxError(f"sandbox={mode}: the self-test {program.id!r} ended as {verdict.reason!r}")
    return {
        "mode": mode,
        "passed": [program.id for program in right],
        "failed": [program.id for program in wrong],
        "blocked": [program.id for program in probes],
    }


def _probe(name: str, body: str) -> Program:
    indented = "\n".join(" " * 8 + line for line in body.replace("HERE", repr(__file__)).splitlines())
    return Program(name, _PROBE.format(body=indented), "assert solve() == 'blocked'\n", "solve")
