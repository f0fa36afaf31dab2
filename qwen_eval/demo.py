"""`python -m qwen_eval` without arguments: a small suite on the embedded miniature, in one table with intervals."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_eval import cli
from qwen_eval.config import EvalSpec, check
from qwen_eval.core import Engine, Metric
from qwen_eval.engines.cache import EngineCache

if TYPE_CHECKING:
    from qwen_eval.tables import Table

SPEED_TOKENS = 128


@dataclass(kw_only=True)
class SuiteCell:
    """One run of the suite; `show` maps metrics of its result to what stands beside them in the table."""

    name: str
    overrides: list[str]
    show: dict[str, str]


@dataclass(kw_only=True)
class Suite:
    title: str
    cells: list[SuiteCell]
    next: str
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table."""

    cell: str
    what: str
    metric: Metric


def load_suite(path: Path) -> Suite:
    from omegaconf import OmegaConf

    suite = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Suite), OmegaConf.load(path)))
    assert isinstance(suite, Suite)
    return suite


def main(runs: str = "runs/demo") -> int:
    """Run `conf/demo.yaml` anew and print its table; the exit code is not 0 when a cell failed or was interrupted."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread gains little here, and waits long for a busy core
    start = time.perf_counter()
    suite = load_suite(cli.conf_dir() / "demo.yaml")
    lines: list[Line] = []
    with contextlib.closing(EngineCache()) as engine_cache:
        for cell in suite.cells:
            print(f"{cell.name} ...", flush=True)
            code = run_cell(suite, cell, runs, engine_cache, lines)
            if code:
                return code
        show(suite, lines, runs, _facts(engine_cache), time.perf_counter() - start)
    return 0


def run_cell(suite: Suite, cell: SuiteCell, runs: str, engine_cache: EngineCache, lines: list[Line]) -> int:
    """Evaluate one cell and append its rows."""

    def job(spec: EvalSpec) -> None:
        check(spec)
        from qwen_eval.runs.evaluate import evaluate

        run = evaluate(spec, engine_cache.open)
        lines.extend(Line(cell=cell.name, what=what, metric=run.metrics[key]) for key, what in cell.show.items())

    argv = [*suite.overrides, *cell.overrides, f"runs_dir={runs}", "overwrite=true"]
    return cli.run(argv, config_name="config", schema=EvalSpec, job=job)


def _facts(engine_cache: EngineCache) -> Mapping[str, Any]:
    engine = engine_cache.engine
    return {} if engine is None else {**engine.info, "speed": measure_speed(engine)}


def measure_speed(engine: Engine) -> Metric:
    """Generated tokens per second of one sequence, median of three with their range."""
    from qwen_eval.core import Generate, Prompt

    request = Generate(prompt=Prompt.raw("Question: "), max_new_tokens=SPEED_TOKENS)
    rates: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        ((_, answer),) = engine.run([request])
        rates.append(answer.completions[0].num_tokens / (time.perf_counter() - start))  # type: ignore[union-attr]
    low, middle, high = sorted(rates)
    return Metric(value=middle, low=low, high=high, n=3, kind="mean", unit="tok/s")


def show(suite: Suite, lines: Sequence[Line], runs: str, facts: Mapping[str, Any], seconds: float) -> None:
    from qwen_eval.tables import print_tables

    parameters = f"{facts['num_parameters'] / 1e6:.1f} M" if "num_parameters" in facts else "few"
    rows = list(lines)
    if "speed" in facts:
        rows.append(Line(cell="generation speed", what="one sequence", metric=facts["speed"]))
    print_tables([suite_table(suite.title.format(parameters=parameters), rows)])
    print(f"{seconds:.0f} s, {facts.get('dtype', '')} on {facts.get('device', '')}")
    print(suite.next.format(runs=runs))


def suite_table(title: str, lines: Sequence[Line]) -> Table:
    """One row a metric; the name of a cell stands in its first row."""
    from qwen_eval.runs.summary import metric_cells
    from qwen_eval.tables import Cell, Table, text_cell

    rows, before = [], ""
    for line in lines:
        name = Cell(text="" if line.cell == before else line.cell)
        rows.append((name, text_cell(line.what), *metric_cells(line.metric)))
        before = line.cell
    columns = ("", "what", "value", "95 % interval", "n")
    return Table(name="demo", title=title, columns=columns, rows=tuple(rows), num_keys=2)
