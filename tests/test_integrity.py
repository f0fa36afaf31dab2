"""A run that is not what was run is called damaged by every reader; what can be made again from the records is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_runs
import toy

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, check
from qwen_eval.core import DataError, QwenEvalError, StoreError
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.report.__main__ import main as report
from qwen_eval.report.runs import find_runs
from qwen_eval.runs.evaluate import evaluate
from qwen_eval.runs.integrity import damage_of
from qwen_eval.runs.regrade import RegradeSpec, regrade
from qwen_eval.runs.regrade_command import main as regrade_command
from qwen_eval.runs.run import Run, load_run
from qwen_eval.runs.seal import sealed

Change = Callable[[Path], None]


@pytest.fixture(autouse=True)
def _toy_is_a_task() -> None:
    toy.register()


def spec(tmp_path: Path, **changes: Any) -> EvalSpec:
    parts = {"task": toy.ToySpec(name="toy", num=20), "model": ModelSpec(name="m"), "engine": EngineSpec(name="fake")}
    return check(EvalSpec(**{**parts, "run_dir": str(tmp_path / "r"), **changes}))


def run(tmp_path: Path, engine: FakeEngine | None = None, **changes: Any) -> Run:
    return evaluate(spec(tmp_path, **changes), lambda _: engine or FakeEngine())


# --- what may happen to a finished run -------------------------------------------------------------------------------


def lines(directory: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = directory / "records.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def json_file(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    def apply(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        change(value)
        (directory / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    return apply


def other_score(rows: list[bytes]) -> list[bytes]:
    row = json.loads(rows[3])
    row["grade"]["score"] = 1.0 - row["grade"]["score"]
    return [*rows[:3], json.dumps(row).encode() + b"\n", *rows[4:]]


RECORDS: dict[str, tuple[Change, str]] = {
    "doubled": (lambda d: lines(d, lambda rows: [*rows, rows[0]]), "records.jsonl has 21 records, it had 20"),
    "missing": (lambda d: lines(d, lambda rows: rows[:-1]), "records.jsonl has 19 records, it had 20"),
    "none": (lambda d: (d / "records.jsonl").unlink(), "records.jsonl has 0 records, it had 20"),
    "edited": (lambda d: lines(d, other_score), "records.jsonl was changed after the run"),
    "exchanged": (lambda d: lines(d, lambda rows: [*rows[:-1], rows[0]]), "records.jsonl was changed"),
    "settings": (
        json_file("spec.json", lambda s: s["config"].update(protocol="upstream")), "spec.json was changed after the run"
    ),
}  # fmt: skip
RESULT: dict[str, tuple[Change, str]] = {
    "value": (
        json_file("result.json", lambda r: r["metrics"]["accuracy"].update(value=0.99)),
        "result.json was changed after the run",
    ),
    "cut": (lambda d: (d / "result.json").write_bytes((d / "result.json").read_bytes()[:200]), "result.json"),
    "empty": (lambda d: (d / "result.json").write_bytes(b""), "result.json"),
    "list": (lambda d: (d / "result.json").write_text("[]"), "result.json: not a JSON object"),
    "object": (lambda d: (d / "result.json").write_text("{}"), "result.json is empty"),
}


@pytest.mark.parametrize("name", [*RECORDS, *RESULT])
def test_damage_is_told_by_report_gate_and_regrade(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, said = (RECORDS | RESULT)[name]
    directory = run(tmp_path).path
    assert damage_of(directory) is None
    assert report([f"accept={directory}", f"gate={tmp_path / 'base'}"]) == 0
    assert report([f"runs={directory}", f"gate={tmp_path / 'base'}"]) == 0
    change(directory)
    capsys.readouterr()
    found = find_runs([directory])
    assert not found.runs
    assert found.unreadable[0].reason.startswith("damaged: ")
    assert said in found.unreadable[0].reason
    assert report([f"runs={directory}", f"gate={tmp_path / 'base'}"]) in (1, 3)
    assert "damaged" in " ".join(capsys.readouterr().out.split())
    assert regrade_command([f"run={directory}"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_another_format_is_not_read_and_nothing_is_to_be_deleted(tmp_path: Path) -> None:
    directory = run(tmp_path).path
    json_file("spec.json", lambda s: s.update(format=2))(directory)
    with pytest.raises(StoreError, match=r"spec\.json has format 2, this version reads 1"):
        regrade(RegradeSpec(run=str(directory)))
    with pytest.raises(StoreError, match=r"format 2, this version reads 1; pass run_dir=DIR to keep both"):
        run(tmp_path)
    assert "format 2" in find_runs([directory]).unreadable[0].reason


@pytest.mark.parametrize("name", RECORDS)
def test_a_run_with_other_records_is_not_recalled(tmp_path: Path, name: str) -> None:
    change, said = RECORDS[name]
    directory = run(tmp_path).path
    change(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(StoreError) as caught:
        run(tmp_path)
    assert said in str(caught.value)
    assert "overwrite" not in str(caught.value)
    assert "tag=" not in str(caught.value)  # the directory was named by run_dir=
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("name", RESULT)
def test_a_damaged_result_is_made_again_from_the_records(tmp_path: Path, name: str) -> None:
    first = run(tmp_path)
    RESULT[name][0](first.path)
    engine = FakeEngine()
    again = run(tmp_path, engine)
    assert engine.calls == []
    assert again.metrics == first.metrics
    assert again.result["run"]["num_resumed"] == 20
    assert damage_of(first.path) is None
    assert run(tmp_path).was_finished


def test_a_run_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert regrade_command(["run=a", "run=b"]) == 2
    assert "run= is given twice: a and b" in capsys.readouterr().err


def test_an_untouched_run_is_intact_wherever_it_is_copied(tmp_path: Path) -> None:
    directory = run(tmp_path).path
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    json_file("result.json", lambda _: None)(copy)  # written again by another program, with the same content
    assert damage_of(copy) is None
    assert regrade(RegradeSpec(run=str(copy))).num_changed == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: lines(d, lambda rows: [*rows[:-1], rows[0]]), "has sample q0 twice"),
        (lambda d: lines(d, lambda rows: rows[:-1]), "has 3 records, result.json is of 4"),
        (lambda d: lines(d, other_score), "the records give 1, result.json says 0.75"),
        (json_file("result.json", lambda r: r["metrics"]["accuracy"].update(value=1)), "result.json says 1"),
    ],
)
def test_a_run_of_before_the_seal_is_computed_again(tmp_path: Path, change: Change, said: str) -> None:
    directory = report_runs.write_run(tmp_path, report_runs.answered([1, 1, 1, 0]))
    assert damage_of(directory) is None
    change(directory)
    damage = damage_of(directory)
    assert damage is not None
    assert said in damage.reason


def test_the_advice_is_a_way_that_this_user_has(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(StoreError, match=r"pass run_dir=DIR to keep both") as caught:
        run(tmp_path, protocol="upstream")
    assert "tag=" not in str(caught.value)
    runs = {"run_dir": None, "runs_dir": str(tmp_path / "runs")}
    run(tmp_path, **runs)
    with pytest.raises(StoreError, match=r"pass tag=NAME to keep both"):
        run(tmp_path, **runs, protocol="upstream")


# --- a sample is one row ---------------------------------------------------------------------------------------------


def test_two_samples_of_one_id_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = toy.Toy.samples
    monkeypatch.setattr(toy.Toy, "samples", lambda self: [*once(self), once(self)[3]])
    with pytest.raises(DataError, match=r"task=toy: two samples have the id toy/3"):
        run(tmp_path)
    assert not (tmp_path / "r" / "records.jsonl").exists()


def test_an_unfinished_run_with_a_doubled_record_is_not_gone_on_with(tmp_path: Path) -> None:
    directory = run(tmp_path).path
    (directory / "result.json").unlink()
    lines(directory, lambda rows: [*rows[:5], rows[0]])
    with pytest.raises(StoreError, match="twice or of another run"):
        run(tmp_path)


# --- somebody else's directory ---------------------------------------------------------------------------------------


def deep(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"[" * 200_000)


def endless(directory: Path, name: str) -> None:
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)


def huge(directory: Path, name: str) -> None:
    with (directory / name).open("r+b") as file:
        file.truncate(1 << 40)  # a file with a hole: no disk is used


def wrong_types(directory: Path, name: str) -> None:
    value = {"spec.json": {"format": 1, "kind": [], "config": [1], "decides": "x"}}.get(name, {"metrics": {"a": [3]}})
    (directory / name).write_text(json.dumps(value) + "\n")


@pytest.mark.parametrize("harm", [deep, endless, huge, wrong_types])
@pytest.mark.parametrize("name", ["spec.json", "records.jsonl", "result.json"])
def test_a_hostile_file_is_one_line_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path, str], None], name: str
) -> None:
    directory = run(tmp_path).path
    harm(directory, name)
    start = time.perf_counter()
    with contextlib.suppress(QwenEvalError):
        damage_of(directory)
    with contextlib.suppress(QwenEvalError):
        load_run(directory)
    assert regrade_command([f"run={directory}"]) == 2
    assert report([f"compare=[{directory},{directory}]"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert report([f"runs={directory}"]) == 0
    assert "unreadable" in capsys.readouterr().out
    with contextlib.suppress(StoreError):
        run(tmp_path)
    assert time.perf_counter() - start < 10  # two seconds a command, on a busy machine


@pytest.mark.parametrize("value", [[], {}, "x", -1, 10**400])
@pytest.mark.parametrize("key", ["n", "value", "low", "num_clusters"])
def test_a_sealed_result_of_other_types_is_damaged(tmp_path: Path, key: str, value: Any) -> None:
    directory = run(tmp_path).path
    result = json.loads((directory / "result.json").read_text())
    row = result if key == "n" else result["metrics"]["accuracy"]
    row[key] = value
    spec_json = json.loads((directory / "spec.json").read_text())
    forged = sealed(result, spec_json, directory / "records.jsonl")
    (directory / "result.json").write_text(json.dumps(forged))
    damage = damage_of(directory)
    assert (damage is None) is (value == -1 and key in ("value", "low"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample_id", []), ("sample_id", 3), ("num_prompt_tokens", ["x"]), ("num_prompt_tokens", 3), ("grade", []),
        ("score", "x"), ("score", 10**400), ("answers", "x"), ("answers", [{}]), ("text", []), ("text", None),
    ],
)  # fmt: skip
def test_a_record_of_other_types_is_named(tmp_path: Path, key: str, value: Any) -> None:
    directory = report_runs.write_run(tmp_path, report_runs.answered([1, 0]))
    rows = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    owner = {"score": rows[1]["grade"], "text": rows[1]["answers"][0]["completions"][0]}.get(key, rows[1])
    owner[key] = value
    (directory / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StoreError, match=r"records\.jsonl, line 2: not (a record|JSON)"):
        load_run(directory)


def test_a_link_in_place_of_the_lock_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match=r"/r: Too many levels of symbolic links"):
        run(tmp_path)
    assert (tmp_path / "precious").read_text() == "keep me"


def test_a_stored_configuration_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    directory = run(tmp_path).path
    (directory / "result.json").unlink()
    json_file("spec.json", lambda s: s["config"].update(tag="${oc.env:A_SECRET}"))(directory)
    (directory / "result.json").write_text('{"metrics": {}, "n": 20}')
    with pytest.raises(StoreError, match=r"holds \$\{…\}, which no run of ours writes"):
        regrade(RegradeSpec(run=str(directory)))
