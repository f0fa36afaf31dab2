"""`python -m qwen_eval.preview task=... model=... samples=3`: what would be asked, before it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_eval import cli
from qwen_eval.activity import stage
from qwen_eval.config import EvalSpec, check
from qwen_eval.core import ConfigError

USAGE = """
python -m qwen_eval.preview [group=option ...] [samples=3] [reply=TEXT] [key=value ...]

The prompts of three samples:  python -m qwen_eval.preview task=gsm8k model=qwen-nano samples=3
How a reply would be read:     python -m qwen_eval.preview task=gsm8k model=qwen-nano "reply=So it is 42."
Every key with its value:      python -m qwen_eval.preview --cfg job

Exit code: 0 done, 2 a mistake.
"""


@dataclass(kw_only=True)
class PreviewSpec(EvalSpec):
    """All keys of an evaluation, and these."""

    samples: int = 3
    reply: str | None = None  # how this text would be read; null: the right answer itself


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 the user's mistake)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.run(argv, config_name="preview", schema=PreviewSpec, job=preview, usage=USAGE)


def preview(spec: PreviewSpec) -> None:
    """Print the samples of one cell; neither weights are loaded nor a run directory is made."""
    if spec.samples < 1:
        raise ConfigError(f"samples={spec.samples}: must be at least 1")
    if spec.plan:
        raise ConfigError("plan=true: a key of python -m qwen_eval; a preview shows prompts")
    check(spec)
    from qwen_eval.runs.preview import preview_text

    with stage(f"reading the rows of {spec.task.name}"):
        text = preview_text(spec, num_samples=spec.samples, reply=spec.reply)
    print(text)
