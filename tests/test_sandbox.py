"""The sandbox judges right programs right and wrong ones wrong, in every mode that this machine has."""

from __future__ import annotations

import time

import pytest

from qwen_eval.sandbox import Program, SandboxError, Verdict, run_programs
from qwen_eval.sandbox.pool import resolve_mode


def _has(mode: str) -> bool:
    try:
        resolve_mode(mode)  # type: ignore[arg-type]
    except SandboxError:
        return False
    return True


CONFINED = [mode for mode in ("bubblewrap", "namespaces") if _has(mode)]
MODES = [*CONFINED, "unsafe"]


def judge(
    solution: str, test: str, mode: str = "auto", entry_point: str = "f", prelude: str = "", **options
) -> Verdict:
    [verdict] = run_programs([Program("it", solution, test, entry_point, prelude)], mode=mode, **options)
    return verdict


@pytest.mark.parametrize("mode", MODES)
def test_verdicts_come_in_the_order_of_the_programs(mode: str) -> None:
    programs = [Program(str(n), f"def f():\n    return {n}\n", f"assert f() == {n - n % 3}\n", "f") for n in range(24)]
    verdicts = run_programs(programs, mode=mode)
    assert [verdict.passed for verdict in verdicts] == [n % 3 == 0 for n in range(24)]
    assert verdicts[1].reason == "failed: assert f() == 0"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ("def f(:", "failed: SyntaxError"),
        ("", "failed: NameError: name 'f' is not defined"),
        ("def f():\n    raise KeyError('k')", "failed: KeyError: \"'k'\""),
        ("def f():\n    while True: pass", "timed out"),
        ("while True: pass", "timed out"),
        ("def f():\n    return bytearray(1 << 34)", "memory"),
        ("def f():\n    return 'x' * (20 << 20)", "output"),
    ],
)
def test_the_reason_says_what_went_wrong(mode: str, solution: str, reason: str) -> None:
    verdict = judge(solution, "assert f() == 1\n", mode, timeout_s=1.0)
    assert not verdict.passed
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize("mode", MODES)
def test_the_wall_limit_is_kept(mode: str) -> None:
    run_programs([Program("warm", "", "", "f")], mode=mode)
    start = time.perf_counter()
    assert judge("def f():\n    while True: pass", "f()\n", mode, timeout_s=1.0).reason == "timed out"
    assert 1.0 <= time.perf_counter() - start < 1.6
