"""Room to think, the checkpoint's sampling, cut replies and the template's digest, in whole runs without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, TaskSpec, check
from qwen_eval.core import (
    JSON,
    Completion,
    Completions,
    ConfigError,
    EngineError,
    Generate,
    Request,
    Sampling,
    StoreError,
)
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.runs.evaluate import evaluate
from qwen_eval.runs.run import Run
from qwen_eval.tasks.registry import task_class


class Model(FakeEngine):
    """Says of itself what `facts` say, and is cut at the limit in the first `num_cut` replies."""

    def __init__(self, *, num_cut: int = 0, **facts: JSON) -> None:
        super().__init__(self.reply)
        self.facts, self.num_left = facts, num_cut

    @property
    def info(self) -> Mapping[str, JSON]:
        return {**super().info, **self.facts}

    def reply(self, request: Request) -> str | Completions:
        self.num_left -= 1
        if self.num_left < 0:
            return "The answer is 3."
        return Completions(completions=(Completion(text="I think", finish_reason="length", num_tokens=9),))


def spec(tmp_path: Path, name: str = "gsm8k", **settings: object) -> EvalSpec:
    task: TaskSpec = task_class(name).Spec(name=name, data="bundled", limit=20, **settings)
    model = ModelSpec(name="m", chat=True)
    return check(EvalSpec(task=task, model=model, engine=EngineSpec(name="fake"), run_dir=str(tmp_path / "run")))


def run(spec: EvalSpec, engine: FakeEngine) -> Run:
    return evaluate(spec, lambda _: engine)


def generated(engine: FakeEngine) -> list[Generate]:
    return [request for request in engine.calls if isinstance(request, Generate)]


@pytest.mark.parametrize(("thinks", "limit"), [(True, 512 + 32768), (False, 512), (None, 512)])
@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "humaneval", "bbh"])
def test_a_model_that_thinks_gets_room_for_it(tmp_path: Path, name: str, thinks: bool | None, limit: int) -> None:
    engine = Model(thinks=thinks)
    run(spec(tmp_path, name), engine)
    assert {request.max_new_tokens for request in generated(engine)} == {limit}


def test_the_room_to_think_is_a_setting_and_none_in_base_form(tmp_path: Path) -> None:
    engine = Model(thinks=True)
    run(spec(tmp_path, max_new_tokens=100, thinking_tokens=1000), engine)
    assert generated(engine)[0].max_new_tokens == 1100
    base = Model(thinks=True)
    run(spec(tmp_path / "base", mode="base"), base)
    assert generated(base)[0].max_new_tokens == 512


def test_a_finished_run_of_a_thinking_model_is_recalled_without_loading_it(tmp_path: Path) -> None:
    run(spec(tmp_path), Model(thinks=True, chat_template="abc"))

    def must_not_open(_: EvalSpec) -> FakeEngine:
        raise AssertionError("opened")

    assert evaluate(spec(tmp_path), must_not_open).was_finished


def test_another_chat_template_is_another_run(tmp_path: Path) -> None:
    whole = spec(tmp_path)
    engine = Model(chat_template="abc")
    engine._fail_at = 5
    with pytest.raises(EngineError, match="fails at request"):
        run(whole, engine)
    with pytest.raises(StoreError, match="chat_template: "):
        run(whole, Model(chat_template="xyz"))


@pytest.mark.parametrize(("num_cut", "warned"), [(1, False), (2, True)])
def test_a_run_with_more_than_one_in_twenty_replies_cut_says_so(tmp_path: Path, num_cut: int, warned: bool) -> None:
    outcome = run(spec(tmp_path), Model(num_cut=num_cut))
    warning = "10.0 % of the replies were cut at the limit of new tokens; raise task.max_new_tokens"
    assert (warning in outcome.warnings) is warned


def test_replies_are_drawn_as_the_checkpoint_says_where_that_is_asked(tmp_path: Path) -> None:
    facts = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    for name in ("gsm8k", "mmlu"):
        engine = Model(sampling=facts)
        run(spec(tmp_path / name, name, sampling="checkpoint", seed=7), engine)
        assert {request.sampling for request in generated(engine)} == {Sampling(**facts, seed=7)}
    greedy = Model(sampling=facts)
    run(spec(tmp_path), greedy)
    assert {request.sampling for request in generated(greedy)} == {Sampling()}


def test_sampling_that_is_not_known_or_not_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the engine knows no"):
        run(spec(tmp_path, sampling="checkpoint"), Model())
    with pytest.raises(ConfigError, match="letters, which are not drawn"):
        run(spec(tmp_path, "mmlu", sampling="checkpoint", mode="base"), Model())
    with pytest.raises(ConfigError, match="sampling=often"):
        spec(tmp_path, sampling="often")
