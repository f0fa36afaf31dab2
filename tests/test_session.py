"""A confined Python that keeps its variables between cells: what it may, what it may not, what ends it."""

from __future__ import annotations

import time

import pytest

from qwen_eval.sandbox.notebook import Notebooks
from qwen_eval.sandbox.session import Session, SessionLost


def notebooks(timeout_s: float = 20.0, **options: object) -> Notebooks:
    return Notebooks(mode="auto", timeout_s=timeout_s, **options)  # type: ignore[arg-type]


def test_variables_functions_and_files_are_kept_between_cells() -> None:
    cells = [
        "def double(x):\n    return 2 * x\ny = double(20)\nopen('n.txt', 'w').write('1')",
        "y + int(open('n.txt').read()) + 1",
    ]
    first, second = notebooks().results("q", cells)
    assert (first.value, first.error) == ("1", "")
    assert (second.value, second.error) == ("42", "")


def test_what_a_model_reads_does_not_depend_on_the_version_of_python() -> None:
    [result] = notebooks().results("q", ['import re\nprint(re.findall("\\d", "a1"))'])  # Python 3.12 warns of "\d"
    assert result.output == "['1']\n"


def test_another_key_has_another_interpreter() -> None:
    books = notebooks()
    assert books.results("a", ["x = 1"])[0].error == ""
    assert books.results("b", ["x"])[0].error == "NameError: name 'x' is not defined"


def test_a_closed_notebook_finds_its_variables_again_by_running_its_cells() -> None:
    books = notebooks(most_open=1)
    books.results("a", ["import random", "x = random.random()"])
    drawn = books.results("a", ["import random", "x = random.random()", "x"])[2].value
    books.results("b", ["1"])  # closes a
    assert books.results("a", ["import random", "x = random.random()", "x"])[2].value == drawn


def test_an_endless_loop_is_ended_and_the_interpreter_with_it() -> None:
    start = time.perf_counter()
    loop, after = notebooks(timeout_s=1.0).results("q", ["while True:\n    pass", "1"])
    assert (loop.error, loop.is_lost) == ("timed out", True)
    assert after.error == "the interpreter has ended"
    assert time.perf_counter() - start < 10


def test_a_flood_of_output_is_cut_and_counted() -> None:
    [flood] = notebooks(most_characters=100).results("q", ["print('x' * 5_000_000)"])
    assert flood.output == "x" * 100 + "\n... (4,999,901 more characters)"
    assert flood.error == ""


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("import requests", "ModuleNotFoundError: No module named 'requests'"),
        ("import torch", "ModuleNotFoundError: No module named 'torch'"),
        ("import socket\nsocket.socket()", "PermissionError: [Errno 1] Operation not permitted"),
        ("import os\nos.fork()", "PermissionError: [Errno 1] Operation not permitted"),
        ("open('/etc/passwd')", "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def f(:", "invalid syntax"),
    ],
)
def test_what_a_cell_may_not_do_is_an_error_of_the_cell(cell: str, error: str) -> None:
    refused, after = notebooks().results("q", [cell, "6 * 7"])
    assert error in refused.error
    assert after.value == "42"


@pytest.mark.parametrize("cell", ["import os\nos._exit(0)", "import os\nos.write(3, b'\\x00\\x00\\x00\\x05hello')"])
def test_a_cell_that_leaves_or_writes_to_the_channel_ends_the_interpreter(cell: str) -> None:
    [gone] = notebooks().results("q", [cell])
    assert gone.is_lost


def test_an_answer_that_never_ends_is_cut_off_in_time() -> None:
    """A stated length with no bytes behind it would keep a reader for ever."""
    start = time.perf_counter()
    [hung] = notebooks(timeout_s=1.0).results(
        "q", ["import os, time\nos.write(3, b'\\x00\\x01\\x00\\x00')\ntime.sleep(60)"]
    )
    assert hung.is_lost
    assert time.perf_counter() - start < 10


def test_a_kernel_that_a_cell_rewrote_is_not_believed() -> None:
    cell = "import solution\nsolution.run_cell = lambda *_: {'output': 'all is well'}"
    _, forged = notebooks().results("q", [cell, "1"])
    assert (forged.error, forged.is_lost) == ("damaged answer", True)


def test_a_figure_comes_out_as_png() -> None:
    [drawn] = notebooks(wants_figures=True).results("q", ["plt.plot([1, 2, 3])\nplt.show()"])
    assert (drawn.output, drawn.error) == ("", "")
    assert drawn.figure is not None
    assert drawn.figure.startswith(b"\x89PNG")


def test_a_session_returns_plain_data_and_nothing_else() -> None:
    with Session("def answer(x):\n    return {'twice': 2 * x}\ndef odd():\n    return object()") as session:
        assert session.call("answer", 21, timeout_s=5.0) == {"twice": 42}
        with pytest.raises(SessionLost, match="damaged answer"):
            session.call("odd", timeout_s=5.0)
