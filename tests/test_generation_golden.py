"""Whole runs of GSM8K on the recorded checkpoint: prompt, greedy decoding and ids as the official scripts got them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from exams import build_checkpoint

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Completions
from qwen_eval.engines import open_engine
from qwen_eval.tasks.gsm8k import Gsm8k
from qwen_eval.tasks.gsm8k import Gsm8kSpec as Spec
from qwen_eval.tasks.registry import TaskContext

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = golden / "eval" / "checkpoint_spec.json"
    if not spec.is_file() or not (golden / "eval" / "generation.jsonl").is_file():
        pytest.skip("no recorded generation among the goldens")
    folder = tmp_path_factory.mktemp("checkpoint")
    build_checkpoint(json.loads(spec.read_text()), folder)
    shutil.copy(DATA / "qwen.tiktoken", folder)
    return folder


@pytest.mark.slow
def test_greedy_ids_equal_the_recorded_ones(golden: Path, checkpoint: Path) -> None:
    lines = (golden / "eval" / "generation.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] in ("gsm8k_base", "gsm8k_chat")]
    assert rows
    model = ModelSpec(name="eval", path=str(checkpoint), dtype="fp32", device="cpu")
    engine = open_engine(EngineSpec(), model, protocol="upstream")
    requests = []
    for row in rows:
        context = TaskContext(protocol="upstream", is_chat=row["kind"] == "gsm8k_chat")
        spec = Spec(path=str(DATA / "gsm8k_test.jsonl.gz"), max_new_tokens=len(row["new_ids"]))
        task = Gsm8k(spec, context)
        request = task.request(task.samples()[row["row"]], [])
        assert request is not None
        requests.append(request)
    answers = dict(engine.run(requests))
    engine.close()
    for i, row in enumerate(rows):
        answer = answers[i]
        assert isinstance(answer, Completions)
        assert list(answer.completions[0].token_ids) == row["new_ids"], (row["kind"], row["row"])
