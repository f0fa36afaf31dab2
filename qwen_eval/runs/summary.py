"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_eval.config import EvalSpec
from qwen_eval.core import Metric
from qwen_eval.runs.evaluate import elsewhere
from qwen_eval.runs.run import Run
from qwen_eval.tables import NONE, Cell, Table, print_tables, text_cell
from qwen_eval.terminal import plain_text

MAX_ROWS = 24  # more groups than a person reads at once: the rest is in result.json


def show(spec: EvalSpec, run: Run) -> None:
    """Print metrics with their 95 % intervals, the rates of odd replies, and the run directory; quietly only that."""
    if not spec.quiet:
        print_tables([metrics_table(spec, run)])
    print(plain_text(footer(spec, run)))


def metrics_table(spec: EvalSpec, run: Run) -> Table:
    part = f", partial: {', '.join(f'{k}={v}' for k, v in run.partial.items())}" if run.partial else ""
    rows = tuple((text_cell(name), *metric_cells(metric)) for name, metric in run.metrics.items())
    notes = [f"{len(rows) - MAX_ROWS} more in {run.path / 'result.json'}"] if len(rows) > MAX_ROWS else []
    noticed = noticed_rates(run.rates)
    notes += [noticed] if noticed else []
    return Table(
        name="metrics",
        title=f"{spec.task.name} · {spec.model.name} · n={run.num_samples}{part}",
        columns=("metric", "value", "95 % interval", "n"),
        rows=rows[:MAX_ROWS],
        notes=(*notes, *(f"warning: {warning}" for warning in run.warnings)),
    )


def metric_cells(metric: Metric) -> tuple[Cell, Cell, Cell]:
    """Value, interval and n: shares in per cent."""
    value = Cell(
        text=f"{number(metric.value, metric.kind)} {metric.unit}".rstrip(), value=_real(metric.value), low=metric.low,
        high=metric.high, n=metric.n,
    )  # fmt: skip
    interval = NONE
    if metric.low is not None and metric.high is not None:
        low = number(metric.low, metric.kind).removesuffix(" %")
        interval = f"{low} to {number(metric.high, metric.kind)}"
    return value, Cell(text=interval), Cell(text=f"{metric.n:,}", value=metric.n)


def number(value: float, kind: str) -> str:
    """`0.5342, "share"` -> `"53.4 %"`."""
    if value != value:
        return NONE
    return {"share": f"{100 * value:.1f} %", "count": f"{value:.0f}"}.get(kind, f"{value:.4g}")


def noticed_rates(rates: Mapping[str, Metric]) -> str:
    """The shares of truncated, empty, unread ... answers that are not zero, on one line."""
    return ", ".join(f"{name} {number(rate.value, rate.kind)}" for name, rate in rates.items() if rate.value > 0)


def footer(spec: EvalSpec, run: Run) -> str:
    """What is printed when quiet too, so it says whether the number is one of the benchmark."""
    sample = ", bundled sample" if run.is_bundled_sample else ""
    if run.was_finished:
        return f"{run.path}: was finished before, nothing asked{sample}; {elsewhere(spec)} starts a new run"
    session = run.session
    assert session is not None, run.path
    rate = f"{session.num_samples / session.run_s:.3g} samples/s" if session.num_samples else "nothing asked"
    resumed = f", {session.num_resumed} resumed" if session.num_resumed else ""
    return f"{run.path}: {session.run_s:.1f} s, {rate}{resumed}{sample}"


def _real(value: float) -> float | None:
    return value if value == value else None
