"""`python -m qwen_eval.list tasks|models|engines`: what there is, one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_eval import cli
from qwen_eval.engines.kinds import ENGINES
from qwen_eval.report.config import ListSpec, list_spec

USAGE = """
python -m qwen_eval.list tasks|models|engines [word] [--config-dir=DIR]

All benchmarks:                   python -m qwen_eval.list tasks
Models with a word in the name:   python -m qwen_eval.list models int4
With those of your own folder:    python -m qwen_eval.list models --config-dir=DIR

Exit code: 0 done, 2 a mistake.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 the user's mistake, 141 where the reader of a pipe has left)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.guarded(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    if not cli.asked_of_itself(argv or ["--help"], USAGE):
        _show(list_spec(argv))
    return 0


def _show(spec: ListSpec) -> None:
    from qwen_eval.report import inventory
    from qwen_eval.tables import print_tables

    folders = [cli.conf_dir(), *map(Path, spec.config_dirs)]
    if spec.what == "engines":
        table = inventory.engines(folders, spec.word, ENGINES)
    else:
        table = (inventory.tasks if spec.what == "tasks" else inventory.models)(folders, spec.word)
    print_tables([table])
