"""The commands as functions: the same settings, checks and run directories; a mistake is an exception."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from qwen_eval.core import ConfigError, StoreError

if TYPE_CHECKING:
    from qwen_eval.engines.cache import EngineCache
    from qwen_eval.report.verdict import Judgement
    from qwen_eval.runs.run import Run

Setting: TypeAlias = "str | int | float | bool | Path | Sequence[Setting] | Mapping[str, Setting] | None"

PLAIN = re.compile(r"[A-Za-z_][\w.-]*")  # what Hydra reads as text without quotes
WORDS = ("true", "false", "null", "yes", "no", "on", "off", "nan", "inf")


def evaluate(
    *,
    task: str,
    model: str | Path | None = None,
    engine: str | None = None,
    protocol: Literal["robust", "upstream"] | None = None,
    limit: int | None = None,
    seed: int | None = None,
    run_dir: str | Path | None = None,
    settings: Mapping[str, Setting] | None = None,
    cache: EngineCache | None = None,
    quiet: bool = True,
) -> Run:
    """Run one benchmark with one model, resume it, or return the finished run, as `python -m qwen_eval` does.

    `model`: a name of `conf/model/`, or the Path of a checkpoint; None is the packaged qwen-nano. `settings` holds any
    other key of the command: `{"task.shots": 0, "model.dtype": "fp32"}`. `cache` keeps the model loaded between calls.
    None leaves a setting at its default.

    Raises QwenEvalError, in one line: ConfigError for an unknown key or a value that cannot be, before anything loads;
    DataError, ModelError, EngineError, StoreError as the command reports them.
    """
    from qwen_eval import cli
    from qwen_eval.config import EvalSpec, check
    from qwen_eval.engines.cache import EngineCache
    from qwen_eval.runs import evaluate as runs
    from qwen_eval.runs.progress import shown

    checkpoint = {"model.path": model} if isinstance(model, Path) else {"model": model}
    named = {"task": task, **checkpoint, "engine": engine, "protocol": protocol, "limit": limit, "seed": seed}
    given = {key: value for key, value in {**named, "run_dir": run_dir}.items() if value is not None}
    overrides = [override(key, value) for part in (given, settings or {}) for key, value in part.items()]
    spec = check(cli.compose(overrides, config_name="config", schema=EvalSpec))
    if spec.plan:
        raise ConfigError("plan=true: only the command plans, python -m qwen_eval … plan=true; this call runs")
    with shown(is_quiet=quiet), contextlib.nullcontext(cache) if cache is not None else EngineCache() as engines:
        return runs.evaluate(spec, engines.open)


def compare(reference: Run | str | Path, other: Run | str | Path, *, margin: float | None = None) -> list[Judgement]:
    """Compare two runs of one benchmark sample by sample; one judgement, or one for each length of a perplexity.

    `margin`: points of a share and per cent of a perplexity that do not matter, 1 by default.
    """
    from qwen_eval.report.compare import adjusted, compare_runs
    from qwen_eval.report.comparison import Margins, Side
    from qwen_eval.report.verdict import judge_all

    sides = [Side(run=_loaded(run)) for run in (reference, other)]
    return judge_all(adjusted(compare_runs(sides[0], sides[1], Margins().checked(margin))))


def _loaded(run: Run | str | Path) -> Run:
    from qwen_eval.runs.run import Run, load_run

    if isinstance(run, Run):
        return run
    if not Path(run).is_dir():
        raise StoreError(f"{run}: no such directory; give a Run or its directory")
    return load_run(run)


def override(key: str, value: Setting) -> str:
    """`("task.shots", 0)` -> `"task.shots=0"`: a setting as the command line writes it."""
    return f"{key}={_written(value)}"


def _written(value: Setting) -> str:
    from qwen_eval.cli import quoted

    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_written, value)) + "]"
    text = str(value)
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return quoted(text)
