"""The Hugging Face agent: reference answers score 100, planted mistakes as the official rules say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qwen_eval.core import Completion, Completions, Generate, Record, Sample, Turn
from qwen_eval.tasks.hf_agent import HfAgent, read_chat, read_run, steps_of, tool_names
from qwen_eval.tasks.hf_agent import HfAgentSpec as Spec
from qwen_eval.tasks.registry import TaskContext

AGENTS = ("hf_agent", "hf_agent_chat")


def agent(name: str = "hf_agent", protocol: str = "robust") -> HfAgent:
    return HfAgent(Spec(name=name, data="bundled"), TaskContext(protocol=protocol, is_chat=True))


def golden(name: str, code: str) -> str:
    tools = " and ".join(f"`{tool}`" for tool in tool_names() if tool in code)
    if name == "hf_agent":
        return f"tools: {tools}.\n\nAnswer:\n```py\n{code}\n```"
    return f"I will use the tools {tools}.\n\n```py\n{code}\n```\n"


def record(task: HfAgent, sample: Sample, replies: Sequence[str]) -> Record:
    turns: list[Turn] = []
    while (request := task.request(sample, turns)) is not None:
        text = replies[len(turns)]
        completion = Completion(text=text, finish_reason="eos", num_tokens=9)
        turns.append(Turn(request=request, answer=Completions(completions=(completion,))))
    return Record(
        sample_id=sample.id, group="", cluster=sample.cluster, target=None, prompts=(), prompt_sha256=(),
        num_prompt_tokens=(), answers=(), grade=task.grade(sample, turns),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "num"), [("hf_agent", 27), ("hf_agent_chat", 47)])
@pytest.mark.parametrize("protocol", ["robust", "upstream"])
def test_the_reference_answers_score_100(name: str, num: int, protocol: str) -> None:
    task = agent(name, protocol)
    records = [
        record(task, sample, [golden(name, step.answers[0]) for step in steps_of(sample)]) for sample in task.samples()
    ]
    metrics = task.summarise(records)
    assert {key: (metric.value, metric.n) for key, metric in metrics.items() if key != "code_upstream"} == {
        "code": (1.0, num), "tool_selection": (1.0, num), "tool_used": (1.0, num),
    }  # fmt: skip
    assert metrics["code"].num_clusters == 11


@pytest.mark.parametrize("answer", [0, 1])
def test_each_alternative_answer_is_right(answer: int) -> None:
    task = agent()
    sample = next(sample for sample in task.samples() if len(steps_of(sample)[0].answers) > 1)
    [step] = record(task, sample, [golden("hf_agent", steps_of(sample)[0].answers[answer])]).grade.values["steps"]
    assert step["code"] == step["tool_selection"] == step["tool_used"] == 1.0


URL = "text_reader(summarizer(text_downloader(url)))"  # "Read me a summary of the web page"


@pytest.mark.parametrize(
    ("explanation", "code", "scores"),
    [
        # a tool is missing in words and code: 1 - 0.25 each, and the result is another one
        ("`text_downloader` and `text_reader`", "text_reader(text_downloader(url))", (0.75, 0.75, 0.3, 0.3)),
        # two tools too many in words: 1 - 2 * 0.25; the code is right
        ("`text_downloader`, `summarizer`, `text_reader`, `translator`, `text_qa`", URL, (0.5, 1.0, 1.0, 1.0)),
        # the answer was computed, but the last value is another one: it stands in the state
        ("`text_downloader`, `summarizer`, `text_reader`", f"audio = {URL}\nx = 'done'", (1.0, 1.0, 0.75, 0.3)),
        # no code at all
        ("`text_downloader`, `summarizer`, `text_reader`", "", (1.0, 0.25, 0.3, 0.3)),
        # all other tools named: the floor is 0
        ("`document_qa` `image_qa` `text_qa` `translator` `transcriber`", URL, (0.0, 1.0, 1.0, 1.0)),
        # plain Python is right for us; the official interpreter stops at an import
        ("`text_downloader`, `summarizer`, `text_reader`", f"import math\n{URL}", (1.0, 1.0, 1.0, 0.3)),
        # the official interpreter takes the nearest name for a misspelt variable
        ("`text_downloader`, `summarizer`, `text_reader`", URL.replace("url", "urls"), (1.0, 1.0, 0.3, 1.0)),
    ],
)
def test_planted_mistakes_score_as_the_rules_say(explanation: str, code: str, scores: tuple[float, ...]) -> None:
    task = agent()
    sample = next(sample for sample in task.samples() if steps_of(sample)[0].answers == (URL,))
    [step] = record(task, sample, [f"tools: {explanation}.\n\nAnswer:\n```py\n{code}\n```"]).grade.values["steps"]
    assert (step["tool_selection"], step["tool_used"], step["code"], step["code_upstream"]) == scores


@pytest.mark.parametrize(
    "code", ["while True: pass", "import os; os._exit(0)", "print('x' * 10**8)", "a = 'x' * 10**12"]
)
def test_hostile_code_is_wrong_code(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_eval.tasks.hf_agent.STEP_S", 1.0)
    task = agent()
    sample = task.samples()[0]
    [step] = record(task, sample, [f"tools.\n\nAnswer:\n```py\n{code}\n```"]).grade.values["steps"]
    assert step["code"] == step["code_upstream"] == 0.3


def test_a_conversation_shows_its_own_replies_and_renames_the_speakers() -> None:
    task = agent("hf_agent_chat")
    sample = task.samples()[0]
    first = task.request(sample, ())
    assert isinstance(first, Generate)
    assert first.stop == ("_HUMAN_:", "=====")
    reply = Completions(completions=(Completion(text="I will use `translator`.", finish_reason="eos", num_tokens=9),))
    second = task.request(sample, [Turn(request=first, answer=reply)])
    assert isinstance(second, Generate)
    text = second.prompt.messages[0].content
    assert text.endswith(
        "\n_HUMAN_: Translate the following `text` from Spanish to English.\n\n_ASSISTANT_: I will use `translator`.\n"
        "\n_HUMAN_: Is it positive or negative?\n\n_ASSISTANT_: "
    )
    assert "Human:" not in text
    assert text.count("- translator: This is a tool that translates") == 1


def test_code_is_read_where_it_stands() -> None:
    assert read_run("tool: `x`.\n\nAnswer:\n```py\na = 1\n```\n\nMore words") == (
        "I will use the following tool: `x`.",
        "a = 1",
    )
    assert read_run("tools, but no code") == ("I will use the following tools, but no code", "")
    assert read_chat("Use `x`.\n```py\na = 1\nb = 2\n```\nthen") == ("Use `x`.", "a = 1\nb = 2")
    assert read_chat("Use `x`.\n```python\na = 1") == ("Use `x`.", "a = 1")  # cut at the limit
