"""The shell completes groups, keys and values, and never the schemas behind them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_eval.cli.completion import completions

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python -m qwen_eval task=mm", ["task=mmlu"]),
        ("python -m qwen_eval task=mmlu,gs", ["task=mmlu,gsm8k"]),
        ("qwen-eval mod", ["model.", "model="]),
        ("python -m qwen_eval model.rope.d", ["model.rope.dynamic_ntk="]),
        ("python -m qwen_eval model.dtype=b", ["model.dtype=bf16"]),
        ("python -m qwen_eval pla", ["plan="]),
        ("python -m qwen_eval plan=", ["plan=true", "plan=false"]),
        ("python -m qwen_eval task=needle task.dep", ["task.depths="]),  # a key of that task alone
        ("python -m qwen_eval task=mmlu task.dep", []),
        ("python -m qwen_eval.profile kv_cache=", ["kv_cache=auto", "kv_cache=int8"]),
        ("python -m qwen_eval.report comp", ["compare="]),
        ("python -m qwen_eval.unknown x", []),
        ("python -m pip inst", []),
    ],
)
def test_what_may_follow(line: str, words: list[str]) -> None:
    assert completions(line) == words


def test_no_schema_is_offered() -> None:
    offered = [word for group in ("task", "model", "engine") for word in completions(f"python -m qwen_eval {group}=")]
    assert len(offered) > 50
    assert [word for word in offered if "schema" in word] == []


@pytest.mark.parametrize("wordbreaks", [" =", " "])  # bash parts words at "=" unless told otherwise
def test_bash_takes_the_words(wordbreaks: str) -> None:
    line = f"{sys.executable} -m qwen_eval task=mm"
    script = (
        f'eval "$({sys.executable} -m qwen_eval --shell-completion install=bash)";'
        f'COMP_WORDBREAKS="{wordbreaks}"; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _qwen_eval;'
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == ("mmlu\n" if "=" in wordbreaks else "task=mmlu\n")
