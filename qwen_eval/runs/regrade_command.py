"""`python -m qwen_eval.regrade run=DIR [protocol=upstream]`: grade stored answers again, without the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen_eval import cli
from qwen_eval.activity import stage
from qwen_eval.runs.regrade import RegradeSpec, check, regrade, regraded_table
from qwen_eval.tables import print_tables
from qwen_eval.terminal import plain_text

USAGE = """
python -m qwen_eval.regrade run=DIR [protocol=robust|upstream]

By the official script's reading:  python -m qwen_eval.regrade run=runs/eval/gsm8k/qwen-nano/default protocol=upstream
By this version of the grader:     python -m qwen_eval.regrade run=runs/eval/gsm8k/qwen-nano/default

The run is not changed: the new grades are written to regrade-PROTOCOL.json in its directory.

Exit code: 0 done, 2 a mistake.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.run(argv, config_name="regrade", schema=RegradeSpec, job=grade_again, usage=USAGE)


def grade_again(spec: RegradeSpec) -> None:
    with stage("grading the stored answers again"):
        outcome = regrade(check(spec))
    print_tables([regraded_table(outcome)])
    print(plain_text(f"{outcome.num_changed} of {outcome.n} grades changed; {outcome.path}"))
