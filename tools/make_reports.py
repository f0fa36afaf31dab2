"""Make the committed `reports/` and its baselines on the embedded miniature, or gate today's code against them.

    python tools/make_reports.py            # everything of conf/reports.yaml, then reports/ anew (make reports)
    python tools/make_reports.py --gate     # the few runs of the gate, against reports/baselines (make gate)

Exit code: of the first command that failed, or of the gate (1 worse, 3 not comparable). Reports are written only when
everything has run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PARTS = ("gate", "precision", "ablation", "speed")
CARDS = "cards"
ROOT = Path(__file__).resolve().parent.parent
Command = Callable[[list[str]], int]


@dataclass(kw_only=True)
class Plan:
    """conf/reports.yaml: lines of arguments, see there."""

    overrides: list[str] = field(default_factory=list)
    gate: list[str] = field(default_factory=list)
    margins: dict[str, float] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    ablation: list[str] = field(default_factory=list)
    ablation_cell: str = ""
    speed: list[str] = field(default_factory=list)
    speed_cell: str = ""
    cards: list[str] = field(default_factory=list)
    card_profiles: list[str] = field(default_factory=list)

    def precisions(self) -> list[str]:
        """Each variant over the tasks of the gate."""
        return [f"{_without_dtype(cell)} {variant}" for variant in self.variants for cell in self.gate]


def load_plan(path: Path = ROOT / "conf" / "reports.yaml") -> Plan:
    from omegaconf import OmegaConf

    plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Plan), OmegaConf.load(path)))
    assert isinstance(plan, Plan)
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", action="store_true", help="only the gate against reports/baselines")
    parser.add_argument("--runs", type=Path, help="where the runs go; default: runs/gate or runs/reports")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="where reports and baselines lie")
    options = parser.parse_args(argv)
    runs = options.runs or Path("runs/gate" if options.gate else "runs/reports")
    plan = load_plan()
    shutil.rmtree(runs, ignore_errors=True)  # a run of a former plan must not slip into the tables
    return gate(plan, runs, options.reports) if options.gate else make(plan, runs, options.reports)


def gate(plan: Plan, runs: Path, reports: Path) -> int:
    from qwen_eval import __main__ as evaluation
    from qwen_eval.report import __main__ as report

    code = run_all(evaluation.main, plan.gate, plan, runs / "gate")
    margins = [f"margins.{name}={value}" for name, value in plan.margins.items()]
    return code or report.main([f"gate={reports / 'baselines'}", f"runs={runs / 'gate'}", *margins])


def make(plan: Plan, runs: Path, reports: Path) -> int:
    from qwen_eval import __main__ as evaluation
    from qwen_eval.profile import __main__ as profile
    from qwen_eval.quantize import __main__ as quantize

    ablation = [f"{plan.ablation_cell} {tricks}" for tricks in plan.ablation]
    speed = [f"{plan.speed_cell} {cell}" for cell in plan.speed]
    parts: list[tuple[Command, Sequence[str], Path | None]] = [
        (evaluation.main, plan.gate, runs / "gate"),
        (quantize.main, plan.checkpoints, None),
        (evaluation.main, plan.precisions(), runs / "precision"),
        (evaluation.main, ablation, runs / "ablation"),
        (profile.main, speed, runs / "speed"),
        (evaluation.main, plan.cards, runs / CARDS),
        (profile.main, plan.card_profiles, runs / CARDS),
    ]
    for command, lines, place in parts:
        code = run_all(command, [line.format(runs=runs) for line in lines], plan, place)
        if code:
            return code
    return write(runs, reports)


def run_all(command: Command, lines: Sequence[str], plan: Plan, place: Path | None) -> int:
    """Run one command with each line of arguments, saying what it took; the first exit code that is not 0."""
    for line in lines:
        print(f"\n$ python -m {command.__module__.removesuffix('.__main__')} {line}", flush=True)
        start = time.perf_counter()
        where = [] if place is None else [f"runs_dir={place}"]
        code = command([*plan.overrides, *where, *line.split()])
        print(f"# {time.perf_counter() - start:.0f} s", flush=True)
        if code:
            return code
    return 0


def write(runs: Path, reports: Path) -> int:
    """Tables as Markdown and CSV, the page with its plots and samples, figures, and the baselines of the gate."""
    from qwen_eval.report import __main__ as report

    places = ",".join(str(runs / name) for name in PARTS)
    files = [str(reports / f"qwen-nano.{ending}") for ending in ("md", "csv", "html")]
    title = "title='qwen-nano: what precision, quantization and long context do to a miniature'"
    shutil.rmtree(reports / "baselines", ignore_errors=True)
    code = report.main([f"runs={places}", f"out={','.join(files)}", "max_samples=3000", title])
    if (runs / CARDS).is_dir():
        title = "title='qwen-nano: the further tables of the model cards, on a miniature'"
        code = code or report.main([f"runs={runs / CARDS}", f"out={reports / 'cards.md'}", title])
    curves = reports / "long_context.png"
    code = code or report.main([f"runs={runs / 'ablation'}", "layout=long", f"out={curves}"])
    code = code or report.main([f"accept={runs / 'gate'}", f"gate={reports / 'baselines'}"])
    if not code:
        draw_needle(runs, reports)
    return code


def draw_needle(runs: Path, reports: Path) -> None:
    from qwen_eval.figures import heat_map
    from qwen_eval.metrics import share
    from qwen_eval.report.runs import find_runs
    from qwen_eval.report.samples import needle_cells

    for run in find_runs([runs / "gate"]).finished:
        if run.task == "needle":
            cells = {place: share(scores) for place, scores in needle_cells(run.records).items()}
            (reports / "needle.png").write_bytes(heat_map(cells, "png"))


def _without_dtype(cell: str) -> str:
    return " ".join(word for word in cell.split() if not word.startswith("model.dtype="))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
