"""Conversations with tools and code, end to end on the embedded chat model: killed, resumed, reported and gated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_eval.__main__ import main as evaluation
from qwen_eval.report.__main__ import main as report

ROOT = Path(__file__).parents[1]
# one sequence at a time, so that records come one after the other
COMMON = ("model=qwen-nano-chat", "task.data=bundled", "engine.max_batch_size=1", "quiet=true", "model.dtype=fp32")
COMMANDS = {
    "plugin": ("limit=8", "task.max_new_tokens=24"),
    "hf_agent_chat": ("limit=3", "task.max_new_tokens=8"),
    "code_interpreter": ("limit=8", "task.max_new_tokens=24"),
}


def arguments(task: str, runs: Path) -> list[str]:
    return [f"task={task}", *COMMON, *COMMANDS[task], f"runs_dir={runs}"]


def finished(task: str, runs: Path) -> Path:
    assert evaluation(arguments(task, runs)) == 0
    return runs / "eval" / task / "qwen-nano-chat" / "default"


def killed_after_a_record(task: str, runs: Path) -> int:
    """How many records there were when it was killed."""
    records = runs / "eval" / task / "qwen-nano-chat" / "default" / "records.jsonl"
    command = [sys.executable, "-m", "qwen_eval", *arguments(task, runs)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and not (records.is_file() and records.read_bytes().count(b"\n") >= 1):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return records.read_bytes().count(b"\n")


@pytest.mark.slow
@pytest.mark.parametrize("task", COMMANDS)
def test_a_killed_run_is_resumed_to_the_same_result(task: str, tmp_path: Path) -> None:
    whole = finished(task, tmp_path / "whole")
    num_kept = killed_after_a_record(task, tmp_path / "killed")
    resumed = finished(task, tmp_path / "killed")
    results = [json.loads((path / "result.json").read_text(encoding="utf-8")) for path in (whole, resumed)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[1]["run"]["num_resumed"] >= min(num_kept, 1)
    assert results[1]["partial"]["data"] == "bundled sample"
    baselines = tmp_path / "baselines"
    assert report([f"accept={whole}", f"gate={baselines}"]) == 0
    assert report([f"gate={baselines}", f"runs={resumed}"]) == 0
    assert report([f"runs={tmp_path}", f"out={tmp_path}/all.csv"]) == 0
    assert task in (tmp_path / "all.csv").read_text(encoding="utf-8")
