"""`python -m qwen_eval.quantize model=qwen-7b-chat bits=4`: a GPTQ checkpoint from an unquantized one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen_eval import cli
from qwen_eval.activity import stage
from qwen_eval.quantize.config import QuantizeSpec, check

USAGE = """
python -m qwen_eval.quantize [group=option ...] [key=value ...]

Four bits, the published recipe:  python -m qwen_eval.quantize model=qwen-7b-chat
Eight bits of your own files:     python -m qwen_eval.quantize model.path=DIR model.name=mine bits=8 out=mine-int8
With text of your own:            python -m qwen_eval.quantize model=qwen-7b-chat calibration=FILE.jsonl
Every key with its value:         python -m qwen_eval.quantize --cfg job

Exit code: 0 done, 2 a mistake, 130 Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.run(argv, config_name="quantize", schema=QuantizeSpec, job=quantize, usage=USAGE)


def quantize(spec: QuantizeSpec) -> None:
    """Quantize one checkpoint; torch is imported once the keys are valid."""
    check(spec)
    with stage(f"preparing to quantize {spec.model.name}"):
        from qwen_eval.quantize import command
    command.quantize(spec)


if __name__ == "__main__":
    sys.exit(main())
