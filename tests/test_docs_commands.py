"""Every command in the fenced blocks of README.md and docs/: run as written where it needs no real checkpoint and no
file of the user, else composed, so that none of its keys is wrong.

All run in one directory, docs/ci.md first: the others find its runs and its baseline there.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_eval import __main__ as evaluation
from qwen_eval import cli, config
from qwen_eval.data import __main__ as data
from qwen_eval.profile import __main__ as profile
from qwen_eval.profile import config as profile_config
from qwen_eval.profile import finetune, tokens
from qwen_eval.quantize import __main__ as quantize
from qwen_eval.report import __main__ as report
from qwen_eval.report import config as report_config
from qwen_eval.runs import preview_command
from qwen_eval.ship import command as ship
from qwen_eval.ship import config as ship_config

ROOT = Path(__file__).parent.parent
WITH_FILES = (
    "own_task.md",
    "own_model.md",
    "first_hour.md",
)  # run with their files: test_own.py, new_user.py
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in WITH_FILES]
DOCS = [ROOT / "docs" / "ci.md", ROOT / "README.md", *PAGES]
FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS = ("python ", "make ", "git ", "for ", "test ")
PLACEHOLDER = re.compile(r"\b(DIR|FILES|FILE|PYTHON)\b|\bcheckpoints/|calibration=")
OURS = ("qwen-nano", "qwen-nano-chat", "qwen-tiny")  # models that need nothing but the package
NEEDS = {"git": "a repository", "test": "a step summary"}

Main = Callable[[Sequence[str]], int]
MAINS: dict[str, tuple[Main, str, type, Callable[[Any], object]]] = {
    "qwen_eval": (evaluation.main, "config", config.EvalSpec, config.check),
    "qwen_eval.data": (data.main, "", data.DataSpec, data.data_spec),
    "qwen_eval.preview": (preview_command.main, "preview", preview_command.PreviewSpec, config.check),
    "qwen_eval.profile": (profile.main, "profile", profile_config.ProfileSpec, profile_config.check),
    "qwen_eval.profile mode=finetune": (profile.main, "finetune", finetune.FinetuneSpec, finetune.check),
    "qwen_eval.tokens": (tokens.main, "tokens", tokens.TokensSpec, tokens.check),
    "qwen_eval.quantize": (quantize.main, "quantize", quantize.QuantizeSpec, quantize.check),
    "qwen_eval.report": (report.main, "report", report_config.ReportSpec, report.check),
    "qwen_eval.ship": (ship.main, "ship", ship_config.ShipSpec, ship_config.check),
}


def commands(path: Path) -> list[str]:
    """The commands of all fenced blocks, without comments; steps of a workflow without their `run:`."""
    found = []
    for language, block in FENCE.findall(path.read_text()):
        if language == "python":
            continue  # docs/python.md is run by test_python_api.py
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("run: ")
            if line.startswith(STARTS):
                found.append(" ".join(re.sub(r"\s#\s.*", "", line).split()))
    return found


def unique() -> list[str]:
    return list(dict.fromkeys(command for path in DOCS for command in commands(path)))


def is_runnable(command: str) -> bool:
    """Needs nothing but the package: no model but ours, or none at all (a report of other runs, a plan)."""
    if not command.startswith("python -m ") or PLACEHOLDER.search(command):
        return False
    if "engine.base_url=" in command or "qwen_eval.data get" in command:  # a server, a hub
        return False
    if command.startswith("python -m qwen_eval.data list"):
        return True
    if "model.device=cuda" in command:
        return False
    if "plan=true" in command:
        return True
    models = re.findall(r"\b(?:model|reference|candidate)=(\S+)", command)
    if re.search(r"\+experiment=\w+_table", command) and not models:
        return False  # an experiment of the cards names its own checkpoints
    if any(name not in OURS for value in models for name in value.split(",")):
        return False
    return "compare=" not in command


RUNNABLE = [command for command in unique() if is_runnable(command)]
COMPOSED = [command for command in unique() if "python -m " in command and command not in RUNNABLE]
TOOLS = [command for command in unique() if command.startswith("python tools/")]
SHELL = [command for command in unique() if command.startswith(tuple(NEEDS))]
TARGETS = [command for command in unique() if command.startswith("make ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workplace")


def test_no_command_is_left_out() -> None:
    assert len(RUNNABLE) + len(COMPOSED) + len(TOOLS) + len(SHELL) + len(TARGETS) == len(unique())
    assert len(RUNNABLE) > 10


@pytest.mark.slow
def test_the_commands_that_need_only_the_package_run_as_written_one_after_the_other(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one test: reports and the gate read what earlier commands of the pages have made."""
    monkeypatch.chdir(workplace)
    for command in RUNNABLE:
        module, *arguments = shlex.split(command)[2:]
        assert MAINS[module][0](arguments) == 0, (command, capsys.readouterr())
        for name in re.findall(r"\bout=(\S+)", command):
            for file in name.split(","):
                assert (workplace / file).stat().st_size > 0, command
    for command in SHELL:
        run_between(command, workplace)


@pytest.mark.parametrize("command", COMPOSED)
def test_a_command_for_a_real_checkpoint_or_file_is_composed(command: str) -> None:
    text = re.sub(r"\$\w+", "7", re.sub(r"^for .*?; do |; done$", "", command))
    module, *arguments = shlex.split(text)[2:]
    if module == "qwen_eval.data":
        assert data.data_spec(arguments).what == "get"
        return
    arguments = [word for word in arguments if not word.endswith(".path=DIR")]  # no checkpoint of that shape is here
    _, name, schema, check = MAINS[f"{module} mode=finetune" if "mode=finetune" in arguments else module]
    if module == "qwen_eval.ship":
        arguments = ship_config.arguments(arguments)
    assert cli.run(arguments, config_name=name, schema=schema, job=check) == 0


@pytest.mark.parametrize("command", TOOLS)
def test_a_tool_knows_its_options(command: str) -> None:
    _, script, *arguments = shlex.split(command)
    source = (ROOT / script).read_text()
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, command


@pytest.mark.parametrize("command", TARGETS)
def test_a_target_is_in_the_makefile(command: str) -> None:
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


def run_between(command: str, workplace: Path) -> None:
    """What stands between our commands in the pages."""
    subprocess.run(["git", "init", "-q", str(workplace)], check=True)
    summary = workplace / "summary.md"
    done = subprocess.run(
        ["bash", "-ec", command], cwd=workplace, env={"PATH": "/usr/bin:/bin", "GITHUB_STEP_SUMMARY": str(summary)}
    )
    assert done.returncode == 0
    assert not command.startswith("test") or "Regression gate passed" in summary.read_text()


def test_the_workflow_runs_what_the_baseline_was_made_of() -> None:
    made = [command for command in commands(ROOT / "docs" / "ci.md") if command.startswith("python -m qwen_eval -m")]
    assert len(made) == 2
    assert made[0] == made[1]
