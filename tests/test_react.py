"""ReAct texts: the prompt, our reader, and the official reader against its recorded outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_eval.tasks.react import (
    Step,
    Tool,
    calls_a_tool_upstream,
    canonical_json,
    react_prompt,
    read_step,
    read_step_upstream,
)

SEARCH = Tool(
    name_for_model="google_search",
    name_for_human="Google Search",
    description_for_model="It finds pages.",
    parameters=[{"name": "search_query", "description": "关键词", "required": True, "schema": {"type": "string"}}],
)


def test_the_official_reader(golden: Path) -> None:
    file = golden / "eval" / "extraction" / "plugin.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    for line in file.read_text().splitlines():
        row = json.loads(line)
        gen, gold = read_step_upstream(row["gen"]), read_step_upstream(row["response"])
        assert gen == row["parsed"]
        assert gold == row["gold_parsed"]
        same = gen["action"].lower() == gold["action"].lower()
        assert (calls_a_tool_upstream(row["gen"]) and same) == row["action_right"]
        assert calls_a_tool_upstream(row["gen"]) == row["negative_bad"]


@pytest.mark.parametrize(
    ("text", "step"),
    [
        (
            'Thought: I look.\nAction: search\nAction Input: {"q": 1}\nObservation: none',
            Step(thought="I look.", action="search", action_input='{"q": 1}'),
        ),
        ("Action: search\nAction Input: {}", Step(action="search", action_input="{}")),  # a call on the first line
        (
            'Thought: t\nAction: run\nAction Input: {\n"a": 2\n}',
            Step(thought="t", action="run", action_input='{\n"a": 2\n}'),
        ),
        ("Thought: done\nFinal Answer: 42", Step(thought="done", final_answer="42")),
        ("The Action: label inside a line is no label", Step()),
        ("Thought: a\nObservation: x\nAction: made up", Step(thought="a")),
        ("", Step()),
    ],
)
def test_our_reader(text: str, step: Step) -> None:
    assert read_step(text) == step


def test_a_prompt_shows_every_tool_and_its_name() -> None:
    prompt = react_prompt("Who is {he}?", [SEARCH, SEARCH])
    assert prompt.startswith("Answer the following questions as best you can.")
    assert prompt.endswith("Begin!\n\nQuestion: Who is {he}?")
    assert "one of [google_search,google_search]" in prompt
    assert "What is the Google Search API useful for? It finds pages. Parameters: [{" in prompt
    assert '"description": "关键词"' in prompt


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("{b: 1, 'a': 2}", '{"a": 2, "b": 1}'), ('"x"', '"x"'), ("{", ""), ("", ""), ("[" * 5000, "")],
)
def test_arguments_are_compared_in_canonical_form(text: str, canonical: str) -> None:
    assert canonical_json(text) == canonical
