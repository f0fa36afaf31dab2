"""How soon a command answers: help, a typing mistake, a plan, the first sign of life. Median of five, in seconds.

    python tools/time_front_door.py [--repeats 5]

The first sign of life is the first byte on a terminal of 80 columns; the others are whole commands. The last column is
the processor's time, which a busy machine slows less.
"""

from __future__ import annotations

import argparse
import os
import pty
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOORS = ("", ".profile", ".report", ".ship", ".regrade", ".quantize", ".preview", ".list", ".tokens", ".data")
TYPOS = (["task=mmlu", "task.subjects=anatomyy"], ["task=mmluu"], ["tsak=mmlu"])
SIGNS = {
    "evaluate": ["-m", "qwen_eval", "task=nano", "limit=1"],
    "profile": ["-m", "qwen_eval.profile", "model=qwen-tiny", "seq=8", "repetitions=1"],
    "report": ["-m", "qwen_eval.report"],
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm"}


def whole_s(arguments: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True)
    return time.perf_counter() - start


def first_sign_s(arguments: list[str], folder: str) -> float:
    start = time.perf_counter()
    pid, file = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, *arguments], ENVIRONMENT)
    os.read(file, 1)
    passed_s = time.perf_counter() - start
    try:
        while os.read(file, 1 << 16):
            pass
    except OSError:  # the command is over
        pass
    os.waitpid(pid, 0)
    os.close(file)
    return passed_s


def show(what: str, measure: Callable[[list[str], str], float], arguments: list[str], repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = _cpu_s()
        times = [measure(arguments, folder) for _ in range(repeats)]
        cpu_s = (_cpu_s() - before) / repeats
    print(f"{what:44}  {statistics.median(times):5.2f}  {cpu_s:5.2f}", flush=True)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"{'':44}  {'s':>5}  {'cpu s':>5}")
    for door in DOORS:
        show(f"qwen_eval{door} --help", whole_s, ["-m", f"qwen_eval{door}", "--help"], repeats)
    for typo in TYPOS:
        show(" ".join(typo), whole_s, ["-m", "qwen_eval", *typo], repeats)
    show("plan=true task=nano", whole_s, ["-m", "qwen_eval", "task=nano", "plan=true"], repeats)
    for name, arguments in SIGNS.items():
        show(f"first sign of life: {name}", first_sign_s, arguments, repeats)


if __name__ == "__main__":
    main()
