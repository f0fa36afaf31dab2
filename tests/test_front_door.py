"""What answers at once: help, the version and mistakes need no torch, pandas or transformers. How soon they answer
on this machine is measured by tools/time_front_door.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_eval import __version__

ROOT = Path(__file__).parent.parent
DOORS = ("__main__", "profile.__main__", "report.__main__", "ship.command", "quantize.__main__", "regrade", "preview",
         "list", "tokens", "data.__main__")  # fmt: skip
HEAVY = {"torch", "pandas", "transformers", "datasets", "scipy", "matplotlib", "tokenizers"}
CALL = """
import contextlib, importlib, io, json, sys
said = []
for module, arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module("qwen_eval." + module).main(arguments)
    said.append([code, out.getvalue(), err.getvalue()])
print(json.dumps([said, sorted(sys.modules)]))
"""


def called(calls: list[tuple[str, list[str]]], cwd: Path) -> tuple[list[list[object]], set[str]]:
    """(exit code, stdout, stderr) of each command, all in one fresh process, and the modules that it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps(calls)], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, modules = json.loads(done.stdout)
    return said, set(modules)


def test_every_command_answers_help_and_version_alike_and_at_once(tmp_path: Path) -> None:
    asked = [(door, [flag]) for flag in ("--help", "-h", "--version") for door in DOORS]
    said, modules = called(asked, tmp_path)
    assert not (HEAVY | {"hydra", "omegaconf"}) & modules
    for (door, (flag,)), (code, out, err) in zip(asked, said):
        assert (code, err) == (0, ""), door
        if flag == "--version":
            assert out == f"qwen_eval {__version__}\n"
            continue
        assert str(out).startswith("python -m qwen_eval"), door
        assert re.search(r"Exit codes?: 0 (done|ship)", str(out)), door
        assert len(re.findall(r"^\S.*:?\s{2,}(?:python -m|\.\.\.)", str(out), re.MULTILINE)) >= 2, door  # examples


def test_a_mistake_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    mistakes = {
        "task.subjects=anatomyy: not a subject of mmlu; did you mean anatomy?": ["task=mmlu", "task.subjects=anatomyy"],
        'task=mmluu: unknown; did you mean "mmlu"?': ["task=mmluu"],
        'tsak: no such key; did you mean "task"?': ["tsak=mmlu"],
        "task.path=no: no such file or folder": ["task=gsm8k", "task.subjects=a", "task.path=no"],
        "task=mmlu,ceval: several values; add -m to run each of them": ["task=mmlu,ceval"],
    }
    given = ["task.data=bundled"]  # else the hub would be asked
    said, modules = called([("__main__", [*given, *arguments]) for arguments in mistakes.values()], tmp_path)
    assert not HEAVY & modules
    for words, (code, out, err) in zip(mistakes, said):
        assert (code, out) == (2, "")
        assert str(err).startswith(words)
        assert str(err).count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no empty run directory


def test_a_report_of_nothing_needs_nothing(tmp_path: Path) -> None:
    said, modules = called([("report.__main__", [])], tmp_path)
    assert said[0][0] == 2
    assert not {"torch", "transformers", "datasets"} & modules


@pytest.mark.parametrize("door", ["", ".list tasks", ".report ledger=rows", ".preview task=nano samples=50"])
def test_a_reader_that_leaves_brings_no_traceback(door: str, tmp_path: Path) -> None:
    script = f"{sys.executable} -m qwen_eval{door or ' --help'} | head -1"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.stdout.count("\n") == 1
