"""Run the benchmarks' own solutions through our tests in the sandbox: all must pass.

    python tools/check_canonical.py humaneval mbpp=data/mbpp mbpp_sanitized=data/mbpp humaneval_plus=data/humaneval_plus

Each argument is a task, with the folder of its official files where it needs one.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from qwen_eval.core import Sample
from qwen_eval.tasks.registry import TaskContext, task_class


def canonical(sample: Sample) -> str:
    row: Any = sample.data
    if "code" in row:
        return str(row["code"])
    return str(row["canonical_solution"] if "assertion" in row else row["prompt"] + row["canonical_solution"])


def check(name: str, path: str | None) -> bool:
    keys: dict[str, Any] = {"split": "all"} if name.startswith("mbpp") else {}
    timeout_s = 120.0 if name.endswith("_plus") else 30.0
    cls = task_class(name)
    task = cls(cls.Spec(name=name, path=path, timeout_s=timeout_s, **keys), TaskContext())
    samples = task.samples()
    start = time.perf_counter()
    verdicts = task.run([task.program(sample, canonical(sample)) for sample in samples])
    took_s = time.perf_counter() - start
    num_passed = sum(verdict.passed for verdict in verdicts)
    print(f"{name}: {num_passed}/{len(samples)} in {took_s:.1f} s ({len(samples) / took_s:.0f} programs/s)", flush=True)
    for sample, verdict in zip(samples, verdicts):
        if not verdict.passed:
            print(f"  {sample.id}: {verdict.reason}")
    return num_passed == len(samples)


def main() -> int:
    arguments = [argument.partition("=") for argument in sys.argv[1:]]
    if not arguments:
        print(__doc__)
        return 2
    results = [check(name, path or None) for name, _, path in arguments]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
