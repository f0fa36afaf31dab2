"""The vLLM engine, live, where QWEN_EVAL_VLLM_PYTHON names the interpreter of an environment that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("QWEN_EVAL_VLLM_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="QWEN_EVAL_VLLM_PYTHON names no environment with vLLM")
def test_vllm_answers_as_the_native_engine_and_leaves_nothing_behind() -> None:
    """Every letter of every question, choices of several tokens, scored texts and generated ones, in fp32."""
    assert PYTHON is not None
    tool = [sys.executable, "tools/check_vllm.py", "--vllm", PYTHON, "--questions", "8", "--texts", "4"]
    small = ["--hidden", "128", "--layers", "2"]
    done = subprocess.run([*tool, *small], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["choices"]["n"] == 8
    assert all(row["equal"] == row["n"] for name, row in found.items() if name not in ("vllm", "left")), found
    assert max(found[name]["largest_difference"] for name in ("choices", "long choices", "scores")) < 1e-3
    assert found["left"] == {"processes": [], "shared_memory": []}
    assert done.returncode == 0
