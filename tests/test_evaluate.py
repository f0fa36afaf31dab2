"""The loop asks what is not graded yet, whatever happened before, and always comes to the same numbers."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from unhurried import SAYS_NO_STAGES

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, check
from qwen_eval.core import (
    Answer,
    ChoiceLogprobs,
    Completion,
    Completions,
    ConfigError,
    EngineError,
    StoreError,
    TokenLogprobs,
)
from qwen_eval.data.sources import draw
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.runs.evaluate import evaluate, run_spec, selected
from qwen_eval.runs.regrade import RegradeSpec, regrade
from qwen_eval.runs.run import Run, load_run
from qwen_eval.tasks.registry import TaskContext, build, task_class

TOY = [sys.executable, str(Path(toy.__file__))]


@pytest.fixture(autouse=True)
def _toy_is_a_task() -> None:
    toy.register()


def spec(tmp_path: Path, **changes: object) -> EvalSpec:
    task = toy.ToySpec(name="toy", num=40)
    parts = {
        "task": task,
        "model": ModelSpec(name="m"),
        "engine": EngineSpec(name="fake"),
        "run_dir": str(tmp_path / "r"),
    }
    return check(EvalSpec(**{**parts, **changes}))  # type: ignore[arg-type]


def metrics_section(run: Path) -> bytes:
    """The bytes of result.json up to the end of its metrics and rates."""
    text = (run / "result.json").read_bytes()
    return text[: text.index(b'"run": {')]


def run_with(spec: EvalSpec, engine: FakeEngine) -> Run:
    return evaluate(spec, lambda _: engine)


def test_every_sample_is_asked_its_turns_and_kept(tmp_path: Path) -> None:
    engine = FakeEngine()
    outcome = run_with(spec(tmp_path), engine)
    assert outcome.num_samples == 40
    assert len(engine.calls) == 40 + 8  # every fifth is asked twice
    run = load_run(outcome.path)
    assert {len(record.answers) for record in run.records} == {1, 2}
    assert run.result["metrics"]["accuracy"]["value"] == outcome.metrics["accuracy"].value
    assert run.result["run"]["num_samples"] == 40
    first = run.records[-1]
    assert first.prompts[0].startswith("第toy/")
    assert first.num_prompt_tokens[0] == len(first.prompts[0].encode())


def test_a_failure_keeps_what_was_graded_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run_with(spec(tmp_path, run_dir=str(tmp_path / "whole")), FakeEngine())
    for fail_at in (0, 1, 20, 13):
        with pytest.raises(EngineError):
            run_with(spec(tmp_path), FakeEngine(fail_at=fail_at))
    engine = FakeEngine()
    outcome = run_with(spec(tmp_path), engine)
    assert len(engine.calls) < 40
    assert outcome.result["run"]["num_resumed"] > 0
    assert metrics_section(tmp_path / "r") == metrics_section(tmp_path / "whole")


NAN, INFINITY = float("nan"), float("inf")
OVERFLOWS: list[Answer] = [
    ChoiceLogprobs(logprobs=(NAN, NAN), num_tokens=(1, 1), logits=(NAN, NAN), logsumexp=NAN),
    ChoiceLogprobs(logprobs=(-1.0, -INFINITY), num_tokens=(2, 2)),
    ChoiceLogprobs(logprobs=(-1.0, -1.0), num_tokens=(1, 1), logits=(1.0, 1.0), logsumexp=INFINITY),
    TokenLogprobs(token_ids=(1, 2), logprobs=(-1.0, NAN)),
    Completions(completions=(Completion(text="!!", finish_reason="non-finite", num_tokens=2),)),
]


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_a_run_with_non_finite_answers_is_not_finished_and_counts_them(tmp_path: Path, overflow: Answer) -> None:
    bad = FakeEngine(lambda request: overflow if "toy/3" in str(request.prompt) else None)
    with pytest.raises(EngineError, match=r"^11 of 40 samples failed: non-finite logits \(toy/3: .*not finished"):
        run_with(spec(tmp_path), bad)
    run = tmp_path / "r"
    assert not (run / "result.json").exists()
    good = FakeEngine()
    assert run_with(spec(tmp_path), good).num_samples == 40
    assert len({str(request.prompt) for request in good.calls}) >= 11  # the failed ones alone are asked again
    assert len(good.calls) < 40


def test_a_finished_run_is_recalled_without_loading_an_engine(tmp_path: Path) -> None:
    first = run_with(spec(tmp_path), FakeEngine())

    def must_not_open(_: EvalSpec) -> FakeEngine:
        raise AssertionError("opened")

    again = evaluate(spec(tmp_path), must_not_open)
    assert again.was_finished
    assert again.metrics == first.metrics
    forced = run_with(spec(tmp_path, overwrite=True), FakeEngine())
    assert not forced.was_finished


def test_a_task_that_needs_the_tokenizer_is_recalled_too(tmp_path: Path) -> None:
    task = toy.ToySpec(name="toy", num=5, needs_tokenizer=True)
    run_with(spec(tmp_path, task=task), FakeEngine())
    engine = FakeEngine()
    run_with(spec(tmp_path, task=task), engine)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": toy.ToySpec(name="toy", num=41)}, "task.num: 40 → 41"),
        ({"limit": 7}, "task.limit: nothing → 7"),
        ({"model": ModelSpec(name="m", dtype="fp32")}, "model.dtype: auto → fp32"),
        ({"protocol": "upstream"}, "protocol: robust → upstream"),
        ({"engine": EngineSpec(name="fake", fake_reply="B")}, "engine.fake_reply:  → B"),
    ],
)
def test_what_decides_the_numbers_cannot_change_within_a_run(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    run_with(spec(tmp_path), FakeEngine())
    with pytest.raises(StoreError) as caught:
        run_with(spec(tmp_path, **change), FakeEngine())
    assert named in str(caught.value)
    assert len(load_run(tmp_path / "r").records) == 40


@pytest.mark.parametrize(
    ("name", "has_programs"),
    [("humaneval", True), ("mbpp", True), ("code_interpreter", True), ("hf_agent", True), ("gsm8k", False)],
)
def test_where_a_models_programs_are_run_the_version_of_python_decides_too(name: str, has_programs: bool) -> None:
    task = build(task_class(name).Spec(name=name), TaskContext())
    stored = run_spec(EvalSpec(task=task.spec, model=ModelSpec(name="m")), task, [], {"weights": "w"})
    version = ".".join(platform.python_version_tuple()[:2])
    assert stored["decides"]["packages"].get("python") == (version if has_programs else None)


def test_what_only_costs_time_may_change(tmp_path: Path) -> None:
    run_with(spec(tmp_path), FakeEngine())
    engine = EngineSpec(name="fake", max_batch_size=3, prefix_sharing=False)
    assert run_with(spec(tmp_path, engine=engine, quiet=True), FakeEngine()).was_finished


def test_a_limit_draws_a_part_and_marks_it(tmp_path: Path) -> None:
    outcome = run_with(spec(tmp_path, limit=10), FakeEngine())
    assert outcome.num_samples == 10
    assert outcome.result["partial"] == {"limit": 10}
    more = run_with(spec(tmp_path, limit=20, run_dir=str(tmp_path / "more")), FakeEngine())
    small, large = ({r.sample_id for r in load_run(o.path).records} for o in (outcome, more))
    assert small < large


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "bbh", "nano"])
def test_a_limit_is_drawn_in_one_place_for_every_task(name: str) -> None:
    whole, part = (task_class(name).Spec(name=name, data="bundled", limit=limit) for limit in (None, 7))
    task = build(part, TaskContext())
    assert task.samples() == build(whole, TaskContext()).samples()
    drawn = selected(task, EvalSpec(task=part, model=ModelSpec(name="m")))
    assert drawn == draw(task.samples(), 7, part.seed)
    assert len(drawn) == 7


def test_an_option_without_effect_is_refused_or_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.kv_cache=int8 has no effect in engine=hf; use engine=native"):
        run_with(spec(tmp_path, engine=EngineSpec(name="hf"), model=ModelSpec(name="m", kv_cache="int8")), FakeEngine())
    outcome = run_with(spec(tmp_path, engine=EngineSpec(name="fake", concurrency=3)), FakeEngine())
    assert outcome.warnings == ("engine.concurrency=3 has no effect in engine=fake",)


def test_sigkill_at_random_moments_changes_no_byte_of_the_metrics(tmp_path: Path) -> None:
    arguments = ["task=toy", "model=toy", "engine=fake", "quiet=true"]
    whole = subprocess.run([*TOY, *arguments, "run_dir=whole"], cwd=tmp_path, capture_output=True, timeout=60)
    assert whole.returncode == 0, whole.stderr
    command = [*TOY, *arguments, "run_dir=killed", "engine.fake_delay_s=0.02"]
    records, num_kills = tmp_path / "killed" / "records.jsonl", 0
    for goal in (300, 6000, 12000):  # bytes on disk: a kill before they are written proves nothing
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (records.exists() and records.stat().st_size > goal):
            time.sleep(0.005)
        time.sleep(random.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        num_kills += process.wait() == -signal.SIGKILL
    assert num_kills >= 2
    last = subprocess.run(command[:-1], cwd=tmp_path, capture_output=True, timeout=60, text=True)
    assert last.returncode == 0, last.stderr
    assert " resumed" in last.stdout
    assert metrics_section(tmp_path / "killed") == metrics_section(tmp_path / "whole")


def test_ctrl_c_is_one_line_and_keeps_the_records(tmp_path: Path) -> None:
    command = [*TOY, "task=toy", "model=toy", "engine=fake", "run_dir=r", "engine.fake_delay_s=0.4"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    records = tmp_path / "r" / "records.jsonl"
    while process.poll() is None and not (records.exists() and b"\n" in records.read_bytes()):
        time.sleep(0.01)  # the file is there before its first record is
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; graded samples are kept, the same command resumes the run"
    assert "Traceback" not in said
    assert load_run(tmp_path / "r").records


# --- grading again ---------------------------------------------------------------------------------------------------


def test_a_stored_run_is_graded_again_without_a_model(tmp_path: Path) -> None:
    run_with(spec(tmp_path), FakeEngine())
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    outcome = regrade(RegradeSpec(run=str(tmp_path / "r"), protocol="upstream"))
    assert outcome.new["accuracy"].value == 1.0  # the toy's official grader is generous
    assert outcome.old["accuracy"].value < 1.0
    assert outcome.num_changed == round(40 * (1 - outcome.old["accuracy"].value))
    written = json.loads((tmp_path / "r" / "regrade-upstream.json").read_text())
    assert written["metrics"]["accuracy"]["value"] == 1.0
    assert {name: (tmp_path / "r" / name).read_bytes() for name in before} == before


def test_another_protocol_reads_no_answer_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {
        protocol: run_with(spec(tmp_path, protocol=protocol, run_dir=str(tmp_path / protocol)), FakeEngine())
        for protocol in ("robust", "upstream")
    }
    grades = [[record.grade for record in load_run(tmp_path / protocol).stored_records] for protocol in outcomes]
    assert grades[0] == grades[1]
    assert outcomes["robust"].metrics["accuracy"].value < outcomes["upstream"].metrics["accuracy"].value == 1.0
    monkeypatch.setattr(toy.Toy, "grade", None)
    for made, asked in (("robust", "upstream"), ("upstream", "robust")):
        again = regrade(RegradeSpec(run=str(tmp_path / made), protocol=asked))
        assert again.new == outcomes[asked].metrics
        assert again.old == outcomes[made].metrics


def test_a_run_without_both_readings_is_read_again(tmp_path: Path) -> None:
    run_with(spec(tmp_path, protocol="upstream"), FakeEngine())
    robust = run_with(spec(tmp_path, run_dir=str(tmp_path / "robust")), FakeEngine())
    path = tmp_path / "r" / "spec.json"
    path.write_text(path.read_text().replace('"readings": "both"', '"readings": "of the protocol"'))
    records = tmp_path / "r" / "records.jsonl"
    records.write_text(records.read_text().replace('"score":0.0', '"score":1.0'))  # as earlier versions stored it
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    del result["seal"]
    (tmp_path / "r" / "result.json").write_text(json.dumps(result))
    assert regrade(RegradeSpec(run=str(tmp_path / "r"), protocol="robust")).new == robust.metrics


def test_grading_again_by_the_same_protocol_changes_nothing(tmp_path: Path) -> None:
    run_with(spec(tmp_path), FakeEngine())
    outcome = regrade(RegradeSpec(run=str(tmp_path / "r")))
    assert outcome.num_changed == 0
    assert outcome.new == outcome.old


def test_regrade_is_a_command(tmp_path: Path) -> None:
    code = (
        SAYS_NO_STAGES
        + "import sys, toy; toy.register(); from qwen_eval.regrade import main; sys.exit(main(sys.argv[1:]))"
    )
    run_with(spec(tmp_path), FakeEngine())
    environment = {**os.environ, "PYTHONPATH": f"{Path(toy.__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", code, *arguments]
        return subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)

    done = command("run=r", "protocol=upstream")
    assert done.returncode == 0, done.stderr
    assert "of 40 grades changed" in done.stdout
    for wrong, said in (("run=no", "not a run directory"), ("rnu=r", 'did you mean "run"?'), ("protocol=x", "one of")):
        failed = command(wrong) if wrong.startswith("run=") else command("run=r", wrong)
        assert failed.returncode == 2
        assert said in failed.stderr
        assert failed.stderr.count("\n") == 1
