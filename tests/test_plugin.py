"""Tool use: the official tool choice, input overlap and false positives, on the recorded replies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from readers import graded
from test_gsm8k import DATA, golden_rows

from qwen_eval.core import Completion, Completions, DataError, Generate, ModelError, Record, Sample, Turn
from qwen_eval.metrics import rates
from qwen_eval.models.template import ChatTemplate
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.tasks.function_calls import parse_react, read_call
from qwen_eval.tasks.plugin import Plugin, input_rouge_l, is_right_tool
from qwen_eval.tasks.plugin import PluginSpec as Spec
from qwen_eval.tasks.react import Tool, react_prompt, read_step_upstream
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


def record(task: Plugin, sample: Sample, reply: str) -> Record:
    completion = Completion(text=reply, finish_reason="eos", num_tokens=9)
    turn = Turn(
        request=Generate(prompt=task.prompt(sample), max_new_tokens=9), answer=Completions(completions=(completion,))
    )
    return Record(
        sample_id=sample.id, group=sample.group, cluster="", target="", prompts=(), prompt_sha256=(),
        num_prompt_tokens=(), answers=(turn.answer,), grade=task.grade(sample, [turn]),
    )  # fmt: skip


def test_a_file_of_positives_and_negatives_gives_the_three_official_metrics(tmp_path: Path) -> None:
    call = 'Thought: look.\nAction: search\nAction Input: {"q": "Qwen"}'
    rows = [{"prompt": "Q1", "response": call}, {"prompt": "Q2", "response": "Thought: I know.\nFinal Answer: 42"}]
    (tmp_path / "tools.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = Plugin(Spec(path=str(tmp_path)), TaskContext())
    samples = task.samples()
    assert [sample.group for sample in samples] == ["positive", "negative"]

    metrics = task.summarise([record(task, samples[0], call), record(task, samples[1], call)])
    assert {name: metric.value for name, metric in metrics.items()} == {
        "tool_selection": 1.0,
        "tool_input_rouge_l": 1.0,
        "tool_input_exact": 1.0,
        "false_positive_error": 1.0,
        "tool_selection_upstream": 1.0,
        "false_positive_error_upstream": 1.0,
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


# --- the bundled sample, in both forms -------------------------------------------------------------------------------


def plugin(name: str = "plugin", protocol: str = "robust") -> Plugin:
    return Plugin(Spec(name=name, data="bundled"), TaskContext(is_chat=True, protocol=protocol))


def golden_reply(task: Plugin, sample: Sample) -> str:
    if not task.is_template:
        return str(sample.target)
    if sample.group == "negative":
        return str(sample.data["final_answer"])
    call = {"name": sample.data["action"], "arguments": sample.data["action_input"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def test_the_sample_has_thirty_rows_in_two_languages() -> None:
    samples = plugin().samples()
    assert [(s.data["lang"], s.group) for s in samples].count(("en", "positive")) == 10
    assert [(s.data["lang"], s.group) for s in samples].count(("zh", "negative")) == 5
    assert len(samples) == 30
    assert all(2 <= len(sample.data["tools"]) <= 5 for sample in samples)


@pytest.mark.parametrize("name", ["plugin", "plugin_template"])
@pytest.mark.parametrize("protocol", ["robust", "upstream"])
def test_gold_replies_score_perfectly(name: str, protocol: str) -> None:
    task = plugin(name, protocol)
    records = [record(task, sample, golden_reply(task, sample)) for sample in task.samples()]
    found = {metric: (value.value, value.n) for metric, value in task.summarise(records).items()}
    assert found["tool_selection"] == found["tool_input_rouge_l"] == found["tool_input_exact"] == (1.0, 20)
    assert found["false_positive_error"] == (0.0, 10)
    assert found["tool_selection/zh"] == (1.0, 10)


def test_readings_disagree_only_where_they_read_another_tool() -> None:
    """A call where none is due is read alike by both, and no call at all is no tool to either."""
    task = plugin()
    positive, negative = task.samples()[0], task.samples()[10]
    call = "Thought: look.\nAction: get_weather\nAction Input: {}"
    alike = [record(task, negative, call), record(task, positive, call), record(task, positive, "I do not know.")]
    assert rates(alike)["extractor_disagreement"].value == 0.0
    missed = record(task, positive, "Action: Get_Weather \nAction Input: {}")  # "\nAction: " is not there
    assert (missed.grade.extracted, missed.grade.extracted_upstream) == ("get_weather", None)
    assert (missed.grade.score, missed.grade.score_upstream) == (1.0, 0.0)
    assert rates([missed])["extractor_disagreement"].value == 1.0


def test_the_template_shows_the_tools_of_the_react_prompt() -> None:
    task = plugin("plugin_template")
    prompt = task.prompt(task.samples()[7])
    assert prompt.messages[-1].content == "I have lentils, carrots and rice, and I eat no meat. What can I cook?"
    recipe = json.loads(prompt.tools[0])["function"]
    assert recipe["parameters"] == {
        "type": "object",
        "properties": {
            "ingredients": {"type": "array", "items": {"type": "string"}, "description": "list of ingredients"},
            "vegetarian": {"type": "boolean", "description": "only recipes without meat and fish"},
        },
        "required": ["ingredients"],
    }
    template = (Path(__file__).parent / "data" / "templates" / "qwen2.5.jinja").read_text(encoding="utf-8")
    shown = ChatTemplate({"default": template}, variables={}, special=["<|im_start|>", "<|im_end|>"]).text(prompt)
    assert shown.count('"name": "find_recipes"') == 1
    assert "<tool_call></tool_call>" in shown


def test_every_bundled_prompt_gives_its_tools_back() -> None:
    for sample in plugin().samples():
        found = parse_react(sample.data["prompt"])
        assert found is not None
        assert found[0] == sample.data["query"]
        assert [tool.name_for_model for tool in found[1]] == [tool["name_for_model"] for tool in sample.data["tools"]]
    assert parse_react("Just a question") is None
    multi = react_prompt("two\nlines", [Tool(name_for_model="a", name_for_human="A", description_for_model="does a.")])
    assert parse_react(multi) == (
        "two\nlines", [Tool(name_for_model="a", name_for_human="A", description_for_model="does a.", parameters=[])]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "name", "arguments"),
    [
        ('Sure.\n<tool_call>\n{"name": "f", "arguments": {"b": 1, "a": "x"}}\n</tool_call>', "f", '{"a": "x", "b": 1}'),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "f", '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": {}}', "f", "{}"),  # the closing tag was not reached
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "f", ""),
        ("<tool_call>not JSON</tool_call>", None, ""),
        ('{"name": "f"}', None, ""),  # no call without its tag
        ("<tool_call>" + "[" * 100_000, None, ""),
    ],
)
def test_calls_are_read_as_qwen_writes_them(reply: str, name: str | None, arguments: str) -> None:
    call = read_call(reply)
    assert (None if call is None else call.name) == name
    assert call is None or call.arguments == arguments


def test_a_call_only_thought_of_is_not_called_through_a_template() -> None:
    task = plugin("plugin_template")
    negative = task.samples()[10]
    reply = '<think>maybe <tool_call>{"name": "get_weather"}</tool_call>?</think>144'
    assert record(task, negative, reply).grade.score == 1.0


def test_a_checkpoint_without_a_template_is_told_to_use_react() -> None:
    task = plugin("plugin_template")
    with pytest.raises(ModelError, match="ReAct"):
        load_tokenizer(DATA).render(task.prompt(task.samples()[0]))
