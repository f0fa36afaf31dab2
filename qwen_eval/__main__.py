"""`python -m qwen_eval task=mmlu model=qwen-7b-chat`: one cell of a table; with -m a grid of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from qwen_eval import cli
from qwen_eval.activity import stage
from qwen_eval.config import EvalSpec, check
from qwen_eval.core import ConfigError
from qwen_eval.engines.cache import EngineCache
from qwen_eval.tasks.registry import FROM_FILES

USAGE = """
python -m qwen_eval [-m] [group=option ...] [key=value ...]

A first look:                  python -m qwen_eval
One benchmark with one model:  python -m qwen_eval task=mmlu model=qwen-7b-chat
A whole table:                 python -m qwen_eval -m task=mmlu,ceval model=qwen-7b,qwen-7b-chat
What will it take?             python -m qwen_eval task=mmlu model=qwen-7b-chat plan=true
Every key with its value:      python -m qwen_eval --cfg job

Exit code: 0 done, 2 a mistake, 130 Ctrl-C (the same command resumes the run).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        from qwen_eval import demo

        return demo.main()
    engine_cache = EngineCache()
    try:
        job = partial(run_cell, engine_cache=engine_cache)
        return cli.run(argv, config_name="config", schema=EvalSpec, job=job, usage=USAGE)
    finally:
        engine_cache.close()


def run_cell(spec: EvalSpec, engine_cache: EngineCache) -> None:
    """Evaluate one cell and print its table."""
    spec.tag = cli.cell_tag(spec.tag)
    if spec.task.file is not None and spec.task.name not in FROM_FILES:
        raise ConfigError(f"task.file={spec.task.file}: give it on the command line, without `+`")
    check(spec)
    if spec.plan:
        from qwen_eval.runs.plan import plan_tables
        from qwen_eval.tables import print_tables

        with stage(f"reading the rows of {spec.task.name}"):
            tables = plan_tables(spec)
        print_tables(tables)
        return
    from qwen_eval.runs.evaluate import evaluate
    from qwen_eval.runs.summary import show

    show(spec, evaluate(spec, engine_cache.open))


if __name__ == "__main__":
    sys.exit(main())
