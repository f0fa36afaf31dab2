"""Tool use: the official tool choice, input overlap and false positives, on the recorded replies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from readers import graded
from test_gsm8k import DATA, golden_rows

from qwen_eval.core import Completion, Completions, DataError, Generate, Record, Sample, Turn
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.tasks.plugin import Plugin, Spec, input_rouge_l, is_right_tool
from qwen_eval.tasks.react import read_step_upstream
from qwen_eval.tasks.registry import TaskContext


def test_upstream_scores_equal_the_recorded_ones(golden: Path) -> None:
    tokenizer = load_tokenizer(DATA)
    for row in golden_rows(golden, "extraction/plugin.jsonl"):
        assert read_step_upstream(row["gen"]) == row["parsed"], row["gen"]
        assert read_step_upstream(row["response"]) == row["gold_parsed"], row["response"]
        assert is_right_tool(row["gen"], row["response"]) == row["action_right"], row["gen"]
        rouge = input_rouge_l(row["gen"], row["response"], tokenizer)
        assert rouge == pytest.approx(row["action_input_rougeL"], abs=1e-9), row["gen"]
        assert ("\nAction: " in row["gen"]) == row["negative_bad"], row["gen"]


def test_a_file_of_positives_and_negatives_gives_the_three_official_metrics(tmp_path: Path) -> None:
    call = 'Thought: look.\nAction: search\nAction Input: {"q": "Qwen"}'
    rows = [{"prompt": "Q1", "response": call}, {"prompt": "Q2", "response": "Thought: I know.\nFinal Answer: 42"}]
    (tmp_path / "tools.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = Plugin(Spec(path=str(tmp_path)), TaskContext())
    samples = task.samples()
    assert [sample.group for sample in samples] == ["positive", "negative"]

    def record(sample: Sample, reply: str) -> Record:
        completion = Completion(text=reply, finish_reason="eos", num_tokens=9)
        turn = Turn(
            request=Generate(prompt=task.prompt(sample), max_new_tokens=9),
            answer=Completions(completions=(completion,)),
        )
        return Record(
            sample_id=sample.id, group=sample.group, cluster="", target="", prompts=(), prompt_sha256=(),
            num_prompt_tokens=(), answers=(), grade=task.grade(sample, [turn]),
        )  # fmt: skip

    metrics = task.summarise([record(samples[0], call), record(samples[1], call)])
    assert {name: metric.value for name, metric in metrics.items()} == {
        "tool_selection": 1.0,
        "tool_input_rouge_l": 1.0,
        "false_positive_error": 1.0,
    }


def test_readings_that_agree_are_no_disagreement(tmp_path: Path) -> None:
    answer = "Thought: I know.\nFinal Answer: 42"
    call = '\nThought: look.\nAction: search\nAction Input: {"q": "Qwen"}'
    rows = [{"prompt": "Q1", "response": call}, {"prompt": "Q2", "response": answer}]
    (tmp_path / "tools.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = Plugin(Spec(path=str(tmp_path)), TaskContext())
    for sample in task.samples():
        for reply, tool in ((call, "search"), (answer, None)):
            grade = graded(task, sample, reply)
            assert (grade.extracted, grade.extracted_upstream) == (tool, tool), (sample.group, reply)


def test_a_tool_only_thought_of_is_not_called(tmp_path: Path) -> None:
    answer = "Thought: I know.\nFinal Answer: 42"
    (tmp_path / "tools.jsonl").write_text(json.dumps({"prompt": "Q", "response": answer}))
    task = Plugin(Spec(path=str(tmp_path)), TaskContext())
    reply = f"<think>\nThought: perhaps\nAction: search\n</think>\n{answer}"
    assert graded(task, task.samples()[0], reply).score == 1.0


def test_rows_without_a_response_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tools.jsonl").write_text('{"prompt": "Q"}\n')
    with pytest.raises(DataError, match="response"):
        Plugin(Spec(path=str(tmp_path)), TaskContext()).samples()
