"""`python -m qwen_eval.report`: tables, comparisons, the published ledger, the regression gate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_eval import cli
from qwen_eval.activity import stage
from qwen_eval.config import not_one_of
from qwen_eval.core import ConfigError, StoreError
from qwen_eval.report.config import FORMATS, LAYOUTS, ReportSpec
from qwen_eval.tables import Table, print_tables, render

if TYPE_CHECKING:
    from qwen_eval.report.comparison import Margins
    from qwen_eval.report.verdict import Judgement
    from qwen_eval.runs.run import Run

USAGE = """
python -m qwen_eval.report [key=value ...]

Tables of what was run:        python -m qwen_eval.report runs=runs out=report.html
Two runs, sample by sample:    python -m qwen_eval.report compare=A,B
Ours beside published:         python -m qwen_eval.report published=true
The published numbers alone:   python -m qwen_eval.report ledger=contradictions
Make runs the baseline:        python -m qwen_eval.report accept=runs gate=reports/baselines
Has anything got worse?        python -m qwen_eval.report gate=reports/baselines out=gate.md,gate.xml
Every key with its value:      python -m qwen_eval.report --cfg job

Exit code: 0 done, 1 the gate found something worse, 2 a mistake, 3 not comparable or missing, 130 Ctrl-C.
"""

ENDINGS = {
    ".md": "md",
    ".csv": "csv",
    ".json": "json",
    ".tex": "tex",
    ".html": "html",
    ".xml": "junit",
    ".txt": "terminal",
    ".svg": "svg",
    ".png": "png",
}
FIGURES = ("svg", "png")  # perplexity by length, of the long layout
BASELINES = "reports/baselines"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one command has to say. `junit` and `page` are made only when such a file is asked for."""

    title: str
    tables: list[Table]
    exit_code: int = 0
    junit: str | None = None
    roots: tuple[str, ...] = ()  # whose samples an HTML page may show
    judgements: Callable[[], Sequence[Judgement]] = tuple  # what such a page leads with


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the gate found something worse, 2 the user's mistake, 3 not comparable or missing."""
    argv = sys.argv[1:] if argv is None else list(argv)
    codes: list[int] = []
    failed = cli.run(
        argv, config_name="report", schema=ReportSpec, job=lambda spec: codes.append(run_report(spec)), usage=USAGE
    )
    return failed or max(codes, default=0)


def run_report(spec: ReportSpec) -> int:
    """Print or write one report; the exit code of the gate, else 0."""
    forms = _forms(check(spec))
    if spec.accept:
        return _accept(spec)
    with stage("reading the runs"):
        report = build(spec)
    for path, form in forms:
        if path is None and form == "terminal":
            print_tables(report.tables)
        elif path is None:
            sys.stdout.write(_text(spec, report, form))
        elif form in FIGURES:
            _write(path, _figure(spec, form))
        else:
            with stage(f"writing {path}"):
                _write(path, _text(spec, report, form).encode("utf-8", "replace"))
    if spec.gate and all(path is not None for path, _ in forms):
        print_tables(report.tables)
    return report.exit_code


def check(spec: ReportSpec) -> ReportSpec:
    """ConfigError for a value outside its set or two questions at once."""
    if spec.format not in FORMATS:
        raise not_one_of("format", spec.format, FORMATS)
    spec.layout = ["quantization" if name == "quantisation" else name for name in spec.layout]  # its name until 0.1
    for name in spec.layout:
        if name not in LAYOUTS:
            raise not_one_of("layout", name, LAYOUTS)
    if spec.format in FIGURES and not spec.out:
        raise ConfigError(f"format={spec.format}: a figure needs a file, such as out=long.{spec.format}")
    if spec.ledger not in ("", "contradictions", "rows"):
        raise not_one_of("ledger", spec.ledger, ("contradictions", "rows"))
    asked = [name for name in ("compare", "published", "ledger", "gate") if getattr(spec, name)]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(f'{name}=' for name in asked)} together: ask one at a time")
    return spec


def build(spec: ReportSpec) -> Report:
    if spec.compare:
        from qwen_eval.report.compare import compare_paths
        from qwen_eval.report.detail import compare_tables
        from qwen_eval.report.verdict import judge_all

        found = compare_paths(spec.compare, _margins(spec))
        tables = compare_tables(found, num_flips=spec.num_flips)
        return Report(
            title=spec.title or "Comparison", tables=tables, roots=tuple(spec.compare),
            judgements=lambda: judge_all(found),
        )  # fmt: skip
    if spec.gate:
        from qwen_eval.report.gate import gate, gate_tables, junit

        report = gate(Path(spec.gate), spec.runs, _margins(spec))
        title = spec.title or "Regression gate"
        tables = gate_tables(report, title)
        return Report(
            title=title, tables=tables, exit_code=report.exit_code, junit=junit(report), roots=tuple(spec.runs),
            judgements=lambda: report.judgements,
        )  # fmt: skip
    return _overview(spec)


def _overview(spec: ReportSpec) -> Report:
    from qwen_eval.report.candidates import against_references
    from qwen_eval.report.commands import ledger_rows
    from qwen_eval.report.ledger import contradictions
    from qwen_eval.report.published import published_tables
    from qwen_eval.report.runs import find_runs
    from qwen_eval.report.tables import layouts

    if spec.ledger:
        return Report(title="Ledger", tables=contradictions() if spec.ledger == "contradictions" else ledger_rows())
    runs = find_runs(spec.runs)
    roots = tuple(spec.runs)
    makers = layouts(runs)
    if spec.published:
        return Report(
            title=spec.title or "Published", tables=published_tables(runs) + makers["problems"](), roots=roots
        )
    tables = [table for name in spec.layout or makers for table in makers[name]()]
    if not tables:
        asked = f"layout={','.join(spec.layout)}: nothing to show" if spec.layout else "no run"
        raise ConfigError(f"{asked} under {', '.join(spec.runs)}; run an evaluation first or pass runs=DIR")
    margins = _margins(spec)
    return Report(
        title=spec.title or "Evaluation report", tables=_with_samples_told(tables, runs.evals), roots=roots,
        judgements=lambda: against_references(runs.finished, margins),
    )  # fmt: skip


def _with_samples_told(tables: list[Table], runs: Sequence[Run]) -> list[Table]:
    """The first table says which scores are of the rows in the package."""
    names = dict.fromkeys(run.task for run in runs if run.is_bundled_sample)
    note = f"{', '.join(names)}: the sample in the package, not the whole benchmark."
    return [replace(tables[0], notes=(*tables[0].notes, note)), *tables[1:]] if names else tables


def _accept(spec: ReportSpec) -> int:
    """Write the baselines, and print what they change against those that they replace."""
    from qwen_eval.report.baseline import accept
    from qwen_eval.report.gate import accepted_tables

    margins = _margins(spec)
    accepted = accept(spec.accept, Path(spec.gate or BASELINES))
    print_tables(accepted_tables(accepted, margins))
    for item in accepted:
        print(f"baseline written: {item.directory}{item.note}")
    return 0


def _margins(spec: ReportSpec) -> Margins:
    from qwen_eval.report.comparison import Margins

    return Margins(**vars(spec.margins)).checked(spec.margin)


def _forms(spec: ReportSpec) -> list[tuple[Path | None, str]]:
    """Where to write what: each file by its ending unless `format` says it."""
    if not spec.out:
        return [(None, "terminal" if spec.format == "auto" else spec.format)]
    forms: list[tuple[Path | None, str]] = []
    for name in spec.out:
        form = ENDINGS.get(Path(name).suffix, "") if spec.format == "auto" else spec.format
        if not form:
            one = f"; one file with a comma is written \"out='{','.join(spec.out)}'\"" if len(spec.out) > 1 else ""
            raise ConfigError(f"out={name}: which format? end it in {', '.join(ENDINGS)} or pass format={one}")
        forms.append((Path(name), form))
    if any(form == "junit" for _, form in forms) and not spec.gate:
        raise ConfigError("format=junit: only the gate has verdicts; pass gate=DIR")
    return forms


def _text(spec: ReportSpec, report: Report, form: str) -> str:
    if form == "junit":
        return report.junit or ""
    if form == "html":
        from qwen_eval.report.html import page

        judgements = report.judgements()
        return page(report.title, report.tables, report.roots, max_samples=spec.max_samples, judgements=judgements)
    return render(report.tables, form)


def _figure(spec: ReportSpec, form: str) -> bytes:
    from qwen_eval.report.long_context import curves
    from qwen_eval.report.runs import find_runs

    return curves(find_runs(spec.runs).finished, form)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise StoreError(f"out={path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
