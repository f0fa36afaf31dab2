"""The gate: how often it cries wolf, what it finds, what it refuses to compare, and what CI sees of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from report_runs import answered, chose, documents, record, said, scored, write_profile, write_run
from reruns import FAMILIES, false_alarms, found_regressions

from qwen_eval.core import ChoiceLogprobs, Metric
from qwen_eval.metrics import perplexity, share
from qwen_eval.report.__main__ import main
from qwen_eval.report.compare import adjusted, compare_paths
from qwen_eval.report.comparison import Comparison, Margins, Side
from qwen_eval.report.gate import gate as run_gate
from qwen_eval.report.verdict import judge
from qwen_eval.runs.run import Run

# `python tests/reruns.py 1000` is the long version; docs/statistics.md holds its figures.
RERUNS, REGRESSIONS = 200, 60


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_reruns_cry_wolf_at_most_one_time_in_twenty(family: str) -> None:
    assert false_alarms(FAMILIES[family], RERUNS, seed=21) / RERUNS <= 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_a_regression_of_the_stated_size_is_found_four_times_of_five(family: str) -> None:
    found = found_regressions(FAMILIES[family], REGRESSIONS, seed=22)
    assert found / REGRESSIONS >= 0.72  # 0.80 less 1.5 standard errors of 60 draws


# --- planted regressions ---------------------------------------------------------------------------------------------


def compared(first: Path, second: Path) -> Comparison:
    return compare_paths([str(first), str(second)])[0]


def test_an_extractor_bug_is_worse_however_small_the_run(tmp_path: Path) -> None:
    """The same words, read otherwise: five flips of twenty are no chance when the model said the same."""
    before = answered([1.0] * 20)
    after = [
        record(f"q{i}", said("The answer is A."), float(i >= 3), extracted="A" if i >= 3 else "T") for i in range(20)
    ]
    found = judge(compared(write_run(tmp_path / "a", before), write_run(tmp_path / "b", after)))
    assert found.verdict == "worse"
    assert "extraction changed: 3 lost" in found.why


def reread(num_lost_words: int, num_gained: int, num_reread_lost: int = 0) -> list[Any]:
    """Of 200 (120 right): right ones lost by other words, wrong ones gained and right ones lost by another reading."""
    rows = answered([1.0] * 120 + [0.0] * 80)
    for i in range(num_lost_words):
        rows[i] = record(f"q{i}", said("It is B, I think."), 0.0, extracted="B")
    for i in range(60, 60 + num_reread_lost):
        rows[i] = record(f"q{i}", said("The answer is A."), 0.0, extracted="T")
    for i in range(120, 120 + num_gained):
        rows[i] = record(f"q{i}", said("The answer is B."), 1.0, extracted="A")
    return rows


@pytest.mark.parametrize(
    ("lost_words", "gained", "reread_lost", "verdict"),
    [
        (60, 1, 0, "worse"),  # one gained answer must not switch the test off
        (60, 60, 0, "worse"),  # nor may sixty hide what the model lost
        (60, 70, 0, "worse"),
        (0, 1, 0, "better"),
        (0, 2, 3, "worse"),
        (0, 40, 2, "better"),  # by the test: 38 more of 200 are no chance
        (0, 3, 2, "cannot tell"),  # read otherwise both ways: no plain gain
    ],
)
def test_an_answer_gained_by_another_reading_hides_nothing(
    tmp_path: Path, lost_words: int, gained: int, reread_lost: int, verdict: str
) -> None:
    before = write_run(tmp_path / "a", reread(0, 0))
    after = write_run(tmp_path / "b", reread(lost_words, gained, reread_lost))
    assert judge(compared(before, after)).verdict == verdict


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_score_that_is_missing_or_no_number_is_worse_by_name(tmp_path: Path, score: float | None) -> None:
    before, after = answered([1.0] * 50), answered([1.0] * 50)
    after[7] = record("q7", said("The answer is A."), score, extracted="A")
    metrics = {"accuracy": share([1.0] * 50)}
    first, second = (write_run(tmp_path / n, rows, metrics=metrics) for n, rows in (("a", before), ("b", after)))
    found = judge(compared(first, second))
    assert found.verdict == "worse"
    assert "q7" in found.why
    assert judge(compared(second, first)).verdict == "not comparable"


def test_a_log_probability_that_is_no_number_is_worse_by_name(tmp_path: Path) -> None:
    before, after = documents([2.0] * 9), documents([2.0] * 9)
    after[4] = record("d4", scored(math.nan, 200), None, target=None)
    metrics = {"ppl": perplexity([400.0] * 9, [200] * 9)}
    first, second = (write_run(tmp_path / n, rows, metrics=metrics) for n, rows in (("a", before), ("b", after)))
    found = judge(compared(first, second))
    assert found.verdict == "worse"
    assert "d4 (log-probability is nan)" in found.why


def test_another_cpu_deciding_a_tie_is_not_an_extractor_bug(tmp_path: Path) -> None:
    """Fingerprints keep four decimals, so two choices nearer than that may change places under one fingerprint."""
    tie = ChoiceLogprobs(logprobs=(-1.000004, -1.000001, -3.0, -3.0), num_tokens=(1, 1, 1, 1))
    before = [record(f"q{i}", chose(0), 1.0, extracted="A") for i in range(20)]
    before[0] = record("q0", tie, 1.0, extracted="A")
    after = [*before]
    after[0] = record("q0", tie, 0.0, extracted="B")
    assert judge(compared(write_run(tmp_path / "a", before), write_run(tmp_path / "b", after))).verdict == "cannot tell"


def test_a_few_flips_and_the_last_digits_of_another_cpu_are_unchanged_to_make_gate(tmp_path: Path) -> None:
    rng = np.random.default_rng(25)
    scores = (rng.random(150) < 0.5).astype(float)
    other = scores.copy()
    for i in (int(np.flatnonzero(scores)[0]), int(np.flatnonzero(scores)[1]), int(np.flatnonzero(scores == 0)[0])):
        other[i] = 1 - other[i]
    nll = rng.normal(2.3, 0.3, 8)
    for name, right, noise in (("old", scores, 0.0), ("new", other, 1e-5)):
        write_run(tmp_path / name, answered(right.tolist()), limit=150)
        write_run(tmp_path / name, documents(nll * (1 + rng.normal(0, noise, 8)), 1500), task="long_ppl")
    assert main([f"accept={tmp_path / 'old'}", f"gate={tmp_path / 'base'}"]) == 0
    found = run_gate(tmp_path / "base", [str(tmp_path / "new")], Margins(share=0.05))
    assert [judgement.verdict for judgement in found.judgements] == ["unchanged", "unchanged"]


def test_a_timeout_of_the_sandbox_is_not_an_extractor_bug(tmp_path: Path) -> None:
    before = [record(f"q{i}", said("def f(): ..."), 1.0, extracted="def f(): ...") for i in range(20)]
    after = [record(f"q{i}", said("def f(): ..."), float(i > 0), extracted="def f(): ...") for i in range(20)]
    assert judge(compared(write_run(tmp_path / "a", before), write_run(tmp_path / "b", after))).verdict == "cannot tell"


def test_perturbed_weights_are_worse_in_accuracy_and_in_perplexity(tmp_path: Path) -> None:
    rng = np.random.default_rng(24)
    right = (rng.random(150) < 0.6).astype(float)
    worse = np.where(rng.random(150) < 0.3, 0.0, right)
    found = judge(compared(write_run(tmp_path / "a", answered(right)), write_run(tmp_path / "b", answered(worse))))
    assert found.verdict == "worse"
    nll = rng.normal(2.3, 0.3, 30)
    a = write_run(tmp_path / "a", documents(nll), task="wiki")
    b = write_run(tmp_path / "b", documents(nll + rng.normal(0.03, 0.01, 30)), task="wiki")
    assert judge(compared(a, b)).verdict == "worse"
    assert judge(compared(b, a)).verdict == "better"


def test_a_changed_prompt_is_not_comparable_and_named_to_the_character(tmp_path: Path) -> None:
    before = [record(f"q{i}", said("A"), 1.0, prompt=f"{i}. Which?\nAnswer:") for i in range(9)]
    after = [record(f"q{i}", said("A"), 1.0, prompt=f"{i}. Which?\nAnswer:" + " " * (i > 4)) for i in range(9)]
    found = judge(compared(write_run(tmp_path / "a", before), write_run(tmp_path / "b", after)))
    assert found.verdict == "not comparable"
    assert "4 of 9 prompts differ, the first is q5 at character 18" in found.why


@pytest.mark.parametrize(
    ("change", "said_so"),
    [
        ({"benchmark": {"shots": 5}}, "shots: 0 against 5"),
        ({"benchmark": {"split": "val"}}, "split: test against val"),
        ({"benchmark": {"data_sha256": "def"}}, "data_sha256: abc against def"),
        ({"benchmark": {"prompt_format": "x"}}, "prompt_format: none against x"),
        ({"protocol": "upstream"}, "protocol: robust against upstream"),
        ({"limit": 20}, "limit: none against 20"),
        ({"version": 7}, "task_version: 2 against 7"),
        ({"finished": False}, "unfinished"),
    ],
)
def test_what_differs_is_said(tmp_path: Path, change: dict[str, Any], said_so: str) -> None:
    first, second = (
        write_run(tmp_path / "a", answered([1.0] * 20)),
        write_run(tmp_path / "b", answered([1.0] * 20), **change),
    )
    found = judge(compared(first, second))
    assert found.verdict == "not comparable"
    assert said_so in found.why


def test_where_the_rows_lay_is_no_difference(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", answered([1.0] * 9), benchmark={"origin": "path:/x"})
    second = write_run(tmp_path / "b", answered([1.0] * 9), benchmark={"origin": "bundled:x"})
    assert judge(compared(first, second)).verdict == "unchanged"


def test_unchanged_needs_evidence(tmp_path: Path) -> None:
    """Twenty items that flip two each way: nothing is shown, and nothing is claimed."""
    first = answered([1.0] * 10 + [0.0] * 10)
    second = answered([1.0] * 8 + [0.0] * 2 + [1.0] * 2 + [0.0] * 8)
    small = judge(compared(write_run(tmp_path / "a", first), write_run(tmp_path / "b", second)))
    assert small.verdict == "cannot tell"
    assert small.mde is not None
    assert small.mde > 0.2
    many = [1.0] * 3000 + [0.0] * 3000
    other = [0.0] * 3 + [1.0] * 2997 + [1.0] * 3 + [0.0] * 2997
    large = judge(compared(write_run(tmp_path / "c", answered(many)), write_run(tmp_path / "d", answered(other))))
    assert large.verdict == "unchanged"
    assert "within the margin" in large.why


def test_perplexity_is_told_by_length_too(tmp_path: Path) -> None:
    def rows(shift: float) -> list[Any]:
        return [
            record(f"{n}/{i}", scored((2.0 + 0.1 * i + shift * (n == 2048)) * n, n), None, group=str(n))
            for n in (1024, 2048)
            for i in range(6)
        ]

    def written(name: str, shift: float) -> Path:
        values = {n: math.exp(2.25 + shift * (n == 2048)) for n in (2048, 1024)}
        metrics = {f"ppl/{n}": Metric(value=x, n=6 * n, kind="ppl", higher_is_better=False) for n, x in values.items()}
        return write_run(tmp_path / name, rows(shift), task="long", metrics=metrics)

    long, short = compare_paths([str(written("a", 0.0)), str(written("b", 0.1))])
    assert (long.metric, short.metric) == ("ppl/2048", "ppl/1024")
    for found, delta in ((long, 0.1), (short, 0.0)):
        assert found.difference is not None
        assert found.first is not None
        assert found.second is not None
        assert found.difference.delta == pytest.approx(delta, abs=1e-6)
        assert found.second.value / found.first.value == pytest.approx(math.exp(delta), rel=1e-5)  # as shown
    assert [judge(c).verdict for c in adjusted([long, short])] == ["worse", "unchanged"]


def test_a_window_counts_for_the_tokens_its_task_says(tmp_path: Path) -> None:
    rows = [record("w", scored(20.0, 10), None, values={"weight": 9})]
    item = Side(run=Run(path=write_run(tmp_path, rows), spec={}, result={})).items["w"]
    assert (item.nll, item.num_tokens) == (pytest.approx(18.0), 9)


def test_choices_give_flips_and_the_kl_of_their_distributions(tmp_path: Path) -> None:
    first = [record(f"q{i}", chose(0), 1.0, extracted="A") for i in range(30)]
    second = [record(f"q{i}", chose(i % 2), float(i % 2 == 0), extracted="AB"[i % 2]) for i in range(30)]
    found = compared(write_run(tmp_path / "a", first), write_run(tmp_path / "b", second))
    assert (found.losses, found.gains) == (15, 0)
    assert found.choice_kl is not None
    p, q = np.exp(chose(0).logprobs), np.exp(chose(1).logprobs)
    assert found.choice_kl.value == pytest.approx(float((p * np.log(p / q)).sum()) / 2, rel=1e-6)


def test_a_macro_headline_is_tested_with_its_own_weights(tmp_path: Path) -> None:
    from qwen_eval.metrics import macro

    def rows(small: Sequence[float]) -> list[Any]:
        big = [record(f"b{i}", said(str(i)), float(i % 2), group="big") for i in range(90)]
        return big + [record(f"s{i}", said(str(x)), x, group="small") for i, x in enumerate(small)]

    def written(name: str, small: list[float]) -> Path:
        groups = {"big": [float(i % 2) for i in range(90)], "small": small}
        return write_run(tmp_path / name, rows(small), metrics={"accuracy": macro(groups)})

    found = compared(written("a", [1.0] * 10), written("b", [0.0] * 4 + [1.0] * 6))
    assert found.difference is not None
    assert found.difference.delta == pytest.approx(-0.2)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Baselines of two tasks and a profile."""
    write_run(tmp_path / "old", answered([1.0, 0.0, 1.0] * 60, group="g", target="A"))
    write_run(tmp_path / "old", documents([2.0 + 0.01 * i for i in range(12)]), task="wiki")
    write_profile(tmp_path / "old", [40.0, 40.4, 39.8, 40.1])
    assert main([f"accept={tmp_path / 'old'}", f"gate={tmp_path / 'baselines'}"]) == 0
    return tmp_path


def gate(project: Path, runs: Path, *more: str) -> int:
    return main([f"gate={project / 'baselines'}", f"runs={runs}", *more])


def test_the_same_answers_pass(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(project, project / "old") == 0
    assert "passed: 5 unchanged" in capsys.readouterr().out


def test_baselines_hold_no_place_of_this_machine(project: Path) -> None:
    stored = "".join(path.read_text() for path in (project / "baselines").rglob("*.json*"))
    for word in ("secret-place", "runs_dir", str(project)):
        assert word not in stored


def test_worse_fails_with_1_and_ci_can_read_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = project / "new"
    write_run(new, answered([1.0, 0.0, 0.0] * 60, group="g", target="A"))
    write_run(new, documents([2.0 + 0.01 * i for i in range(12)]), task="wiki")
    write_profile(new, [40.2, 39.9, 40.3, 40.0])
    out = [str(project / name) for name in ("gate.md", "gate.xml", "gate.html")]
    assert gate(project, new, f"out={','.join(out)}") == 1
    assert "changed for the worse" in capsys.readouterr().out
    assert "changed for the worse" in Path(out[0]).read_text()
    suite = ElementTree.parse(out[1]).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "1", "0")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert "lost (60): q2, q5, q8, q11" in str(failure.text)
    assert "q2, q5, q8, q11" in Path(out[0]).read_text()
    assert "<table>" in Path(out[2]).read_text()


def test_missing_and_incomparable_runs_give_3(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no sentence is wrapped
    new = project / "new"
    write_run(new, answered([1.0, 0.0, 1.0] * 60, group="g", target="A"), benchmark={"shots": 4})
    write_profile(new, [10.0, 10.0, 10.1], device="Another CPU")
    (new / "odd").mkdir()
    (new / "odd" / "result.json").write_text("{}")
    write_run(new, answered([1.0]), task="fresh")
    assert gate(project, new) == 3
    shown = capsys.readouterr().out
    for words in (
        "no run of it was found",
        "shots: 0 against 4",
        "Test CPU against Another CPU",
        "no baseline yet",
        "odd",
    ):
        assert words in shown


def test_slower_on_the_same_device_is_worse(project: Path) -> None:
    new = project / "new"
    write_run(new, answered([1.0, 0.0, 1.0] * 60, group="g", target="A"))
    write_run(new, documents([2.0 + 0.01 * i for i in range(12)]), task="wiki")
    write_profile(new, [30.0, 30.2, 29.8, 30.1])
    assert gate(project, new) == 1


def test_a_cell_that_runs_out_of_memory_now_is_worse(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project / "old" / "profile" / "decode" / "qwen-7b-chat" / "default" / "result.json"
    result = json.loads(path.read_text())
    result["cells"][0] |= {"status": "oom", "reason": "out of memory"}
    path.write_text(json.dumps(result))
    assert gate(project, project / "old") == 1
    assert "the cell is oom" in capsys.readouterr().out


def test_no_mean_over_unlike_cells_is_shown(project: Path) -> None:
    for name, speeds in (("slow", [40.0, 40.4]), ("fast", [1300.0, 1301.0])):
        path = write_profile(project / name, speeds)
        cell = json.loads((path / "result.json").read_text())["cells"][0]
        cells = [cell, {**cell, "name": "int8", "tok_per_s": [1300.0, 1310.0]}]
        result = json.loads((path / "result.json").read_text()) | {"cells": cells}
        (path / "result.json").write_text(json.dumps(result))
    found = compare_paths([str(project / "slow"), str(project / "fast")])
    shown = {
        (c.label.partition(" BF16 ")[2], round(c.first.value)) for c in found if c.first and c.metric == "tok_per_s"
    }
    assert shown == {
        ("decode, batch 1, 1 + 2048 tokens throughput", 40),
        ("int8, batch 1, 1 + 2048 tokens throughput", 1305),
    }


def test_a_run_whose_spec_cannot_be_read_is_named_and_the_others_are_judged(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = project / "old" / "eval" / "gsm8k" / "qwen-7b-chat" / "default" / "spec.json"
    spec.write_text(spec.read_text()[:40])
    found = run_gate(project / "baselines", [str(project / "old")])
    assert {j.comparison.task: j.verdict for j in found.judgements} == {
        "gsm8k": "not comparable", "wiki": "unchanged", "decode": "unchanged",
    }  # fmt: skip
    assert "spec.json: cannot be read" in next(j.why for j in found.judgements if j.comparison.task == "gsm8k")
    assert main([f"accept={project / 'old'}", f"gate={project / 'new'}"]) == 2
    assert "spec.json: cannot be read" in capsys.readouterr().err


def test_accept_makes_today_the_baseline(project: Path) -> None:
    new = project / "new"
    write_run(new, answered([0.0, 0.0, 0.0] * 60, group="g", target="A"))
    assert main([f"accept={new}", f"gate={project / 'baselines'}"]) == 0
    write_run(new, documents([2.0 + 0.01 * i for i in range(12)]), task="wiki")
    write_profile(new, [40.0, 40.4, 39.8, 40.1])
    assert gate(project, new) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gate=nowhere", "runs={old}"], "no such directory"),
        (["accept={empty}"], "no run under"),
        (["accept={half}"], "unfinished"),
        (["runs={old}", "layout=modles"], "did you mean"),
        (["compare={old}"], "give two run directories"),
        (["gate=x", "published=true"], "one at a time"),
        (["runs={old}", "out=x.pdf"], "which format"),
        (["runs={old}", "out=x.xml"], "only the gate has verdicts"),
        (["runs={empty}"], "no run under"),
        (["runz=x"], "runz"),
        (["compare={old},{old}", "margin=150"], "margin=150.0: points or per cent"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    write_run(tmp_path / "old", answered([1.0] * 5))
    write_run(tmp_path / "half", answered([1.0] * 5), finished=False)
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("old", "half", "empty")}
    assert main([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
