"""`plan=true` says what a run takes: its tokens are those of the run, and nothing is loaded or written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_eval.__main__ import main
from qwen_eval.api import evaluate
from qwen_eval.core import ConfigError
from qwen_eval.models.cpu import cpu_flags
from qwen_eval.models.quant.kernels import dense_dtype
from qwen_eval.runs import preview_command

ROW = re.compile(r"^(?P<what>\S.*?\S)\s{2,}(?P<value>[\d,.:]+(?: \S+)?)\s{2,}(?P<how>.*)$")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, tuple[str, str]]:
    """The rows: what -> (value, how it is known)."""
    assert main([*arguments, "plan=true"]) == 0, capsys.readouterr().err
    found = (ROW.match(line) for line in capsys.readouterr().out.splitlines())
    return {row["what"]: (row["value"], row["how"]) for row in found if row}


@pytest.mark.parametrize(
    "arguments",
    [
        ["task=nano", "limit=40", "task.max_new_tokens=4"],
        ["task=mmlu", "task.data=bundled", "limit=12"],  # long shared beginnings
        ["task=mmlu", "task.data=bundled", "limit=4", "engine.prefix_sharing=false"],
    ],
)
def test_the_tokens_are_those_that_the_run_computes(
    arguments: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(capsys, *arguments)
    assert list(place.iterdir()) == []
    assert main([*arguments, "quiet=true", "run_dir=run"]) == 0
    engine = json.loads(Path("run/result.json").read_text())["engine"]
    read = engine["computed_tokens"] - engine["generated_tokens"]
    assert number(planned["tokens of the prompts"]) == engine["prompt_tokens"]
    assert number(planned.get("tokens to read", planned["tokens of the prompts"])) == read
    if "tokens to write, at most" in planned:
        assert engine["generated_tokens"] <= number(planned["tokens to write, at most"])


def test_a_run_of_the_same_task_says_how_long_the_rest_takes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["task=nano", "task.max_new_tokens=2", "engine=fake", "model=qwen-nano"]
    assert "time, expected" not in plan(capsys, *arguments)
    assert main([*arguments, "limit=20", "tag=short", "quiet=true"]) == 0
    session = json.loads(Path("runs/eval/nano/qwen-nano/short/result.json").read_text())["run"]
    planned = plan(capsys, *arguments, "limit=40")
    assert "as in runs/eval/nano/qwen-nano/short: " in planned["time, expected"][1]
    assert float(planned["time, expected"][0].split()[0]) == pytest.approx(2 * session["run_s"], rel=0.1)


def test_a_checkpoint_that_is_not_here_is_planned_by_its_published_shape(capsys: pytest.CaptureFixture[str]) -> None:
    small = plan(capsys, "task=gsm8k", "task.data=bundled", "model=qwen-7b", "on=RTX-4090")
    assert "estimate" in small["tokens of the prompts"][1]
    assert small["weights, GiB"][0] == "14.38"  # 7.72 billion weights in bf16
    assert "fits: " in small["peak, GiB"][1]
    large = plan(capsys, "task=gsm8k", "task.data=bundled", "model=qwen-72b", "on=RTX-4090")
    assert "do not fit" in large["weights, GiB"][1]
    assert "time, at least" not in large


def test_an_endpoint_has_a_price_by_the_table_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prices.yaml").write_text("currency: CNY\nmodels: {qwen-plus: {input: 1000.0, output: 2000.0}}\n")
    arguments = ["task=gsm8k", "task.data=bundled", "model=qwen-7b-chat", "engine=openai", "limit=3"]
    arguments += ["engine.api_model=qwen-plus", "engine.base_url=http://localhost:1/v1", "engine.prices=prices.yaml"]
    planned = plan(capsys, *arguments)  # nobody listens there
    read, written = (number(planned[what]) for what in ("tokens of the prompts", "tokens to write, at most"))
    assert planned["price, at most"][0] == f"{(read * 1000 + written * 2000) / 1e6:,.4g} CNY"
    assert "peak, GiB" not in planned


def test_every_cell_of_a_grid_has_its_plan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "task=nano", "model=qwen-nano,qwen-nano-chat", "limit=2", "plan=true"]) == 0
    assert capsys.readouterr().out.count(": plan\n") == 2
    assert list(place.iterdir()) == []


def test_neither_weights_nor_torch_are_loaded() -> None:
    if "amx_tile" in cpu_flags() or Path("/dev/nvidiactl").exists():
        pytest.skip("only torch can measure this device")
    code = "import sys; from qwen_eval.__main__ import main; main(sys.argv[1:]); print(*sys.modules)"
    call = [sys.executable, "-c", code, "task=nano", "plan=true"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert "tokens to read" in done.stdout, done.stderr
    assert not {"torch", "transformers", "datasets", "pandas", "scipy"} & set(done.stdout.split())


def test_the_precision_is_that_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"torch.bfloat16": "in bf16", "torch.float32": "in fp32"}[str(dense_dtype())]
    assert plan(capsys, "task=nano", "limit=1", "model.device=cpu")["weights, GiB"][1] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["on=H100"], "on=H100: has an effect with plan=true only"),
        (["on=RTX-5", "plan=true"], "on=RTX-5: none of the known devices; one of NVIDIA A100"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=nano", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_preview_plans_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert preview_command.main(["task=nano", "plan=true"]) == 2
    assert "plan=true: a key of python -m qwen_eval" in capsys.readouterr().err


def test_a_call_from_python_runs_and_so_refuses_to_plan(place: Path) -> None:
    with pytest.raises(ConfigError, match="plan=true: only the command plans"):
        evaluate(task="nano", settings={"plan": True})
    assert list(place.iterdir()) == []


def number(cell: tuple[str, str]) -> int:
    return int(cell[0].replace(",", ""))
