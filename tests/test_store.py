"""The run directory keeps what was graded, refuses what does not belong, and says so in one line."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_eval.core import (
    Answer,
    ChoiceLogprobs,
    Completion,
    Completions,
    Grade,
    Metric,
    Record,
    StoreError,
    TokenLogprobs,
)
from qwen_eval.runs.record_json import metric_from_json, metric_to_json, record_from_json, record_to_json
from qwen_eval.runs.run import load_run
from qwen_eval.runs.store import FORMAT, RunDirectory, differences, read_records, write_json

F32 = struct.unpack("<f", struct.pack("<f", -0.1))[0]
ANSWERS: tuple[Answer, ...] = (
    ChoiceLogprobs(logprobs=(-0.1, -math.pi), num_tokens=(1, 1), logits=(1e-30, 2.0), logsumexp=0.3),
    TokenLogprobs(token_ids=(0, 151935), logprobs=(F32, -1e20), num_greedy=1),
    Completions(
        completions=(Completion(text="答\u2028案\n\ud83d", finish_reason="eos", num_tokens=2, token_ids=(1, 2)),)
    ),
)


def record(number: int = 0) -> Record:
    grade = Grade(score=0.1 + 0.2, extracted="答", values={"nll": -F32}, flags=("truncated",))
    return Record(
        sample_id=f"s/{number}",
        group="组",
        cluster="",
        target={"gold": ["A"]},
        prompts=("问\n？",),
        prompt_sha256=("00",),
        num_prompt_tokens=(3,),
        answers=ANSWERS,
        grade=grade,
    )


def spec(**changes: object) -> dict[str, object]:
    decides = {"model": {"dtype": "bf16", "name": "m"}, "protocol": "robust", "shots": (5,), **changes}
    return {"format": FORMAT, "kind": "eval", "decides": decides}


def filled(directory: Path, num: int = 3) -> Path:
    with RunDirectory.open(directory) as run:
        run.check_spec(spec())
        for number in range(num):
            run.append(record(number))
    return directory / "records.jsonl"


def test_a_record_comes_back_exactly_and_stays_readable() -> None:
    line = json.dumps(record_to_json(record()), ensure_ascii=False)
    again = record_from_json(json.loads(line))
    assert again.answers[0] == ANSWERS[0]
    assert again.answers[2] == ANSWERS[2]
    assert isinstance(again.answers[1], TokenLogprobs)
    assert again.answers[1].logprobs[0] == F32
    assert (again.grade, again.target, again.prompts) == (record().grade, record().target, record().prompts)
    assert "答" in line


def test_an_undefined_metric_is_null_and_comes_back_undefined() -> None:
    row = metric_to_json(Metric(value=float("nan"), n=0))
    assert json.loads(json.dumps(row, allow_nan=False))["value"] is None
    assert math.isnan(metric_from_json(row).value)


def test_noise_of_the_batch_shape_is_not_stored() -> None:
    one, other = (
        Metric(value=0.0024939194 + noise, low=1e-9 + noise, high=0.5, n=3, kind="mean") for noise in (0, 1e-11)
    )
    assert metric_to_json(one) == metric_to_json(other)
    assert metric_to_json(one)["value"] == 0.00249392
    assert metric_to_json(Metric(value=1 / 3, n=3))["value"] == 1 / 3  # a share is counted, so it is exact
    assert metric_to_json(Metric(value=0.0, n=3, kind="mean"))["value"] == 0.0
    assert metric_to_json(Metric(value=float("inf"), n=3, kind="ppl", low=1.0))["low"] == 1.0


def test_the_line_a_kill_cut_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        assert len(list(read_records(path))) == 2
        with RunDirectory.open(tmp_path) as run:
            run.append(record(2))
        assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"{]\n", b"{}\n", b"3\n", lines[1].replace(b'"type":"tokens"', b'"type":"tokenz"')):
        path.write_bytes(lines[0] + damaged + lines[2])
        with pytest.raises(StoreError, match=r"records\.jsonl, line 2"):
            list(read_records(path))


def test_another_spec_is_refused_with_its_differences(tmp_path: Path) -> None:
    filled(tmp_path)
    before = (tmp_path / "records.jsonl").read_bytes()
    with RunDirectory.open(tmp_path) as run:
        run.check_spec(spec())  # the same one resumes, tuples and lists alike
        with pytest.raises(
            StoreError, match=r"model\.dtype: bf16 → fp16; protocol: robust → upstream;.*tag="
        ) as caught:
            run.check_spec(spec(model={"dtype": "fp16", "name": "m"}, protocol="upstream"))
        assert "overwrite" not in str(caught.value)  # there are records to lose
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_overwriting_forgets_the_other_run(tmp_path: Path) -> None:
    filled(tmp_path)
    with RunDirectory.open(tmp_path) as run:
        run.check_spec(spec(protocol="upstream"), overwrite=True)
        assert run.records() == []
    assert load_run(tmp_path).spec["decides"]["protocol"] == "upstream"


def test_differences_name_leaves_added_and_removed() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "d": [3]}}) == ["a.d: nothing → [3]", "c: 2 → nothing"]


def test_one_process_writes_a_run(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from qwen_eval.runs.store import RunDirectory; "
        "r = RunDirectory.open(pathlib.Path(sys.argv[1]))"
    )
    with RunDirectory.open(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert f"process {os.getpid()} is writing this run" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True).returncode == 0


def test_a_directory_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Not a directory") as caught:
        RunDirectory.open(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import record, spec
from qwen_eval.core import StoreError
from qwen_eval.runs.store import RunDirectory
with RunDirectory.open(Path(sys.argv[1])) as run:
    run.check_spec(spec())
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        for number in range(100): run.append(record(number))
    except StoreError as error:
        sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path, Path(__file__).parent], capture_output=True, text=True)
    assert "File too large; what was saved before is kept and valid" in done.stderr
    assert done.stderr.count("\n") == 1
    data = (tmp_path / "records.jsonl").read_bytes()
    assert data.endswith(b"\n")
    num = len(list(read_records(tmp_path / "records.jsonl")))
    assert num > 0
    with RunDirectory.open(tmp_path) as run:  # room again
        run.append(record(num))
    assert (tmp_path / "records.jsonl").read_bytes().startswith(data)
    assert len(list(read_records(tmp_path / "records.jsonl"))) == num + 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_no_space_for_a_record_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    with RunDirectory.open(tmp_path) as run, pytest.raises(StoreError, match="No space left on device; what was saved"):
        run.append(record())


def test_a_failed_result_leaves_the_old_one(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"n": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "result.json", {"n": object()})
    assert json.loads((tmp_path / "result.json").read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_what_is_no_run_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not a run directory, it has no spec\.json"):
        load_run(tmp_path)
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        load_run(tmp_path)
