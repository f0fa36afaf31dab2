"""Every table the product prints, in terminals of five widths and without one: no number is cut, nothing is obeyed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_runs import answered, chose, documents, record, said, write, write_profile, write_run

from qwen_eval import cli, demo
from qwen_eval.config import EvalSpec, ModelSpec, TaskSpec
from qwen_eval.core import JSON, Metric
from qwen_eval.models.machine import known
from qwen_eval.profile.config import ProfileSpec
from qwen_eval.profile.plan import plan_tables
from qwen_eval.report.__main__ import main
from qwen_eval.report.compare import compare_paths
from qwen_eval.report.detail import compare_tables
from qwen_eval.report.gate import gate, gate_tables
from qwen_eval.report.html import page
from qwen_eval.report.published import published_tables
from qwen_eval.report.runs import find_runs
from qwen_eval.report.tables import layouts
from qwen_eval.report.tradeoffs import tradeoffs
from qwen_eval.runs.record_json import metric_to_json
from qwen_eval.runs.regrade import Regraded, regraded_table
from qwen_eval.runs.run import Run
from qwen_eval.runs.summary import metrics_table
from qwen_eval.tables import Cell, Table, csv_text, metric_cell, number_cell, render, text_cell, to_terminal
from qwen_eval.terminal import plain_text, text_width, wrapped

WIDTHS = (60, 80, 100, 120, 160)
NUMBER = re.compile(r"\d[\d.,]*")
NAMES = ("qwen-1.8b-chat", "qwen-7b-chat-int4", "qwen2.5-72b-instruct-gptq-int4")
WIDE = Metric(value=1234.567, low=43.72, high=26543.21, n=123_456, kind="ppl", unit="ppl", num_clusters=12)
SHARE = Metric(value=0.283, low=0.152, high=0.414, n=1_319)


def some_runs(root: Path) -> Path:
    subjects = {f"accuracy/subject_{i}": SHARE for i in range(3)}
    lengths = {f"ppl/{n}": WIDE for n in (1024, 2048, 4096, 8192, 16384)}
    for i, model in enumerate(NAMES):
        records = answered([1.0, 0.0, 1.0, float(i > 0)] * 30)
        write_run(root, records, model=model, limit=20 if i == 1 else None)
        write_run(
            root, records, task="mmlu", model=model, metrics={"accuracy": SHARE, "accuracy/stem": SHARE, **subjects}
        )
        write_run(root, documents([2.0, 2.1, 2.2]), task="long_ppl", model=model, metrics={"ppl": WIDE, **lengths})
        cells = [
            profile_cell(mode, seq, batch)
            for mode in ("generate", "encode")
            for seq in (2048, 8192)
            for batch in (1, 4)
        ]
        path = write_profile(root, [40.123, 42.456, 41.789], model=model)
        write(path / "result.json", {"cells": cells, "device": {"name": "Test CPU"}, "engine": {"dtype": "bfloat16"}})
    write_run(root, answered([1.0]), task="mbpp", finished=False)
    return root


def profile_cell(mode: str, seq: int, batch: int) -> dict[str, Any]:
    return {
        "name": f"{mode} {seq}", "key": f"{mode}-{seq}-{batch}", "mode": mode, "seq": seq, "batch": batch,
        "status": "ok", "prompt_tokens": 1, "new_tokens": seq, "tok_per_s": [1040.1, 1042.2, 1039.3],
        "ttft_s": [0.0213], "prefill_share": 0.42, "tpot_s": {"p50": 0.02345, "p90": 0.03456, "p99": 0.04567},
        "prefill_tok_per_s": [12345.6], "load_s": 12.3,
        "peak_bytes": 18 * 2**30, "reserved_bytes": 19 * 2**30, "predicted_bytes": 17 * 2**30, "decode_share": 0.81,
        "device": {"bandwidth": 2.1e11, "flops": 9.87e12}, "load_peak_bytes": 16 * 2**30, "joules_per_token": 1.23,
    }  # fmt: skip


def of_report(root: Path) -> list[Table]:
    runs = find_runs([some_runs(root)])
    return [table for make in layouts(runs).values() for table in make()] + published_tables(runs)


def of_compare(root: Path) -> list[Table]:
    write_run(root / "a", answered([1.0, 0.0, 1.0] * 50), task="gsm8k", model=NAMES[0])
    write_run(root / "b", answered([1.0, 1.0, 0.0] * 50), task="gsm8k", model=NAMES[2])
    choices = [[record(f"c{i}", chose(i % 4, noise=x), float(i % 2)) for i in range(9)] for x in (0.0, 0.1)]
    for side, rows, nll in zip("ab", choices, (2.0, 2.2)):
        write_run(root / side, rows, task="mmlu")
        write_run(root / side, documents([nll, 2.1, 2.3]), task="long_ppl")
    return compare_tables(compare_paths([str(root / "a"), str(root / "b")]))


def of_gate(root: Path) -> list[Table]:
    before = write_run(root / "before", answered([1.0, 0.0, 1.0] * 50), model=NAMES[2])
    write_run(root / "now", answered([1.0, 0.0, 0.0] * 50), model=NAMES[2])
    write_run(root / "now", answered([1.0, 0.0, 0.0] * 50), model=NAMES[1])
    write_profile(root / "before", [40.1, 41.2, 40.7])
    write_profile(root / "now", [30.1, 31.2, 30.7])
    assert main([f"accept={before.parents[3]}", f"gate={root / 'baselines'}"]) == 0
    return gate_tables(gate(root / "baselines", [str(root / "now")]))


def of_a_run(root: Path) -> list[Table]:
    spec = EvalSpec(task=TaskSpec(name="mmlu"), model=ModelSpec(name=NAMES[2]))
    metrics = {"accuracy": SHARE, "ppl": WIDE, **{f"accuracy/a_subject_of_a_long_name_{i}": SHARE for i in range(30)}}
    result: dict[str, JSON] = {
        "metrics": {name: metric_to_json(metric) for name, metric in metrics.items()},
        "rates": {"truncated": metric_to_json(SHARE)}, "n": 1_319, "partial": {"limit": 1_319},
        "warnings": ["12,345 prompts of 14,042 were cut to 2,047 tokens, as the official script does"],
    }  # fmt: skip
    run = Run(path=root, spec={}, result=result, was_finished=True)
    graded = Regraded(path=root, old=metrics, new=metrics, num_changed=1, n=1_319, warnings=run.warnings)
    return [metrics_table(spec, run), regraded_table(graded)]


def of_demo(root: Path) -> list[Table]:
    suite = demo.load_suite(cli.conf_dir() / "demo.yaml")
    lines = [demo.Line(cell=cell.name, what=what, metric=WIDE) for cell in suite.cells for what in cell.show.values()]
    return [demo.suite_table(suite.title.format(parameters="3.1 M"), lines)]


def of_plan(root: Path) -> list[Table]:
    arch = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 22016,
            "vocab_size": 151936, "model_type": "qwen", "kv_channels": 128, "seq_length": 8192}  # fmt: skip
    spec = ProfileSpec(model=ModelSpec(name=NAMES[2], weights="random", arch=arch), seq=[2048, 8192], batch=[1, 16])
    return plan_tables(spec, known("NVIDIA A100-SXM4-80GB", "bf16"), is_packed=False)


PRINTED: dict[str, Callable[[Path], list[Table]]] = {
    "report": of_report, "compare": of_compare, "gate": of_gate, "end of run and regrade": of_a_run, "demo": of_demo,
    "plan": of_plan,
}  # fmt: skip


def left_out(text: str) -> list[str]:
    found = re.search(r"not shown at \d+ columns: (.*?); a wider", " ".join(text.split()))
    return found[1].split(", ") if found else []


def numbers(cells: Sequence[str]) -> Counter[str]:
    return Counter(number for cell in cells for number in NUMBER.findall(cell))


@pytest.mark.parametrize("command", PRINTED)
def test_every_number_is_whole_or_its_column_is_named_as_left_out(command: str, tmp_path: Path) -> None:
    tables = PRINTED[command](tmp_path)
    assert len(tables) > 0
    for table in tables:
        for width in (*WIDTHS, None):
            text = to_terminal(table, width)
            assert width is None or max(map(text_width, text.splitlines())) <= width, f"{table.name} at {width}"
            gone = left_out(text)
            assert set(gone) <= set(table.optional)
            shown = [i for i, column in enumerate(table.columns) if column not in gone]
            wanted = numbers([plain_text(row[i].text) for row in table.rows for i in shown])
            assert not wanted - numbers([text]), f"{table.name} at {width}: {wanted - numbers([text])}"
            assert width is not None or not gone


def test_a_terminal_of_eighty_columns_gets_no_wider_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some_runs(tmp_path)
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        assert main([f"runs={tmp_path}"]) == 0
        assert max(map(text_width, capsys.readouterr().out.splitlines())) <= width
    monkeypatch.delenv("COLUMNS")
    assert main([f"runs={tmp_path}"]) == 0
    assert "not shown" not in capsys.readouterr().out


def test_without_a_terminal_numbers_take_the_width_they_need() -> None:
    columns = tuple(f"column {i}" for i in range(40))
    table = Table(title="t", columns=columns, rows=(tuple(metric_cell(WIDE) for _ in columns),), optional=columns[5:])
    assert to_terminal(table).count(metric_cell(WIDE).text) == 40


def test_a_terminal_too_narrow_for_one_column_beside_the_names_shows_lines() -> None:
    table = Table(title="t", columns=("model", "score"), rows=((text_cell("qwen"), metric_cell(WIDE)),))
    assert "score: 1234.6 +25308.6/−1190.8" in " ".join(to_terminal(table, 22).split())


def test_words_are_wrapped_and_no_number_within_them() -> None:
    assert wrapped("a 123456 b", 8) == ["a 123456", "b"]
    assert wrapped("设" * 12 + "123456" + "设" * 12, 24) == ["设" * 12, "123456" + "设" * 9, "设" * 3]
    path = "/tmp/runs/eval/gsm8k/qwen-7b-chat/default"
    assert "".join(line.strip() for line in wrapped(path, 20)) == path
    assert wrapped("", 10) == [""]


# --- CSV and JSON ----------------------------------------------------------------------------------------------------


def test_pandas_reads_every_table_with_numbers_as_numbers(tmp_path: Path) -> None:
    some_runs(tmp_path / "runs")
    out = tmp_path / "all.csv"
    assert main([f"runs={tmp_path / 'runs'}", f"out={out}"]) == 0
    frame = pd.read_csv(out)
    assert {"models", "runs", "profile", "long", "problems"} <= set(frame["table"])
    assert all(frame[key].dtype.kind == "f" for key in ("value", "low", "high", "n"))
    score = frame[(frame.table == "runs") & (frame.task == "mmlu") & (frame.column == "score")]
    assert score[["value", "low", "high", "n"]].to_numpy().tolist() == [[0.283, 0.152, 0.414, 1319]] * 3
    long = frame[(frame.table == "long") & (frame.column == "16384")]
    assert long.low.tolist() == [43.72] * 3
    groups = frame[frame.table == "groups-mmlu"]
    assert groups[["low", "high"]].notna().all().all()


def test_a_comparison_gives_its_p_values_and_intervals_as_numbers(tmp_path: Path) -> None:
    of_compare(tmp_path)
    outs = [tmp_path / "c.csv", tmp_path / "c.json"]
    assert main([f"compare={tmp_path / 'a'},{tmp_path / 'b'}", f"out={outs[0]},{outs[1]}"]) == 0
    frame = pd.read_csv(outs[0])
    p_values = frame[(frame.table == "verdicts") & (frame.column == "p (Holm)")]
    assert p_values.p.dtype.kind == "f"
    assert p_values.p.notna().sum() == len(p_values) - p_values.p.isna().sum() > 0
    report = json.loads(outs[1].read_text())
    verdicts = next(table for table in report["tables"] if table["name"] == "verdicts")
    delta = next(row["Δ [95 %]"] for row in verdicts["rows"] if row["task"] == "gsm8k")
    assert delta["low"] < delta["value"] < delta["high"]
    assert (delta["n"], delta["value"]) == (150, 0.0)
    assert list(pd.json_normalize(verdicts["rows"])["p (Holm).p"].dropna())


def test_json_holds_no_nan(tmp_path: Path) -> None:
    cell = Cell(text="inf", value=float("inf"), low=float("nan"))
    text = render([Table(title="t", columns=("x", "x"), rows=((cell, number_cell(1)),))], "json")
    row = json.loads(text, parse_constant=pytest.fail)["tables"][0]["rows"][0]
    assert row == {"x": {"value": None, "text": "inf"}, "x (2)": {"value": 1, "text": "1.0"}}


# --- hostile text ----------------------------------------------------------------------------------------------------

HOSTILE = "=cmd|' /C calc'!A0\x1b[2J\x1b]0;x\x07\u202egnp.exe\u2066\u200b\x9b31m\r\n\U000e0041"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")


def hostile_runs(root: Path) -> Path:
    for side, score in (("a", 1.0), ("b", 0.0)):
        name = "".join(c for c in HOSTILE if c not in "/\x00")
        rows = [
            record(f"{HOSTILE}{i}", said(HOSTILE), score, extracted=HOSTILE, group=HOSTILE, target=HOSTILE)
            for i in range(3)
        ]
        metrics = {"accuracy": SHARE, f"accuracy/{HOSTILE}": SHARE}
        write_run(
            root / side, rows, model=name, tag=HOSTILE.replace("/", ""), metrics=metrics, benchmark={"split": HOSTILE}
        )
    return root


@pytest.mark.parametrize("form", ["terminal", "md", "csv", "json", "tex", "html"])
def test_no_rendering_passes_on_what_is_obeyed(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = hostile_runs(tmp_path / "runs")
    for question in (f"runs={root}", f"compare={root / 'a'},{root / 'b'}"):
        assert main([question, f"format={form}"]) == 0
        out = capsys.readouterr().out
        assert "gnp.exe" in out
        assert not OBEYED.search(out), OBEYED.findall(out)


def test_an_error_line_passes_on_nothing_either(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs=/nowhere\x1b[2J\u202egnp.exe"]) == 2
    error = capsys.readouterr().err
    assert "gnp.exe" in error
    assert not OBEYED.search(error)


def test_a_page_of_hostile_samples_holds_nothing_obeyed(tmp_path: Path) -> None:
    text = page(HOSTILE, [], [str(hostile_runs(tmp_path))])
    assert not OBEYED.search(text)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert "\\u001b" not in json.dumps(data)


def test_no_csv_field_is_a_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = hostile_runs(tmp_path)
    for question in (f"runs={root}", f"compare={root / 'a'},{root / 'b'}"):
        assert main([question, "format=csv"]) == 0
        for row in csv.reader(io.StringIO(capsys.readouterr().out)):
            for field in row:
                assert not field.startswith(("=", "+", "-", "@", "\t", "\r")) or float(field) is not None


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+cmd", "'+1+cmd"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1", "' =1"),
        ("\t=1", "' =1"),
        ("＝1+1", "'＝1+1"),
        ("-5", "-5"),  # a number is one
        ("qwen-7b", "qwen-7b"),
    ],
)
def test_a_formula_is_quoted(text: str, field: str) -> None:
    assert csv_text(text) == field


def test_plain_text_shows_what_it_does_not_pass_on() -> None:
    assert plain_text("a\x1b[31m\u202eb\r\nc\td\u3000e\ud800") == "a\\x1b[31m\\x202eb⏎c d e\\xd800"
    assert plain_text("设 ±5 Δ") == "设 ±5 Δ"


# --- the plot of unlike runs -----------------------------------------------------------------------------------------


def test_runs_of_other_settings_or_tasks_share_no_dot(tmp_path: Path) -> None:
    for model in NAMES:
        write_profile(tmp_path, [40.0, 41.0], model=model)
        write_run(tmp_path, answered([1.0, 0.0] * 30), model=model, limit=60)
    write_run(tmp_path, answered([1.0] * 20), model=NAMES[0], limit=20, tag="short")
    write_run(tmp_path, answered([1.0] * 20), task="mmlu", model=NAMES[1])
    found = tradeoffs(find_runs([tmp_path]))
    assert {point.name: point.score for point in found.points} == {f"{name} BF16": 0.5 for name in NAMES}
    assert any("left out: qwen-1.8b-chat [short] BF16" in note and "other settings" in note for note in found.notes)
    assert "not shown: mmlu; scores are not averaged" in found.notes


def test_ours_beside_published_tells_apart_runs_of_one_name(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_run(tmp_path / place, answered([1.0] * 50 + [0.0] * 50))
    (table,) = published_tables(find_runs([tmp_path]))
    assert table.columns[2] == "run"
    assert {row[2].text for row in table.rows} == {"a", "b"}


def test_two_runs_of_one_name_are_left_out_of_the_plot_by_name(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_run(tmp_path / place, answered([1.0, 0.0]))
    write_profile(tmp_path, [40.0])
    write_profile(tmp_path, [50.0], model="other")
    write_run(tmp_path, answered([1.0, 0.0]), model="other")
    found = tradeoffs(find_runs([tmp_path]))
    assert [point.name for point in found.points] == ["other BF16"]
    assert found.notes == ("left out: qwen-7b-chat BF16: 2 runs of gsm8k",)


# --- what was compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reading", "score", "finding"),
    [
        ("The answer is A.", "A", 1.0, "identical"),
        ("So it is A.", "A", 1.0, "no difference in what was read, 50 of 150 answers in other words"),
        ("The answer is A.", "A)", 1.0, "no difference in the scores, 50 of 150 answers were read differently"),
        ("The answer is B.", "B", 0.0, "50 of 150 scores differ"),
    ],
)
def test_what_is_the_same_is_said_word_by_word(
    text: str, reading: str, score: float, finding: str, tmp_path: Path
) -> None:
    first = answered([1.0] * 150)
    second = [
        record(item.sample_id, said(text), score, extracted=reading) if i < 50 else item for i, item in enumerate(first)
    ]
    paths = [str(write_run(tmp_path / side, rows)) for side, rows in (("a", first), ("b", second))]
    tables = {table.name: table for table in compare_tables(compare_paths(paths))}
    row = [cell.text for cell in tables["compared"].rows[0]]
    assert (row[2], row[-1]) == ("150", finding)


def test_scored_text_has_no_reading_that_could_be_the_same(tmp_path: Path) -> None:
    paths = [
        str(write_run(tmp_path / side, documents([x, 2.0]), task="long_ppl")) for side, x in (("a", 2.0), ("b", 2.1))
    ]
    tables = {table.name: table for table in compare_tables(compare_paths(paths))}
    row = [cell.text for cell in tables["compared"].rows[0]]
    assert row[2:] == ["2", "1", "–", "–", "1 of 2 with other log-probabilities"]
