"""make reports and make gate: every line of conf/reports.yaml is a command, and together they are what is promised."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from report_runs import answered, documents, write_profile, write_run

from qwen_eval import cli, config
from qwen_eval.core import Metric
from qwen_eval.profile import config as profile_config
from qwen_eval.quantize import __main__ as quantize
from qwen_eval.report import __main__ as report

TOOL = Path(__file__).parent.parent / "tools" / "make_reports.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reports", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_reports"] = module  # its dataclass looks its annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_line_is_a_command(tool: ModuleType) -> None:
    plan = tool.load_plan()
    num = len(plan.gate)
    cells = [line for i, line in enumerate(plan.precisions()) if i % num == i // num % num]  # each variant, each task
    cells += [f"{plan.ablation_cell} {tricks}" for tricks in plan.ablation]
    cells += plan.cards
    speed = [f"{plan.speed_cell} {plan.speed[0]}", f"{plan.speed_cell} {plan.speed[-1]}", *plan.card_profiles]
    for name, schema, check, lines in (
        ("config", config.EvalSpec, config.check, cells),
        ("quantize", quantize.QuantizeSpec, quantize.check, plan.checkpoints),
        ("profile", profile_config.ProfileSpec, profile_config.check, speed),
    ):
        for line in lines:
            argv = [*plan.overrides, *line.format(runs="x").split()]
            assert cli.run(argv, config_name=name, schema=schema, job=check) == 0, line


def test_every_variant_runs_what_the_gate_runs(tool: ModuleType) -> None:
    plan = tool.load_plan()
    lines = plan.precisions()
    assert len(lines) == len(plan.variants) * len(plan.gate)
    nf4 = [line for line in lines if "model.quant=nf4" in line]
    assert [line.split()[0] for line in nf4] == ["task=nano", "task=mmlu", "task=long_ppl", "task=needle"]
    assert not any("fp32" in line for line in nf4)


def test_reports_and_baselines_come_from_the_runs(tool: ModuleType, tmp_path: Path) -> None:
    runs, reports = tmp_path / "runs", tmp_path / "reports"
    write_run(runs / "gate", answered([1.0, 0.0] * 20), model="nano")
    write_run(runs / "precision", answered([1.0, 0.0] * 20), model="nano-int4", quant="gptq-int4")
    lengths = {f"ppl/{n}": Metric(value=5.0, n=n, kind="ppl", low=4.0, high=6.0) for n in (256, 512)}
    write_run(runs / "ablation", documents([2.0, 2.1]), task="long_ppl", tag="ntk", metrics=lengths)
    write_profile(runs / "speed", [40.0, 41.0])
    write_run(runs / "cards", answered([1.0, 0.0] * 20), model="nano", tag="precision-nf4", quant="nf4")
    (reports / "baselines" / "eval" / "gone").mkdir(parents=True)
    assert tool.write(runs, reports) == 0
    assert {path.name for path in reports.iterdir()} == {
        "baselines", "cards.md", "qwen-nano.md", "qwen-nano.csv", "qwen-nano.html", "long_context.png",
    }  # fmt: skip
    assert "Int4" in (reports / "qwen-nano.md").read_text()
    assert [path.name for path in (reports / "baselines" / "eval").iterdir()] == ["gsm8k"]
    assert report.main([f"gate={reports / 'baselines'}", f"runs={runs / 'gate'}"]) == 0


def test_the_first_failure_ends_it(tool: ModuleType) -> None:
    asked: list[Sequence[str]] = []

    def command(argv: list[str]) -> int:
        asked.append(argv)
        return 2 if "bad" in argv else 0

    assert tool.run_all(command, ["a", "bad", "c"], tool.Plan(overrides=["x=1"]), Path("r")) == 2
    assert asked == [["x=1", "runs_dir=r", "a"], ["x=1", "runs_dir=r", "bad"]]
