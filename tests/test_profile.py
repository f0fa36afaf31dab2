"""The grid, its clock and its command: what is measured is said, what failed is a row, what is missing is filled."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.config import ModelSpec
from qwen_eval.core import ModelError, StoreError
from qwen_eval.models.load import open_forward
from qwen_eval.models.machine import known
from qwen_eval.profile import grid
from qwen_eval.profile.__main__ import main
from qwen_eval.profile.cells import GridCell, cells
from qwen_eval.profile.child import published_sampling, runner
from qwen_eval.profile.config import ProfileSpec, check
from qwen_eval.profile.measure import Recorder, Repetition, quantile, summary
from qwen_eval.report.__main__ import main as report
from qwen_eval.report.profile import write_tables

SMALL = {
    "model_type": "qwen2", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 8, "intermediate_size": 2048, "vocab_size": 8192, "tie_word_embeddings": False,
}  # fmt: skip


def cell(mode: str = "generate", batch: int = 1, prompt: int = 1, new: int = 4) -> GridCell:
    seq = new if mode == "generate" else prompt
    sizes = {"seq": seq, "batch": batch, "prompt_tokens": prompt, "new_tokens": new}
    return GridCell(mode=mode, kv_cache="auto", attention="auto", **sizes)


# --- the clock -------------------------------------------------------------------------------------------------------


def scripted(*times: float) -> Callable[[], float]:
    return iter(times).__next__


def test_times_are_those_of_the_clock() -> None:
    recorder = Recorder(1, clock=scripted(10.0, 10.5, 10.6, 10.8, 11.0))
    recorder.start()
    for _ in range(3):
        recorder.step(1)
    run = recorder.stop()
    assert (run.total_s, run.ttft_s) == (1.0, 0.5)
    assert run.steps_s == pytest.approx((0.1, 0.2))


def test_the_first_token_of_a_batch_is_there_when_every_sequence_has_one() -> None:
    recorder = Recorder(5, clock=scripted(0.0, 1.0, 2.0, 3.0, 3.5, 4.0))
    recorder.start()
    for rows in (2, 2, 1, 5):  # three packed prefills, then one step of all
        recorder.step(rows)
    run = recorder.stop()
    assert (run.ttft_s, run.steps_s, run.total_s) == (3.0, (0.5,), 4.0)


def test_the_device_is_waited_for_before_the_clock_is_read() -> None:
    said: list[str] = []

    def clock() -> float:
        said.append("clock")
        return float(len(said))

    recorder = Recorder(1, clock=clock, synchronise=lambda: said.append("wait"))
    recorder.start()
    recorder.step(1)
    recorder.stop()
    assert said == ["wait", "clock", "clock", "wait", "clock"]  # and not inside


def test_every_repetition_is_kept_and_steps_of_all_make_the_quantiles() -> None:
    runs = [
        Repetition(total_s=2.0, ttft_s=1.0, steps_s=(0.2, 0.4)),
        Repetition(total_s=4.0, ttft_s=2.0, steps_s=(1.4,)),
    ]
    found = summary(cell("serve", batch=2, prompt=10, new=3), runs)
    assert found["tok_per_s"] == [3.0, 1.5]
    assert found["prefill_tok_per_s"] == [20.0, 10.0]
    assert found["decode_tok_per_s"] == pytest.approx([2 * 2 / 0.6, 2 / 1.4])
    assert found["tpot_s"]["p50"] == 0.4
    assert found["tpot_s"]["mean"] == pytest.approx(2 / 3)
    assert summary(cell("encode", prompt=100, new=1), [Repetition(total_s=2, ttft_s=2, steps_s=())])["tok_per_s"] == [
        50
    ]


def test_quantiles_are_linear_between_neighbours() -> None:
    assert [quantile([1.0, 2.0, 3.0, 5.0], q) for q in (0, 0.5, 0.9, 1)] == pytest.approx([1, 2.5, 4.4, 5])
    assert quantile([7.0], 0.99) == 7.0


@pytest.fixture(scope="module")
def tiny() -> ProfileSpec:
    model = ModelSpec(name="qwen-tiny", asset="qwen-tiny", weights="random", device="cpu", dtype="fp32")
    return check(ProfileSpec(model=model, max_batch_tokens=16))


def test_a_cell_generates_exactly_what_it_says(tiny: ProfileSpec) -> None:
    """No token ends a sequence: with random weights every token comes up, end tokens too."""
    ticks = itertools.count().__next__
    what = cell("serve", batch=3, prompt=8, new=40)
    once = runner(open_forward(tiny.model), tiny, what, clock=lambda: float(ticks()))
    run = once(40)
    assert len(run.steps_s) == 39
    assert run.ttft_s == 2.0  # 16 tokens at a time: two sequences, then the third
    assert once(1).steps_s == ()


def test_the_published_protocol_samples_as_the_checkpoint_says(tmp_path: Path) -> None:
    chat = ProfileSpec(model=ModelSpec(name="x", asset="qwen-tiny", weights="random", chat=True))
    sampling = published_sampling(chat)
    assert (sampling.top_p, sampling.repetition_penalty, sampling.seed) == (0.8, 1.1, 1024)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "repetition_penalty": 1.2, "top_p": null}')
    sampling = published_sampling(ProfileSpec(model=ModelSpec(name="x", path=str(tmp_path))))
    assert (sampling.temperature, sampling.repetition_penalty, sampling.top_p) == (0.0, 1.2, 0.8)


# --- the grid --------------------------------------------------------------------------------------------------------

DEVICE = {"kind": "cpu", "name": "Test CPU", "dtype": "fp32", "num_threads": 1, "bandwidth": 1e10, "flops": 1e11}


def measured(spec: ProfileSpec, what: GridCell) -> dict[str, Any]:
    speed = 1000.0 / what.length
    return {
        "status": "ok", "tok_per_s": [speed, speed * 1.1, speed * 0.9], "ttft_s": [0.1],
        "peak_bytes": 2**30 + what.length,
        "tpot_s": {"p50": 0.1, "p90": 0.2, "p99": 0.3, "mean": 0.1}, "device": DEVICE,
        "engine": {"dtype": "float32", "is_random": True}, "decode_share": 0.5, "prefill_share": None,
    }  # fmt: skip


class Bench:
    """Instead of child processes: rows by cell, and which cells were asked for."""

    def __init__(self, **outcomes: Any) -> None:
        self.outcomes, self.asked = outcomes, list[str]()

    def __call__(self, spec: ProfileSpec, what: GridCell) -> dict[str, Any]:
        self.asked.append(what.key)
        outcome = self.outcomes.get(f"{what.mode}{what.seq}")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome or measured(spec, what)


@pytest.fixture
def spec(tmp_path: Path, tiny: ProfileSpec) -> ProfileSpec:
    return dataclasses.replace(tiny, seq=[8, 16, 32], runs_dir=str(tmp_path / "runs"), quiet=True)


def run_grid(spec: ProfileSpec, bench: Bench) -> Path:
    """As the command runs it: with the tables beside the result."""
    return grid.run_grid(spec, bench, shown=partial(write_tables, published=spec.published))


def result(spec: ProfileSpec) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((grid.run_directory(spec) / "result.json").read_text())
    return value


def test_out_of_memory_and_a_killed_child_are_rows_and_the_grid_goes_on(
    spec: ProfileSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(generate8={"status": "oom", "reason": "no room"}, generate16=grid._row(-9, b"", "boom\n"))
    run_grid(spec, bench)
    found = result(spec)
    assert [row["status"] for row in found["cells"]] == ["oom", "killed", "ok"]
    assert "SIGKILL" in found["cells"][1]["reason"]
    assert found["partial"] == {}
    assert report([f"runs={spec.runs_dir}", "layout=profile", "format=md"]) == 0
    shown = capsys.readouterr().out
    assert "OOM" in shown
    assert "killed" in shown
    assert "| qwen-tiny† | FP32 | as the model | Test CPU, 1 thread |" in shown


def test_the_same_command_fills_only_what_is_missing(spec: ProfileSpec) -> None:
    first = Bench(generate8={"status": "oom"}, generate16={"status": "killed", "reason": "SIGKILL"})
    run_grid(spec, first)
    again = Bench()
    run_grid(spec, again)
    assert again.asked == ["generate 1x1+16"]  # it did not fit is an answer, it was killed is none
    wider = Bench()
    run_grid(dataclasses.replace(spec, mode=["generate", "encode"], seq=[8, 64]), wider)
    assert wider.asked == ["generate 1x1+64", "encode 1x8+1", "encode 1x64+1"]
    assert len(result(spec)["cells"]) == 6


def test_ctrl_c_leaves_a_valid_partial_table(spec: ProfileSpec) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_grid(spec, Bench(generate16=KeyboardInterrupt()))
    found = result(spec)
    assert (len(found["cells"]), found["partial"]) == (1, {"cells": "1 of 3"})
    assert r"111.1 \[100.0, 122.2\]" in (grid.run_directory(spec) / "profile.md").read_text()
    again = Bench()
    run_grid(spec, again)
    assert again.asked == ["generate 1x1+16", "generate 1x1+32"]


def test_another_way_of_measuring_is_refused_in_the_same_directory(spec: ProfileSpec) -> None:
    run_grid(spec, Bench())
    with pytest.raises(StoreError, match="repetitions: 3 → 5"):
        run_grid(dataclasses.replace(spec, repetitions=5), Bench())
    other = {**measured(spec, cells(spec)[0]), "device": {**DEVICE, "name": "Other CPU"}}
    with pytest.raises(StoreError, match="Other CPU"):
        run_grid(dataclasses.replace(spec, seq=[64]), Bench(generate64=other))
    run_grid(dataclasses.replace(spec, repetitions=5, overwrite=True), Bench())


def test_a_model_that_is_not_there_ends_the_grid_at_once(spec: ProfileSpec) -> None:
    bench = Bench(generate8={"status": "failed", "reason": "no config.json there", "error": "ModelError"})
    with pytest.raises(ModelError, match=r"no config\.json there"):
        run_grid(spec, bench)
    assert len(bench.asked) == 1


def test_tables_are_written_in_every_form_and_speak_of_random_weights(spec: ProfileSpec) -> None:
    path = run_grid(dataclasses.replace(spec, batch=[1, 4]), Bench())
    assert "Peak memory by batch, GiB" in (path / "profile.md").read_text()
    assert "† random weights" in (path / "profile.md").read_text()
    assert (path / "profile.csv").read_text().startswith("table,row,model,precision,what,")
    assert r"\begin{tabular}" in (path / "profile.tex").read_text()


def test_published_rows_stand_beside_ours_with_the_device(
    spec: ProfileSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelSpec(name="qwen-7b-chat", weights="random", arch=SMALL, device="cpu", dtype="bf16")
    seven = dataclasses.replace(spec, model=model, mode=["generate", "encode"], seq=[2048, 8192], kv_cache=["int8"])
    run_grid(dataclasses.replace(seven, kv_cache=["auto"]), Bench())
    report([f"runs={spec.runs_dir}", "published=true", "format=csv"])
    rows = capsys.readouterr().out.splitlines()
    assert any("40.93" in row and "ours Test CPU, published A100-SXM4-80G" in row for row in rows)
    assert any("16.99" in row and "encoding" in row and "random weights" in row for row in rows)
    assert not any("int8 cache" in row for row in rows)
    run_grid(seven, Bench())
    report([f"runs={spec.runs_dir}", "published=true", "format=csv"])
    assert any(",15.8," in row and "int8 cache" in row for row in capsys.readouterr().out.splitlines())


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """Two sizes of a model of 33 million parameters, each in its own process."""
    model = ModelSpec(name="small", weights="random", arch=SMALL, device="cpu", dtype="fp32")
    whole = ProfileSpec(model=model, repetitions=1, warmup_tokens=1, num_threads=1)
    with pytest.MonkeyPatch.context() as patch:
        # freed blocks go back at once: else glibc keeps some, and the resident set is not that of the tensors
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        asked = [cell("encode", prompt=512, new=1), cell("serve", batch=4, prompt=128, new=3)]
        return {what.mode: grid.in_child(check(whole), what) for what in asked}


@pytest.mark.parametrize("mode", ["encode", "serve"])
def test_the_predicted_peak_is_what_a_process_takes(rows: dict[str, dict[str, Any]], mode: str) -> None:
    row = rows[mode]
    assert row["status"] == "ok", row
    taken = row["peak_bytes"] - row["baseline_bytes"]
    assert row["predicted_bytes"] == pytest.approx(taken, rel=0.05)


def test_a_row_carries_its_ceiling(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["serve"]
    assert 0 < row["decode_share"] < 1.5  # a busy machine may be measured slower than it ran
    assert row["device"]["bandwidth"] > 1e8
    assert row["device"]["num_threads"] == 1
    assert row["engine"]["is_random"] is True
    assert row["joules_per_token"] is None
    assert rows["encode"]["decode_share"] is None
    assert "tpot_s" not in rows["encode"]


def test_what_does_not_fit_is_told_by_the_child(tiny: ProfileSpec) -> None:
    huge = cell("generate", batch=4000, new=2000)  # 2 GB of cache
    row = grid.in_child(dataclasses.replace(tiny, memory_gib=0.5), huge)
    assert (row["status"], row["reason"]) == ("oom", "4000 sequences do not fit at once")


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed", "SIGKILL"),
        ("raise SystemExit('no driver')", "failed", "no driver"),
        ("import time; time.sleep(60)", "timed out", "timeout_s=0.5"),
    ],
)
def test_however_a_child_ends_there_is_a_row(
    tiny: ProfileSpec, monkeypatch: pytest.MonkeyPatch, code: str, status: str, reason: str
) -> None:
    monkeypatch.setattr(grid, "CHILD", ("-c", code))
    row = grid.in_child(dataclasses.replace(tiny, timeout_s=0.5 if "sleep" in code else 30), cell())
    assert row["status"] == status
    assert reason in row["reason"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["seq=2048,8192"], ["generate 1x1+2048", "generate 1x1+8192"]),
        (["seq=2048"], ["generate 1x1+2048"]),
        (["seq=[2048]"], ["generate 1x1+2048"]),
        (
            ["-m", "model=qwen-tiny,qwen-1.8b", "model.weights=random", "seq=2048,8192"],
            ["generate 1x1+2048", "generate 1x1+8192"] * 2,
        ),
        (
            ["profile=readme"],
            ["generate 1x1+2048", "generate 1x1+8192", "encode 1x2048+1", "encode 1x8192+1"],
        ),
        (["profile=kv_length", "seq=512"], ["generate 1x1+512", "generate kv=int8 1x1+512"]),
        (["profile=kv_batch", "batch=100", "kv_cache=int8"], ["generate kv=int8 100x1+1024"]),
    ],
)
def test_the_commands_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], keys: list[str]
) -> None:
    bench = Bench()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "in_child", bench)
    assert main([*arguments, "quiet=true"]) == 0
    assert bench.asked == keys
    models = 2 if "-m" in arguments else 1
    assert len(list((tmp_path / "runs" / "profile" / "speed").glob("*/*/result.json"))) == models


def test_presets_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "in_child", Bench())
    assert [main(["seq=8", *preset, "quiet=true"]) for preset in ([], ["profile=readme"], ["profile=kv_length"])] == [
        0
    ] * 3
    tags = sorted(path.parent.name for path in tmp_path.glob("runs/profile/speed/*/*/result.json"))
    assert tags == ["default", "kv_length", "readme"]


@pytest.mark.parametrize("wanted", ["RTX-4090", "rtx 4090", "4090", "NVIDIA GeForce RTX 4090", "GeForce_RTX_4090"])
def test_a_device_is_found_however_its_name_is_written(wanted: str) -> None:
    assert known(wanted, "bf16").name == "NVIDIA GeForce RTX 4090"


def test_a_plan_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["plan=true", "model=qwen-72b-chat-int4", "seq=8192", "on=A100-SXM4-80GB"]) == 0
    shown = capsys.readouterr().out
    assert "72,287,920,128 parameters" in shown
    assert "78.49" in shown  # the published law of this cell
    fits = next(line for line in shown.splitlines() if line.strip().startswith("generate"))
    assert " yes " in fits
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sqe=2048"], 'sqe: no such key; did you mean "seq"?'),
        (["seq=0"], "seq=[0]: one or more sizes of at least 1"),
        (["seq=two"], "seq[0]: Value 'two' of type 'str' could not be converted to Integer"),
        (["mode=encod"], 'mode=encod: unknown; did you mean "encode"?'),
        (["profile=readm"], 'profile=readm: unknown; did you mean "readme"?'),
        (["kv_cache=int4"], 'kv_cache=int4: unknown; did you mean "int8"?'),
        (["new_tokens=4"], "use mode=serve"),
        (["on=A100-SXM4-80GB"], "with plan=true only"),
        (["repetitions=0"], "repetitions=0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert shown.out == ""


def test_a_typo_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from qwen_eval.profile.__main__ import main; main(['sqe=1']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert 'did you mean "seq"?' in done.stderr
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(done.stdout.split())
