"""Tables: unlike runs are footnoted, broken ones named, every rendering holds, and the ledger stands beside ours."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from report_runs import answered, documents, record, said, write_profile, write_run

from qwen_eval.core import Metric
from qwen_eval.metrics import share
from qwen_eval.report.__main__ import main
from qwen_eval.report.ledger import contradictions, ledger
from qwen_eval.report.published import published_tables
from qwen_eval.report.runs import find_runs
from qwen_eval.report.settings import differing_settings
from qwen_eval.report.tables import layouts
from qwen_eval.runs.run import load_run, variant_name
from qwen_eval.tables import Cell, Footnote, Table, all_notes, metric_cell, render


def tables(root: Path, name: str) -> list[Table]:
    return layouts(find_runs([root]))[name]()


def shown(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def footnotes(table: Table) -> dict[str, str]:
    """The footnote of each row's first score, by the name of the row."""
    return {row[0].text: next((cell.footnote.text for cell in row if cell.footnote), "") for row in table.rows}


def test_a_run_with_other_settings_is_footnoted(tmp_path: Path) -> None:
    for model in ("qwen-7b-chat", "qwen-14b-chat"):
        write_run(tmp_path, answered([1.0, 0.0]), model=model)
    write_run(tmp_path, answered([1.0, 1.0]), model="qwen-72b-chat", benchmark={"shots": 8}, protocol="upstream")
    write_run(tmp_path, answered([1.0, 1.0]), model="other", benchmark={"data_sha256": "zzz"})
    (table,) = tables(tmp_path, "models")
    found = footnotes(table)
    assert found["qwen-7b-chat"] == found["qwen-14b-chat"] == ""
    assert "shots 8 (column: 0)" in found["qwen-72b-chat"]
    assert "protocol upstream (column: robust)" in found["qwen-72b-chat"]
    assert "other data" in found["other"]
    notes = [note for note in all_notes(table) if "other data" in note]
    assert notes[0][:3] in {row[0]: row[2] for row in shown(table)}["other"]


def test_sampling_number_of_samples_and_time_limit_are_footnoted_in_one_table(tmp_path: Path) -> None:
    greedy = {"temperature": 0.0, "samples_per_problem": 1, "timeout_s": 3.0}
    changes = {"sampled": {"temperature": 0.8}, "five": {"samples_per_problem": 5}, "slow": {"timeout_s": 9.0}}
    for model, change in {"a": {}, "b": {}, **changes}.items():
        write_run(tmp_path, answered([1.0, 0.0]), task="humaneval", model=model, benchmark={**greedy, **change})
    for layout in ("models", "runs"):
        (table,) = tables(tmp_path, layout)
        found = footnotes(table)
        assert found["a"] == found["b"] == ""
        assert found["sampled"] == "settings differ: humaneval: temperature 0.8 (column: 0.0)"
        assert found["five"] == "settings differ: humaneval: samples_per_problem 5 (column: 1)"
        assert found["slow"] == "settings differ: humaneval: timeout_s 9.0 (column: 3.0)"


def test_a_new_task_s_own_key_is_footnoted(tmp_path: Path) -> None:
    for model, value in (("a", 1), ("b", 1), ("c", 2)):
        decides = {"task": {"name": "new", "path": f"/data/{model}", "shots": 0, "beam": {"width": value}}}
        write_run(tmp_path, answered([1.0, 0.0]), task="new", model=model, decides=decides)
    found = footnotes(tables(tmp_path, "models")[0])
    assert found == {"a": "", "b": "", "c": "settings differ: new: beam.width 2 (column: 1)"}


def test_a_new_section_of_what_decides_is_footnoted(tmp_path: Path) -> None:
    for model, value in (("a", "x"), ("b", "x"), ("c", "y")):
        write_run(tmp_path, answered([1.0, 0.0]), model=model, decides={"template": {"sha256": value}})
    found = footnotes(tables(tmp_path, "models")[0])
    assert found["c"] == "settings differ: gsm8k: run.template.sha256 y (column: x)"


def test_what_follows_from_another_setting_is_told_only_alone(tmp_path: Path) -> None:
    for model, limit, prompts in (("a", None, "p"), ("b", None, "p"), ("c", 1, "q"), ("d", None, "q")):
        decides = {"requests_sha256": prompts, "packages": {"torch": "2"}, "engine": {"name": "native"}}
        write_run(tmp_path, answered([1.0] * (limit or 2)), model=model, limit=limit, decides=decides)
    found = footnotes(tables(tmp_path, "models")[0])
    assert found["c"] == "settings differ: gsm8k: limit 1 (column: none)"
    assert found["d"] == "settings differ: gsm8k: other prompts"


def test_engine_and_packages_are_footnoted_and_yet_comparable(tmp_path: Path) -> None:
    usual = {"engine": {"name": "native", "api_model": None}, "packages": {"torch": "2"}}
    for model in ("a", "b"):
        write_run(tmp_path, answered([1.0, 0.0]), model=model, decides=usual)
    path = write_run(tmp_path, answered([1.0, 0.0]), model="c", decides={**usual, "engine": {"name": "hf"}})
    first, second = (load_run(p) for p in (path.parent.parent / "a" / "default", path))
    assert footnotes(tables(tmp_path, "models")[0])["c"] == "settings differ: gsm8k: engine hf (column: native)"
    assert differing_settings(first, second) == []


def test_two_checkpoints_of_one_name_are_two_rows_told_apart_by_their_run(tmp_path: Path) -> None:
    digests = {"old": "sha256:aaaa1111aaaa", "new": "sha256:bbbb2222bbbb"}
    for place, weights in digests.items():
        for task in ("gsm8k", "mmlu"):
            write_run(tmp_path / place, answered([1.0, 0.0]), task=task, decides={"weights": weights})
    (table,) = tables(tmp_path, "models")
    assert table.columns[:3] == ("model", "precision", "run")
    assert [row[2] for row in shown(table)] == ["new (weights bbbb2222)", "old (weights aaaa1111)"]
    assert not any("–" in cell for row in shown(table) for cell in row)  # each row has both of its tasks


def test_one_directory_of_two_checkpoints_gives_no_row_of_both(tmp_path: Path) -> None:
    write_run(tmp_path, answered([1.0, 0.0]), task="gsm8k", decides={"weights": "sha256:aaaa1111"})
    write_run(tmp_path, answered([1.0, 1.0]), task="mmlu", decides={"weights": "sha256:bbbb2222"})
    (table,) = tables(tmp_path, "models")
    assert len(table.rows) == 2
    assert {row[2] for row in shown(table)} == {"gsm8k (weights aaaa1111)", "mmlu (weights bbbb2222)"}


def test_a_second_run_of_the_same_cell_hides_none(tmp_path: Path) -> None:
    write_run(tmp_path / "a", answered([1.0, 0.0]))
    write_run(tmp_path / "b", answered([1.0, 1.0]))
    (table,) = tables(tmp_path, "models")
    assert [(row[2], row[3].split()[0]) for row in shown(table)] == [("a", "50.0"), ("b", "100.0")]


def test_variants_of_a_model_stand_with_their_paired_difference(tmp_path: Path) -> None:
    """Between documents perplexities differ by half, so both intervals are wide; every document got worse by 4 %."""
    nll = [1.5 + 0.2 * i for i in range(12)]
    write_run(tmp_path, documents(nll), task="wiki", dtype="bf16")
    write_run(tmp_path, documents([x + 0.04 + 0.001 * (i % 3) for i, x in enumerate(nll)]), task="wiki",
              model="qwen-7b-chat-int4", quant="gptq-int4")  # fmt: skip
    write_run(tmp_path, answered([1.0, 0.0] * 20), task="gsm8k")
    write_run(tmp_path, answered([1.0, 0.0] * 20), task="gsm8k", model="qwen-14b-chat")
    (table,) = tables(tmp_path, "models")
    assert [name for name in table.columns if name.startswith("Δ")] == ["Δ wiki"]  # gsm8k has one row a model
    place = table.columns.index("Δ wiki")
    deltas = {row[1].text: row[place] for row in table.rows if row[0].text.startswith("qwen-7b")}
    assert deltas["BF16"].text == "reference"
    assert deltas["Int4"].text.startswith("+4.19 % [+4.1")
    assert deltas["Int4"].low is not None
    assert deltas["Int4"].low > 0.04
    scores = {run.variant: run.headline[1] for run in find_runs([tmp_path]).runs if run.headline and run.task == "wiki"}
    assert scores["Int4"].low is not None
    assert scores["Int4"].low < scores["BF16"].value  # side by side the intervals hide it
    for name in ("runs", "quantization"):
        (other,) = tables(tmp_path, name)
        assert any(
            row[other.columns.index("Δ" if name == "runs" else "Δ wiki")].text.startswith("+4.19 %")
            for row in other.rows
        )


def test_a_margin_decides_what_is_equivalent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = [1.0] * 300 + [0.0] * 300
    first = write_run(tmp_path / "a", answered(right))
    second = write_run(tmp_path / "b", answered([0.0] * 6 + right[6:-6] + [1.0] * 6))
    for margin, words in (("margin=1", "not decided (about"), ("margin=3", "equivalent within 3.0 points")):
        assert main([f"compare={first},{second}", margin, "format=md"]) == 0
        assert words in capsys.readouterr().out


def test_a_variant_of_other_prompts_has_no_difference_and_says_why(tmp_path: Path) -> None:
    write_run(tmp_path, answered([1.0, 0.0] * 20))
    write_run(tmp_path, answered([1.0, 0.0] * 20), model="qwen-7b-chat-int4", quant="gptq-int4", benchmark={"shots": 8})
    (table,) = tables(tmp_path, "quantization")
    cell = next(row[-1] for row in table.rows if row[1].text == "Int4")
    assert cell.text == "–"
    assert "shots: 0 against 8" in cell.title


def test_what_cannot_be_used_is_named_and_kept_out_of_the_scores(tmp_path: Path) -> None:
    write_run(tmp_path, answered([1.0] * 4))
    write_run(tmp_path, answered([1.0] * 4), model="half", finished=False)
    write_run(tmp_path, answered([1.0] * 4), model="partial", limit=4)
    write_run(tmp_path, [], model="none", metrics={"accuracy": share([])})
    for name, text in (("cut", '{"format"'), ("list", "[]"), ("alien", '{"results": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(text)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "records.jsonl").write_text("")
    (problems,) = tables(tmp_path, "problems")
    states = {
        Path(row[0]).name if Path(row[0]).name != "default" else Path(row[0]).parent.name: row[1]
        for row in shown(problems)
    }
    assert {k: v.split()[0] for k, v in states.items()} == {
        "cut": "unreadable", "list": "unreadable", "lost": "unreadable", "alien": "foreign", "half": "unfinished",
        "none": "failed",
    }  # fmt: skip
    (models,) = tables(tmp_path, "models")
    assert {row[0] for row in shown(models)} == {"qwen-7b-chat", "partial"}
    assert any("limit" in note for note in all_notes(models))


def test_the_card_layouts(tmp_path: Path) -> None:
    metrics = {name: share([1.0, 0.0]) for name in ("accuracy", "accuracy/stem", "accuracy/anatomy")}
    write_run(tmp_path, answered([1.0, 0.0]), task="mmlu", metrics=metrics)
    write_run(
        tmp_path, answered([1.0, 0.0]), task="mmlu", metrics=metrics, model="qwen-7b-chat-int4", quant="gptq-int4"
    )
    lengths = {f"ppl/{n}": Metric(value=4.23, n=n, kind="ppl", higher_is_better=False) for n in (1024, 2048)}
    write_run(tmp_path, documents([1.0, 2.0]), task="long_ppl", metrics={"ppl": lengths["ppl/1024"], **lengths})
    write_profile(tmp_path, [40.0, 42.0, 41.0])
    (quantized,) = tables(tmp_path, "quantization")
    assert [row[:2] for row in shown(quantized)] == [["qwen-7b-chat", "BF16"], ["qwen-7b-chat", "Int4"]]
    (categories,) = tables(tmp_path, "categories")
    assert categories.columns == ("model", "precision", "average", "stem")
    (groups,) = tables(tmp_path, "groups")
    assert shown(groups)[0][0] == "anatomy"
    (long,) = tables(tmp_path, "long")
    assert long.columns[-2:] == ("1024", "2048")
    (profile,) = tables(tmp_path, "profile")
    assert "41.0 [40.0, 42.0]" in shown(profile)[0]
    assert "18.00" in shown(profile)[0]


@pytest.mark.parametrize(
    ("model", "info", "name"),
    [
        ({"quant": "none", "dtype": "auto"}, {"dtype": "torch.bfloat16"}, "BF16"),
        ({"quant": "gptq-int4", "kv_cache": "int8"}, {"dtype": "float16"}, "Int4, KV int8"),
        ({"quant": "nf4"}, {}, "NF4"),
        ({"dtype": "fp32", "logn": "false", "rope": {"dynamic_ntk": "true"}}, {}, "FP32, NTK, no LogN"),
    ],
)
def test_the_precision_is_named_as_in_the_cards(model: dict[str, object], info: dict[str, object], name: str) -> None:
    assert variant_name(model, info) == name


def test_an_interval_is_shown_as_it_is() -> None:
    assert metric_cell(Metric(value=0.5, n=100, low=0.4, high=0.6)).text == "50.0 ±10.0"
    assert metric_cell(Metric(value=0.98, n=100, low=0.93, high=0.998)).text == "98.0 +1.8/−5.0"
    assert metric_cell(Metric(value=float("nan"), n=0)).text == "–"
    assert (
        metric_cell(Metric(value=5.5, n=9, kind="ppl", low=5.0, high=6.0), footnote=Footnote(mark="[a]", text="")).text
        == "5.500 ±0.500 [a]"
    )


NASTY = Table(
    title="a|b", columns=("x_1", "<b>"), rows=((Cell(text="50 % & $x$ #1 {y}\n\x1b[31m"), Cell(text="1.0", value=1.0)),)
)


def test_markdown_shows_text_as_it_is() -> None:
    text = render([NASTY], "md")
    assert r"| x\_1 | &lt;b&gt; |" in text
    assert "| --- | ---: |" in text
    assert "\x1b" not in text
    assert "50 % &amp; $x$" in text


def test_latex_escapes_what_would_break_it() -> None:
    text = render([NASTY], "tex")
    assert r"50 \% \& \$x\$ \#1 \{y\}" in text
    assert r"x\_1 & $<$b$>$ \\" in text


def test_csv_gives_the_unrounded_value_and_interval(tmp_path: Path) -> None:
    write_run(tmp_path, answered([1.0, 0.0, 0.0]))
    rows = list(csv.DictReader(io.StringIO(render(tables(tmp_path, "runs"), "csv"))))
    score = next(row for row in rows if row["column"] == "score")
    assert float(score["value"]) == pytest.approx(1 / 3)
    assert float(score["low"]) == pytest.approx(0.0084, abs=1e-4)
    assert (score["n"], score["model"], score["task"], score["table"]) == ("3", "qwen-7b-chat", "gsm8k", "runs")


def test_a_terminal_obeys_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = ([record("q", said(f"{i}"), float(i), extracted="\x1b[2J[bold]x")] for i in range(2))
    paths = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    assert main([f"compare={paths[0]},{paths[1]}"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]x" in out


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_every_published_row_has_a_source_and_prints_its_value() -> None:
    assert len(ledger()) > 1000
    for row in ledger():
        assert row.sources
        if row.value is not None and row.unit == "%" and row.text:
            assert float(row.text.removesuffix("%")) == row.value


def test_our_number_stands_beside_the_published_one_with_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path, answered([1.0] * 50 + [0.0] * 50), task="gsm8k", protocol="upstream")  # 50.3 was published
    write_run(tmp_path, answered([1.0] * 90 + [0.0] * 10), task="ceval", model="qwen-7b", chat=False,
              benchmark={"split": "val", "shots": 5})  # fmt: skip
    (table,) = published_tables(find_runs([tmp_path]))
    rows = [dict(zip(table.columns, row)) for row in shown(table)]
    gsm8k = next(row for row in rows if row["model"] == "qwen-7b-chat" and row["published"] == "50.3")
    assert (gsm8k["Δ"], gsm8k["in our interval"]) == ("-0.3", "yes")
    assert gsm8k["what differs"] == "nothing known"
    ceval = next(row for row in rows if row["model"] == "qwen-7b" and row["published"] == "63.5")
    assert "split: ours val, published test" in ceval["what differs"]
    assert "protocol=robust" in ceval["what differs"]
    assert ceval["in our interval"] == "no"


def test_speed_of_another_device_is_shown_as_such(tmp_path: Path) -> None:
    write_profile(tmp_path, [20.0, 20.0])
    (table,) = published_tables(find_runs([tmp_path]))
    rows = [dict(zip(table.columns, row)) for row in shown(table)]
    assert any("ours Test CPU" in row["what differs"] and row["Δ"].endswith("×") for row in rows)


def test_exams_of_one_benchmark_meet_their_own_published_numbers(tmp_path: Path) -> None:
    average, toefl = Metric(value=0.6, n=100, low=0.5, high=0.7), Metric(value=0.9, n=20, low=0.8, high=1.0)
    write_run(tmp_path, answered([1.0]), task="leval", model="qwen-72b-chat",
              metrics={"accuracy": average, "accuracy/tpo": toefl})  # fmt: skip
    bleu = Metric(value=30.0, n=10, kind="mean", low=29.0, high=31.0, unit="BLEU")
    for task in ("wmt22", "wmt22_sacrebleu"):
        write_run(tmp_path, answered([1.0]), task=task, model="qwen-7b-original", chat=False,
                  metrics={"bleu": bleu, "bleu/en-zh": bleu})  # fmt: skip
    (table,) = published_tables(find_runs([tmp_path]))
    rows = [dict(zip(table.columns, row)) for row in shown(table)]
    found = {(row["benchmark"], row["ours"].split()[0], row["published"]) for row in rows}
    assert found == {
        ("L-Eval", "60.0", "62.30"), ("L-Eval TOEFL", "90.0", "86.24"),
        ("WMT22 (5-shot)", "30.00", "27.5"), ("WMT22 BLEU en-zh (5-shot)", "30.00", "30.6"),
    }  # fmt: skip
    assert "mean of 5 exams, published of 6" in next(row["what differs"] for row in rows if row["published"] == "62.30")


def test_a_split_without_answers_stands_beside_nothing(tmp_path: Path) -> None:
    answered_alone = {"answered": Metric(value=12342, n=12342, kind="count")}
    write_run(tmp_path, answered([1.0]), task="ceval", model="qwen-7b-chat", benchmark={"split": "test"},
              metrics=answered_alone)  # fmt: skip
    (table,) = published_tables(find_runs([tmp_path]))
    assert table.rows == ()


def test_precisions_of_bitsandbytes_stand_in_one_table_and_meet_their_row(tmp_path: Path) -> None:
    for name, quant in (("bf16", "none"), ("llm_int8", "int8"), ("nf4", "nf4")):
        write_run(tmp_path, answered([1.0] * 9 + [0.0] * 8), task="mmlu", model="qwen-7b-original", quant=quant,
                  tag=f"precision-{name}", chat=False, benchmark={"shots": 5}, dtype="bf16")  # fmt: skip
    runs = find_runs([tmp_path])
    (table,) = tables(tmp_path, "quantization")
    assert [row[1] for row in shown(table)] == ["BF16", "LLM.int8", "NF4"]
    (beside,) = published_tables(runs)
    rows = [dict(zip(beside.columns, row)) for row in shown(beside)]
    published = {(row["precision"], row["published"]) for row in rows}
    assert {("LLM.int8", "52.8"), ("NF4", "48.9"), ("BF16", "56.7")} <= published


def test_the_ledger_contradicts_itself_where_it_does() -> None:
    found, known = contradictions()
    named = {row[0].text: row for row in found.rows}
    gsm8k = next(row for name, row in named.items() if name.startswith("Qwen-14B-Chat BF16 · GSM8K"))
    assert (gsm8k[1].value, gsm8k[2].value) == (60.1, 61.0)
    assert not any(name.startswith("Qwen-72B none · arXiv") for name in named)  # 2.83 is 2.828 rounded
    assert len(known.rows) == 13


def test_the_commands_of_the_documentation_compose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, answered([1.0, 0.0]))
    assert main(["ledger=contradictions", "format=md"]) == 0
    assert main([f"runs={tmp_path}", "published=true", "format=csv"]) == 0
    assert main([f"runs={tmp_path}", "layout=models,runs", "format=tex"]) == 0
    assert main([f"runs={tmp_path}", f"out={tmp_path / 'a.md'},{tmp_path / 'a.csv'}"]) == 0
    assert (tmp_path / "a.md").read_text().startswith("### Models × tasks")
    assert capsys.readouterr().err == ""


def test_each_published_number_of_an_agent_stands_beside_the_metric_of_its_name_and_mode(tmp_path: Path) -> None:
    scores = {"code": 0.8, "tool_selection": 0.9, "tool_used": 0.95}
    metrics = {name: Metric(value=value, n=47) for name, value in scores.items()}
    write_run(tmp_path, answered([1.0, 0.0]), task="hf_agent_chat", metrics=metrics)
    tools = {"tool_selection": Metric(value=0.9, n=20), "false_positive_error": Metric(value=0.2, n=10)}
    write_run(tmp_path, answered([1.0, 0.0]), task="plugin", metrics=tools)
    write_run(
        tmp_path, answered([1.0, 0.0]), task="code_interpreter", metrics={"math_accuracy": Metric(value=0.4, n=9)}
    )
    (table,) = published_tables(find_runs([tmp_path]))
    rows = [dict(zip(table.columns, row)) for row in shown(table)]
    printed = {row["benchmark"]: row["published"] for row in rows}
    assert printed["hf_agent code (chat)"] == "85.1"
    assert printed["hf_agent tool_used (chat)"] == "94.7"
    assert not any("(run)" in benchmark for benchmark in printed)
    assert printed["tool_use tool_selection_acc (20231206)"] == "95.5%"
    assert printed["code_interpreter math_accuracy (20231206)"]
    assert any("published rows are not public" in row["what differs"] for row in rows)
