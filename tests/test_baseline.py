"""Baselines: small enough to commit, whole or not written, and what accepting one says of the one before."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from report_runs import answered, chose, documents, record, said, write_profile, write_run

from qwen_eval.core import ChoiceLogprobs, Record
from qwen_eval.report.__main__ import main
from qwen_eval.report.baseline import accept, load_baseline, load_baselines
from qwen_eval.report.comparison import Side
from qwen_eval.report.gate import gate as run_gate
from qwen_eval.report.items import Item, items_from_rows, items_to_rows
from qwen_eval.runs.run import load_run
from qwen_eval.tasks.mmlu import CATEGORIES

NUM_MMLU = 14_042
SUBJECTS = sorted({subject for part in CATEGORIES.values() for subject in part})


def like_mmlu(num: int) -> list[Record]:
    rng = random.Random(5)
    rows = []
    for i in range(num):
        subject = SUBJECTS[i * len(SUBJECTS) // num]
        logprobs = tuple(-rng.uniform(0.05, 9.0) for _ in range(4))
        answer = ChoiceLogprobs(logprobs=logprobs, num_tokens=(1, 1, 1, 1))
        prompt = f"Questions about {subject}.\n" + "x" * 500 + f"\n{i}?"
        letter = "ABCD"[answer.best]
        rows.append(record(f"{subject}/{i}", answer, float(letter == "A"), extracted=letter,
                           target="A", group=subject, prompt=prompt))  # fmt: skip
    return rows


def test_the_baseline_of_all_of_mmlu_is_below_two_megabytes(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "runs", like_mmlu(NUM_MMLU), task="mmlu")
    [done] = accept([str(runs)], tmp_path / "baselines")
    files = {path.name: path.stat().st_size for path in done.directory.iterdir()}
    assert set(files) == {"baseline.json", "samples.jsonl"}
    assert sum(files.values()) < 2_000_000, files
    assert len((done.directory / "samples.jsonl").read_text().splitlines()) == NUM_MMLU


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    rows = [
        record("a/1", chose(1), 1.0, extracted="B", group="a"),
        record("b/2", said("None"), None, extracted=None, target=["x", "y"], group="other", cluster="c"),
        record("b/3", said("\ud800 |"), 0.25, extracted="def f():\n    return 1\n" * 9, target={"k": 1}),
    ]
    run = write_run(tmp_path / "runs", rows)
    items = list(Side(run=load_run(run)).items.values())
    head, stored = items_to_rows(items)
    again = items_from_rows(head, json.loads(json.dumps(stored)))
    for item in items:
        kept = dataclasses.replace(
            item, prompt="", prompt_sha256=item.tokens_digest, choices=tuple(round(x, 4) for x in item.choices)
        )
        assert again[item.id] == kept


def test_a_choice_without_any_chance_is_kept() -> None:
    item = Item(id="a", score=1.0, choices=(-0.5, -math.inf))
    assert items_from_rows(*items_to_rows([item, dataclasses.replace(item, id="b")]))["a"].choices == (-0.5, -math.inf)


def test_lines_are_sorted_so_that_a_diff_shows_what_changed(tmp_path: Path) -> None:
    rows = answered([1.0, 0.0] * 10)
    first, second = (
        accept([str(write_run(tmp_path / name, order))], tmp_path / f"base-{name}")[0].directory / "samples.jsonl"
        for name, order in (("a", rows), ("b", rows[::-1]))
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_changed_template_is_named_to_the_character_by_the_gate(tmp_path: Path) -> None:
    def rows(end: str) -> list[Record]:
        return [record(f"q{i}", said("A"), 1.0, prompt=f"{i}. Which?\nAnswer:{end}") for i in range(12)]

    accept([str(write_run(tmp_path / "a", rows("")))], tmp_path / "base")
    report = run_gate(tmp_path / "base", [str(write_run(tmp_path / "b", rows(" ")))])
    assert "12 of 12 prompts differ" in report.judgements[0].why
    assert "at character 18" in report.judgements[0].why


def test_another_question_behind_the_same_id_is_found_by_its_digest(tmp_path: Path) -> None:
    rows = [record(f"q{i}", said("A"), 1.0, prompt=f"{'?' * i} A?") for i in range(12)]
    accept([str(write_run(tmp_path / "a", rows))], tmp_path / "base")
    rows[7] = record("q7", said("A"), 1.0, prompt="something else")
    report = run_gate(tmp_path / "base", [str(write_run(tmp_path / "b", rows))])
    assert report.exit_code == 3
    assert report.judgements[0].why == "1 of 12 prompts differ, the first is q7"


# --- accept ----------------------------------------------------------------------------------------------------------


def test_accept_says_what_changed_against_the_baseline_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "old", answered([1.0] * 90))
    assert main([f"accept={tmp_path / 'old'}", f"gate={tmp_path / 'base'}"]) == 0
    assert "(new)" in capsys.readouterr().out
    write_run(tmp_path / "new", answered([0.0] * 30 + [1.0] * 60))
    assert main([f"accept={tmp_path / 'new'}", f"gate={tmp_path / 'base'}"]) == 0
    shown = capsys.readouterr().out
    assert "changed for the worse" in shown
    assert "q0, q1, q2" in shown
    assert "and 20 more" in shown


def test_nothing_is_written_unless_all_are_fit(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", answered([1.0] * 9))
    write_run(tmp_path / "runs", answered([1.0] * 9), task="mmlu", finished=False)
    assert main([f"accept={tmp_path / 'runs'}", f"gate={tmp_path / 'base'}"]) == 2
    assert not (tmp_path / "base").exists()


def test_the_same_directory_named_twice_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs", answered([1.0] * 9))
    monkeypatch.chdir(tmp_path)
    assert len(accept(["runs", str(tmp_path / "runs")], tmp_path / "base")) == 1


# --- damaged baselines -----------------------------------------------------------------------------------------------


def cut(directory: Path) -> None:
    path = directory / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))


def older(directory: Path) -> None:
    path = directory / "baseline.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))


def doubled(directory: Path) -> None:
    path = directory / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[0]]))


@pytest.mark.parametrize(("harm", "words"), [(cut, "5 samples of 9"), (older, "format 1"), (doubled, "two rows of q0")])
def test_a_damaged_baseline_is_named_and_the_others_are_judged(tmp_path: Path, harm: Any, words: str) -> None:
    write_run(tmp_path / "runs", answered([1.0] * 9))
    write_run(tmp_path / "runs", documents([2.0] * 9), task="wiki")
    done = accept([str(tmp_path / "runs")], tmp_path / "base")
    harm(done[0].directory)
    report = run_gate(tmp_path / "base", [str(tmp_path / "runs")])
    assert [j.verdict for j in report.judgements] == ["not comparable", "unchanged"]
    assert words in report.judgements[0].why
    assert len(load_baselines(tmp_path / "base").unreadable) == 1


def test_a_profile_has_cells_and_no_samples(tmp_path: Path) -> None:
    [done] = accept([str(write_profile(tmp_path / "runs", [40.0, 41.0]))], tmp_path / "base")
    side = load_baseline(done.directory)
    assert not side.items
    assert len(side.run.result["cells"]) == 1


def test_digests_are_of_the_prompt_and_of_its_tokens(tmp_path: Path) -> None:
    [done] = accept([str(write_run(tmp_path / "runs", answered([1.0, 0.0])))], tmp_path / "base")
    prompt = "Question: q1?\nAnswer:"
    item = load_baseline(done.directory).items["q1"]
    assert item.prompt_digest == hashlib.sha256(prompt.encode()).hexdigest()[:8]
