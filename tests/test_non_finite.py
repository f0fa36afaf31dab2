"""NaN and infinities in the logits are seen by every engine, for choices, scores and texts, and end the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_tiny_qwen2

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import (
    Choose,
    Completions,
    Engine,
    Generate,
    LocatesNonFinite,
    Prompt,
    Request,
    Sampling,
    Score,
    is_finite,
)
from qwen_eval.engines import open_engine
from qwen_eval.engines.native.sampling import NON_FINITE, greedy_tokens

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are finite, activations of layer 1 that fp16 cannot hold."""
    folder = write_tiny_qwen2(tmp_path_factory.mktemp("overflowing"))
    tensors = load_file(folder / "model.safetensors")
    for name in ("up", "gate", "down"):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= 300
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def opened(folder: Path, engine: str, dtype: str) -> Engine:
    model = ModelSpec(name="m", path=str(folder), dtype=dtype, device="cpu", chat=True)
    return open_engine(EngineSpec(name=engine), model)


REQUESTS: list[Request] = [
    Choose(prompt=Prompt.raw("Answer:"), choices=("A", "B")),
    Choose(prompt=Prompt.raw("Answer:"), choices=("AB", "BCD")),
    Score(prompt=Prompt.raw("A text to be scored")),
    Generate(prompt=Prompt.raw("Continue"), max_new_tokens=8),
    Generate(prompt=Prompt.raw("Continue"), max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=3)),
    Generate(prompt=Prompt.raw("Continue"), max_new_tokens=8, sampling=Sampling(repetition_penalty=1.1)),
    Generate(prompt=Prompt.raw("Continue"), max_new_tokens=8, stop=("x",)),
]


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_no_request_of_a_model_that_overflows_has_a_finite_answer(overflowing: Path, engine: str) -> None:
    answers = dict(opened(overflowing, engine, "fp16").run(REQUESTS))
    assert [index for index in range(len(REQUESTS)) if is_finite(answers[index])] == []
    for answer in answers.values():
        if isinstance(answer, Completions):
            assert answer.completions[0].finish_reason == "non-finite"
            assert answer.completions[0].num_tokens <= 1  # it ends where the logits do
    assert all(is_finite(answer) for _, answer in opened(overflowing, engine, "fp32").run(REQUESTS))


def test_the_layer_that_overflows_is_named_with_its_dtype(overflowing: Path) -> None:
    engine = opened(overflowing, "native", "fp16")
    assert isinstance(engine, LocatesNonFinite)
    assert engine.locate_non_finite(REQUESTS[0]) == "layers.1 in float16"


def test_only_the_rows_that_overflow_fail() -> None:
    rows = [[0.0, 2.0, 2.0], [0.0, NAN, 1.0], [INFINITY, 0.0, 0.0], [-INFINITY] * 3, [60000.0, -60000.0, 0.0]]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = greedy_tokens(torch.tensor(rows, dtype=dtype)).tolist()
        assert found == [1, NON_FINITE, NON_FINITE, NON_FINITE, 0]


@pytest.mark.parametrize(("total", "reason"), [(-3.5, "eos"), (NAN, "non-finite"), (None, "eos")])
def test_a_text_of_vllm_whose_log_probability_is_nan_failed(total: float | None, reason: str) -> None:
    from qwen_eval.engines.vllm.engine import _completion

    item = SimpleNamespace(text="!", token_ids=[0], finish_reason="stop", stop_reason=None, cumulative_logprob=total)
    assert _completion(item, Generate(prompt=Prompt.raw("x"), max_new_tokens=1)).finish_reason == reason


def test_the_command_ends_with_a_count_the_layer_and_a_way_out(overflowing: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "qwen_eval", "task=mmlu", "task.data=bundled", "limit=8", "model.name=broken"]
    run += [f"model.path={overflowing}", "model.dtype=fp16", "model.device=cpu", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "8 of 8 samples failed: non-finite logits" in done.stderr
    assert "NaN or infinity from layers.1 in float16" in done.stderr
    assert "try model.dtype=bf16 or fp32" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["kind"] == "eval"
