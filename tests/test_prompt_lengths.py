"""The record describes what the model read, and says how many prompts were cut or too long for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from test_choice_tasks import mmlu_folder

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, check
from qwen_eval.core import JSON, ids_sha256
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.runs.evaluate import evaluate
from qwen_eval.runs.run import Run, load_run
from qwen_eval.tasks.mmlu import MmluSpec

LONG = "word " * 900  # bytes are tokens here


class Reading(FakeEngine):
    """An engine that names the longest text it was made for."""

    facts: Mapping[str, JSON] = {}

    @property
    def info(self) -> Mapping[str, JSON]:
        return {**super().info, **self.facts}


def run(tmp_path: Path, protocol: str, facts: Mapping[str, JSON]) -> tuple[Run, Reading]:
    folder = mmlu_folder(tmp_path / "rows", f"{LONG}?,w,x,y,z,D\nShort?,w,x,y,z,D\n")
    task = MmluSpec(name="mmlu", path=str(folder), shots=0)
    parts = {"task": task, "model": ModelSpec(name="m"), "engine": EngineSpec(name="fake"), "protocol": protocol}
    engine = Reading()
    engine.facts = facts
    return evaluate(check(EvalSpec(**parts, run_dir=str(tmp_path / "run"))), lambda _: engine), engine  # type: ignore[arg-type]


def test_under_upstream_the_end_that_was_read_is_recorded(tmp_path: Path) -> None:
    outcome, engine = run(tmp_path, "upstream", {})
    long, short = sorted(load_run(outcome.path).records, key=lambda record: record.sample_id)
    prompt = next(call.prompt for call in engine.calls if LONG in (call.prompt.text or ""))
    ids = engine.render(prompt).ids
    assert (long.num_prompt_tokens, long.prompt_sha256) == ((2047,), (ids_sha256(ids[-2047:]),))
    assert long.prompts == (engine.tokenizer.decode(ids[-2047:]),)
    assert "cut_prompt" in long.grade.flags
    assert "cut_prompt" not in short.grade.flags
    assert outcome.rates["cut_prompt"].value == 0.5
    assert "1 of 2 prompts were cut to their end, as the official script does" in outcome.warnings


def test_under_robust_nothing_is_cut_and_what_is_too_long_is_counted(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "robust", {"train_length": 2048})
    long = min(load_run(outcome.path).records, key=lambda record: record.sample_id)
    assert long.num_prompt_tokens[0] > 3_000
    assert long.prompts[0].endswith("Answer:")
    assert "cut_prompt" not in outcome.rates
    assert [w for w in outcome.warnings if "prompts" in w] == [
        "1 of 2 prompts are longer than the 2048 tokens the model was made for"
    ]


@pytest.mark.parametrize("facts", [{"train_length": 8192}, {"train_length": 2048, "dynamic_ntk": True}, {}])
def test_a_prompt_that_can_be_read_is_no_warning(tmp_path: Path, facts: Mapping[str, JSON]) -> None:
    outcome, _ = run(tmp_path, "robust", facts)
    assert not [w for w in outcome.warnings if "prompts" in w]
