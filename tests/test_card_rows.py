"""The rows of the model cards on the miniature, end to end: killed, resumed, reported, gated; and their commands."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_eval import __main__ as evaluation
from qwen_eval import cli, config
from qwen_eval.profile import config as profile_config
from qwen_eval.profile import finetune
from qwen_eval.report import __main__ as report
from qwen_eval.report.commands import EVAL, PROFILE, command
from qwen_eval.report.gate import gate
from qwen_eval.report.ledger import Published, ledger
from qwen_eval.runs.run import load_run

CELL = "model=qwen-nano-chat model.dtype=fp32 task.data=bundled task.max_new_tokens=6 quiet=true"
CUTS = {"vcsum": "task.max_prompt_tokens=300", "leval": "task.max_prompt_tokens=700", "wmt22": "task.shots=1"}


@pytest.mark.slow
@pytest.mark.parametrize("task", CUTS)
def test_a_killed_run_is_resumed_reported_and_gated(task: str, tmp_path: Path) -> None:
    words = [f"task={task}", *CELL.split(), CUTS[task]]
    killed = tmp_path / "killed" / "eval" / task / "qwen-nano-chat" / "default"
    argv = [sys.executable, "-m", "qwen_eval", *words, "engine.max_batch_size=1", f"runs_dir={tmp_path / 'killed'}"]
    process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    records = killed / "records.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if records.is_file() and b"\n" in records.read_bytes():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert records.read_bytes().count(b"\n") >= 1
    assert not (killed / "result.json").exists(), "the run was to be killed before its end"

    assert evaluation.main([*words, f"runs_dir={tmp_path / 'killed'}"]) == 0
    assert evaluation.main([*words, f"runs_dir={tmp_path / 'whole'}"]) == 0
    resumed, whole = load_run(killed), load_run(tmp_path / "whole" / "eval" / task / "qwen-nano-chat" / "default")
    assert resumed.result["run"]["num_resumed"] >= 1
    assert resumed.result["metrics"] == whole.result["metrics"]

    baselines, page = tmp_path / "baselines", tmp_path / "report.md"
    assert report.main([f"accept={tmp_path / 'whole'}", f"gate={baselines}"]) == 0
    (judged,) = gate(baselines, [str(tmp_path / "killed")]).judgements
    assert (judged.verdict, judged.why) == ("unchanged", "every answer is the same")
    assert report.main([f"runs={tmp_path / 'killed'}", f"out={page}"]) == 0
    assert task in page.read_text(encoding="utf-8")


# --- commands ------------------------------------------------------------------------------------------------------


def rows_of(table: str, model: str) -> list[Published]:
    return [row for row in ledger() if row.table == table and row.model == model]


@pytest.mark.parametrize(
    ("table", "model", "commands"),
    [
        ("wmt22_base", "Qwen-7B (original)", {f"{EVAL} task=wmt22 model=qwen-7b-original"}),
        ("vcsum_chat", "Qwen-14B-Chat", {f"{EVAL} task=vcsum model=qwen-14b-chat"}),
        ("l_eval_closed", "Qwen-72B-Chat", {f"{EVAL} task=leval model=qwen-72b-chat", None}),  # None: codeU, the length
        ("gsm8k_chat", "Qwen-7B-Chat", {f"{EVAL} task=gsm8k model=qwen-7b-chat{x}" for x in ("", " task.shots=8")}),
        ("mmlu_chat", "Qwen-7B-Chat", {f"{EVAL} task=mmlu model=qwen-7b-chat{x}" for x in ("", " task.shots=5")}),
        ("ceval_test_chat", "Qwen-7B-Chat", {f"{EVAL} task=ceval model=qwen-7b-chat task.split=test"}),
        ("kv_cache_memory_batch", "Qwen-7B-Chat", {f"{PROFILE} profile=kv_batch model=qwen-7b-chat"}),
        ("kv_cache_memory_seqlen", "Qwen-7B-Chat", {f"{PROFILE} profile=kv_length model=qwen-7b-chat"}),
    ],
)
def test_published_cells_have_their_command(table: str, model: str, commands: set[str | None]) -> None:
    assert {command(row) for row in rows_of(table, model)} == commands


def test_other_people_s_models_have_none() -> None:
    assert {command(row) for row in ledger() if not row.model.startswith("Qwen")} == {None}


def test_every_command_of_the_ledger_is_one() -> None:
    """One of each task and set of keys is composed; the models are all files of conf/model."""
    found = {line for row in ledger() if (line := command(row))}
    known = {path.stem for path in (cli.conf_dir() / "model").glob("*.yaml")}
    kinds: dict[str, str] = {}
    for line in sorted(found):
        words = shlex.split(line)[2:]
        model = next(word.partition("=")[2] for word in words if word.startswith("model="))
        assert model in known, line
        shape = [word if word.startswith("task=") else word.partition("=")[0] for word in words]
        kinds[" ".join(shape)] = line
    assert len(kinds) > 15
    for line in kinds.values():
        words = [word for word in shlex.split(line)[3:] if not word.startswith("model=")]
        if line.startswith(PROFILE):
            plain = ("profile", profile_config.ProfileSpec, profile_config.check)
            tuned = ("finetune", finetune.FinetuneSpec, finetune.check)
            name, schema, check = tuned if "mode=finetune" in words else plain
            argv = [*words, "model=qwen-nano"]
            assert cli.run(argv, config_name=name, schema=schema, job=check) == 0, line  # type: ignore[arg-type]
        else:
            words = [word for word in words if not word.startswith("model.")]
            argv = [*words, "model=qwen-nano"]
            assert cli.run(argv, config_name="config", schema=config.EvalSpec, job=config.check) == 0, line


@pytest.mark.parametrize(
    ("experiment", "given", "cells"),
    [
        ("bnb_table", [], {("mmlu", "qwen-7b-original", quant, tag) for quant, tag in (
            ("none", "precision-bf16"), ("int8", "precision-llm_int8"), ("nf4", "precision-nf4"))}),
        ("quantization_table", [], {(task, f"qwen-7b-chat{ending}", quant, "default")
            for task in ("mmlu", "ceval", "gsm8k", "humaneval")
            for ending, quant in (("", "none"), ("-int8", "gptq-int8"), ("-int4", "gptq-int4"))}),
        ("quantization_table", ["model=qwen-14b-chat,qwen-14b-chat-int4", "task=mmlu"], {
            ("mmlu", "qwen-14b-chat", "none", "default"), ("mmlu", "qwen-14b-chat-int4", "gptq-int4", "default")}),
    ],
)  # fmt: skip
def test_a_table_of_the_cards_is_one_command(
    experiment: str, given: list[str], cells: set[tuple[str, ...]], tmp_path: Path
) -> None:
    found = set()

    def note(spec: config.EvalSpec) -> None:
        found.add((spec.task.name, spec.model.name, spec.model.quant, spec.tag))

    argv = [f"+experiment={experiment}", f"runs_dir={tmp_path}", "engine=fake", *given]
    assert cli.run(argv, config_name="config", schema=config.EvalSpec, job=note) == 0
    assert found == cells


def test_the_ledger_of_rows_is_a_csv_with_their_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of docs/model_cards.md are composed in test_docs_commands.py, with those of all pages."""
    assert report.main(["ledger=rows", "format=csv"]) == 0
    assert f"{EVAL} task=vcsum model=qwen-14b-chat" in capsys.readouterr().out
