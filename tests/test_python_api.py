"""The Python API makes the same runs as the commands, with the same checks, and `import qwen_eval` stays instant."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report_runs
import toy
from tiny_checkpoint import write_tiny_qwen2

import qwen_eval
from qwen_eval.__main__ import main
from qwen_eval.api import override

ROOT = Path(__file__).parent.parent
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def evaluate(**given: Any) -> qwen_eval.Run:
    given = {"task": "mmlu", "engine": "fake", "limit": 6, **given}
    return qwen_eval.evaluate(**given)


def test_the_example_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in PYTHON_BLOCK.findall((ROOT / "docs" / "python.md").read_text()):
        exec(block, scope)
    said = capsys.readouterr().out
    assert re.search(r"^accuracy 0\.\d+, 95 % interval", said)
    assert 'task.shot: no such key; did you mean "task.shots"?' in said


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qwen_eval; print([m for m in ('torch', 'pandas', 'hydra', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(qwen_eval, name) is not None for name in qwen_eval.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        qwen_eval.__getattr__("evalute")


def test_a_run_from_python_is_the_run_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = evaluate(settings={"task.shots": 2, "task.data": "bundled"})
    assert not run.was_finished
    assert main(["task=mmlu", "engine=fake", "limit=6", "task.shots=2", "task.data=bundled"]) == 0
    again = evaluate(settings={"task.shots": 2, "task.data": "bundled"})
    assert again.was_finished
    assert (again.path, again.metrics) == (run.path, run.metrics)
    assert run.path.parts[:2] == ("runs", "eval")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "mmlv"}, 'task=mmlv: unknown; did you mean "mmlu"?'),
        ({"task": "mmlu,ceval"}, "task=mmlu,ceval: unknown"),
        ({"model": "qwen-7"}, "model=qwen-7: unknown"),
        ({"limit": 0}, "task.limit=0: a number of samples"),
        ({"settings": {"modle": "x"}}, 'modle: no such key; did you mean "model"?'),
        ({"settings": {"+task.shot": 1}}, 'task.shot: no such key; did you mean "task.shots"?'),
        ({"settings": {"limit": 3}}, "limit= is given twice: 6 and 3"),
        ({"settings": {"task.subjects": ["x", "y"]}}, "task.subjects=x: not a subject of mmlu"),
        ({"settings": {"tag": "${oc.env:HOME}"}}, "not filled in, since every setting is recorded"),
        ({"settings": {"model.dtype": "fp17"}}, 'did you mean "fp16"?'),
    ],
)
def test_a_mistake_is_an_exception_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qwen_eval.QwenEvalError) as caught:
        evaluate(**given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("spec.json"))


def test_a_checkpoint_given_by_its_path_is_named_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = write_tiny_qwen2(tmp_path)
    toy.register()
    run = evaluate(task="mmlu", engine="native", model=place, limit=2, settings={"task.shots": 0})
    assert (run.model, run.model_spec["asset"]) == (place.name, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (0.5, "0.5"),
        ("qwen-7b", "qwen-7b"),
        ("2048,4096", "'2048,4096'"),
        ("null", "'null'"),
        ("12", "'12'"),
        ("it's", r"'it\'s'"),
        (Path("数据/a b"), "'数据/a b'"),
        (["a", "b c"], "[a,'b c']"),
        ({"type": "x", "n": 2}, "{type:x,n:2}"),
    ],
)
def test_values_are_written_as_the_command_line_writes_them(value: Any, text: str) -> None:
    assert override("key", value) == f"key={text}"


def test_texts_arrive_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reply = "The answer is 'B', [not] {A}: it's \\ 100 %"
    run = evaluate(settings={"engine.fake_reply": reply, "model.system": "Be brief, and say why.", "task.mode": "chat"})
    config = json.loads((run.path / "spec.json").read_text())["config"]
    assert config["engine"]["fake_reply"] == reply
    assert config["model"]["system"] == "Be brief, and say why."
    assert run.samples().extracted.tolist() == ["B"] * 6


def test_an_engine_cache_opens_an_engine_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with qwen_eval.EngineCache() as cache:
        evaluate(cache=cache, run_dir="a")
        first = cache.engine
        evaluate(cache=cache, run_dir="b", task="ceval")
        assert cache.engine is first
    assert cache.engine is None


def test_samples_are_a_table_of_what_was_asked_and_read(tmp_path: Path) -> None:
    place = report_runs.write_run(tmp_path, report_runs.answered([1, 0, 1]))
    frame = qwen_eval.load_run(place).samples()
    assert frame.score.tolist() == [1.0, 0.0, 1.0]
    assert frame.reply.tolist()[1] == "The answer is B."
    assert frame.prompt.tolist()[0].startswith("Question: q0?")
    scored = report_runs.write_run(tmp_path, report_runs.documents([2.0]), task="long_ppl")
    row = qwen_eval.load_run(scored).samples().iloc[0]
    assert (row.logprob, row.num_scored_tokens, row.reply) == (pytest.approx(-400, rel=1e-5), 200, None)


def test_two_runs_are_compared_by_object_or_directory(tmp_path: Path) -> None:
    sides = [
        report_runs.write_run(tmp_path / name, report_runs.answered(scores))
        for name, scores in (("a", [1] * 60), ("b", [1] * 30 + [0] * 30))
    ]
    (judgement,) = qwen_eval.compare(qwen_eval.load_run(sides[0]), sides[1])
    assert judgement.verdict == "worse"
    assert len(judgement.comparison.flips) == 30
    with pytest.raises(qwen_eval.QwenEvalError, match="margin=0: points or per cent"):
        qwen_eval.compare(*sides, margin=0)
    with pytest.raises(qwen_eval.QwenEvalError, match="no such directory"):
        qwen_eval.compare(sides[0], tmp_path / "missing")
