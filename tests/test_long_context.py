"""The ablation of the long-context tricks: one command for the runs, one for the table and its figure."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import documents, record, scored, write_run

from qwen_eval.__main__ import main
from qwen_eval.core import Metric
from qwen_eval.report.__main__ import main as report
from qwen_eval.report.long_context import perplexities, row_names, tables, tricks_of
from qwen_eval.report.runs import find_runs

FACTS = {"dynamic_ntk": False, "logn": False, "windows": None, "dtype": "float32"}
TRICKS = {
    "plain": {},
    "ntk": {"dynamic_ntk": True},
    "ntk+logn": {"dynamic_ntk": True, "logn": True},
    "ntk+logn+window": {"dynamic_ntk": True, "logn": True, "windows": [256, 512, 1024]},
}


def write_ablation(root: Path, losses: dict[str, tuple[float, float]]) -> None:
    """One run a tag with the loss per token at 256 and at 2048 tokens, over three documents."""
    for tag, by_length in losses.items():
        records = [
            record(f"{n}/d{i}/0", scored((loss + i / 10) * 100, 100), None, target=None, group=str(n), cluster=f"d{i}")
            for n, loss in zip((256, 2048), by_length)
            for i in range(3)
        ]
        metrics = {
            f"ppl/{n}": Metric(value=2.718**loss, n=300, kind="ppl", higher_is_better=False)
            for n, loss in zip((256, 2048), by_length)
        }
        engine = {**FACTS, **TRICKS[tag]}
        write_run(root, records, task="long_ppl", tag=tag, metrics=metrics, result={"engine": engine})


def test_one_command_runs_the_four_rows_over_the_same_tokens_and_one_writes_them(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join("abcdefg hij\n"[(i * i * 7 + i // 5) % 12] for i in range(3000)))
    runs = tmp_path / "runs"
    command = [
        "+experiment=long_context_ablation",
        "model=qwen-tiny",
        "model.dtype=fp32",  # in bf16 a kernel may round by the length, and nothing would be equal below
        "model.arch.seq_length=64",
        "task.lengths=64,256",
    ]
    keys = [f"task.path={tmp_path / 'book.txt'}", "task.max_chunks=1", f"runs_dir={runs}", "quiet=true"]
    assert main([*command, *keys]) == 0
    assert {path.parent.name for path in runs.glob("eval/long_ppl/qwen-tiny/*/result.json")} == set(TRICKS)
    outs = [str(tmp_path / f"long.{form}") for form in ("md", "csv", "tex", "svg")]
    assert report([f"runs={runs}", "layout=long", f"out={','.join(outs)}"]) == 0
    with open(outs[1], newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "long"]
    assert [row["tricks"] for row in rows if row["column"] == "64"] == [
        "plain",
        "NTK",
        "NTK + LogN",
        "NTK + LogN + window 64-128",
    ]
    within = [float(row["value"]) for row in rows if row["column"] == "64"]
    assert within == pytest.approx([within[0]] * 4, rel=1e-4)  # within the training length nothing is on
    assert len({row["value"] for row in rows if row["column"] == "256"}) == 4
    assert "NTK + LogN" in Path(outs[0]).read_text()
    assert r"\toprule" in Path(outs[2]).read_text()
    assert "NTK + LogN + window 64-128" in Path(outs[3]).read_text()


def test_the_table_goes_from_no_trick_to_all_and_tells_each_change(tmp_path: Path) -> None:
    write_ablation(tmp_path, {"ntk+logn+window": (2.0, 2.1), "ntk": (2.0, 2.2), "plain": (2.0, 3.0)})
    long, changes = tables(find_runs([str(tmp_path)]).finished)
    assert [[cell.text for cell in row[:3]] for row in long.rows] == [
        ["qwen-7b-chat", "FP32", "plain"],
        ["qwen-7b-chat", "FP32", "NTK"],
        ["qwen-7b-chat", "FP32", "NTK + LogN + window 256-1024"],
    ]
    deltas = {row[2].text: (row[3].value, row[4].value) for row in changes.rows}
    assert set(deltas) == {
        "plain → NTK",
        "plain → NTK + LogN + window 256-1024",
        "NTK → NTK + LogN + window 256-1024",
    }
    assert deltas["plain → NTK"][0] == 0
    assert deltas["plain → NTK"][1] == pytest.approx(math.expm1(2.2 - 3.0), rel=1e-6)
    assert changes.rows[0][4].text.startswith("-55.07 %")  # exp(-0.8) - 1


def test_rows_that_read_alike_wear_their_tags_and_no_change_is_told(tmp_path: Path) -> None:
    lengths = {f"ppl/{n}": Metric(value=4.23, n=n, kind="ppl", higher_is_better=False) for n in (1024, 2048)}
    for tag in ("default", "again"):
        write_run(tmp_path, documents([1.0, 2.0]), task="long_ppl", tag=tag, metrics=lengths, result={"engine": FACTS})
    runs = find_runs([str(tmp_path)]).finished
    assert sorted(row_names(runs)) == ["qwen-7b-chat [again], long_ppl", "qwen-7b-chat, long_ppl"]
    assert [table.name for table in tables(runs)] == ["long"]


def test_an_engine_that_does_not_say_is_not_called_plain(tmp_path: Path) -> None:
    lengths = {"ppl/1024": Metric(value=4.23, n=9, kind="ppl", higher_is_better=False)}
    write_run(tmp_path, documents([1.0, 2.0]), task="long_ppl", metrics=lengths)
    (run,) = find_runs([str(tmp_path)]).finished
    assert (tricks_of(run), list(perplexities(run))) == ((), [1024])
    assert tables([run])[0].rows[0][2].text == "–"


@pytest.mark.parametrize(("arguments", "said"), [
    (["format=svg"], "format=svg: a figure needs a file, such as out=long.svg"),
    (["layout=runs", "out={}/a.svg"], "no run with perplexities of several lengths"),
])  # fmt: skip
def test_a_figure_that_cannot_be_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    write_run(tmp_path, documents([1.0, 2.0]), task="long_ppl")
    assert report([f"runs={tmp_path}", *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert said in capfd.readouterr().err


def test_memory_of_scoring_does_not_grow_with_the_length() -> None:
    tool = Path(__file__).parent.parent / "tools" / "bench_long_prefill.py"
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    command = [sys.executable, str(tool), "--side", "ours", "--layers", "1", "--hidden", "64", "--chunk", "256"]
    beyond = []
    for num_tokens in (257, 769):  # 5 and 14 slices of logits of 32 MB
        done = subprocess.run([*command, "--tokens", str(num_tokens)], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        beyond.append(json.loads(done.stdout)["beyond_bytes"])
    assert max(beyond) < 100 * 2**20
    assert abs(beyond[1] - beyond[0]) < 48 * 2**20
