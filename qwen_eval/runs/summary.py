"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from qwen_eval.config import EvalSpec
from qwen_eval.core import Metric
from qwen_eval.runs.evaluate import Outcome, elsewhere

MAX_ROWS = 24  # more groups than a person reads at once: the rest is in result.json


def show(spec: EvalSpec, outcome: Outcome, console: Console | None = None) -> None:
    """Print metrics with their 95 % intervals, what was noticed, and where the run lies."""
    console = console or Console()
    part = f", partial: {', '.join(f'{k}={v}' for k, v in outcome.partial.items())}" if outcome.partial else ""
    table = Table(title=f"{spec.task.name} · {spec.model.name} · n={outcome.n}{part}", title_justify="left")
    for column, justify in (("metric", "left"), ("value", "right"), ("95 % interval", "right"), ("n", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows = list(outcome.metrics.items())
    for name, metric in rows[:MAX_ROWS]:
        table.add_row(name, *cells(metric))
    console.print(table)
    if len(rows) > MAX_ROWS:
        console.print(f"{len(rows) - MAX_ROWS} more in {outcome.directory / 'result.json'}")
    noticed = noticed_rates(outcome.rates)
    if noticed:
        console.print(noticed)
    for warning in outcome.warnings:
        console.print(f"warning: {warning}", markup=False)
    console.print(footer(spec, outcome), highlight=False, markup=False, soft_wrap=True)


def cells(metric: Metric) -> tuple[str, str, str]:
    """Value, interval and n as text: shares in per cent."""
    if metric.low is None or metric.high is None:
        interval = "-"
    else:
        interval = f"{number(metric.low, metric.kind)} to {number(metric.high, metric.kind)}"
    value = number(metric.value, metric.kind)
    return (f"{value} {metric.unit}".rstrip(), interval, str(metric.n))


def number(value: float, kind: str) -> str:
    """`0.5342, "share"` -> `"53.4 %"`."""
    if value != value:
        return "-"
    return {"share": f"{100 * value:.1f} %", "count": f"{value:.0f}"}.get(kind, f"{value:.4g}")


def noticed_rates(rates: Mapping[str, Metric]) -> str:
    """The shares of truncated, empty, unread ... answers that are not zero, on one line."""
    return ", ".join(f"{name} {number(rate.value, rate.kind)}" for name, rate in rates.items() if rate.value > 0)


def footer(spec: EvalSpec, outcome: Outcome) -> str:
    if outcome.was_finished:
        return f"{outcome.directory}: was finished before, nothing asked; {elsewhere(spec)} runs it again beside it"
    run = outcome.result["run"]
    rate = f"{run['num_samples'] / run['run_s']:.3g} samples/s" if run["num_samples"] else "nothing asked"
    resumed = f", {run['num_resumed']} from before" if run["num_resumed"] else ""
    return f"{outcome.directory}: {run['run_s']:.1f} s, {rate}{resumed}"
