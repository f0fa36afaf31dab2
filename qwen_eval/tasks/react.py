"""ReAct: how Qwen is shown tools, and how its Thought / Action / Action Input text is read (https://arxiv.org/abs/2210.03629).

`read_step` is ours: labels count at the start of a line only, and a missing part is None. `read_step_upstream` is what
Qwen's tool-use evaluation reads: slices between the first occurrences of the labels, found anywhere, with the slips
that `str.find` makes of an absent one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ARGUMENTS_CHARACTERS = 100_000
STOP_WORDS = ("Observation:", "Observation:\n")  # the tool speaks next, not the model

TOOL = (
    "{name_for_model}: Call this tool to interact with the {name_for_human} API. "
    "What is the {name_for_human} API useful for? {description_for_model} Parameters: {parameters} "
    "Format the arguments as a JSON object."
)
INSTRUCTION = """Answer the following questions as best you can. You have access to the following tools:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {query}"""

_LABEL = re.compile(r"^(Thought|Action|Action Input|Observation|Final Answer):[ \t]*", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """`parameters` is the JSON the model sees, as a list of {"name", "description", "required", "schema"}."""

    name_for_model: str
    name_for_human: str
    description_for_model: str
    parameters: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One turn of the model: a call (`action` and `action_input`) or a `final_answer`."""

    thought: str | None = None
    action: str | None = None
    action_input: str | None = None
    final_answer: str | None = None


def react_prompt(query: str, tools: Sequence[Tool]) -> str:
    """The user message of a question that may be answered with tools."""
    described = "\n\n".join(
        TOOL.format(
            name_for_model=tool.name_for_model,
            name_for_human=tool.name_for_human,
            description_for_model=tool.description_for_model,
            parameters=json.dumps(list(tool.parameters), ensure_ascii=False),
        )
        for tool in tools
    )
    return INSTRUCTION.format(tools=described, names=",".join(tool.name_for_model for tool in tools), query=query)


def read_step(text: str) -> Step:
    """The first value of each label, up to the next label; what follows the first observation is not the model's."""
    parts: dict[str, str] = {}
    labels = list(_LABEL.finditer(text))
    ends = [label.start() for label in labels[1:]] + [len(text)]
    for label, end in zip(labels, ends):  # without labels there is still one end
        if label[1] == "Observation":
            break
        parts.setdefault(label[1], text[label.end() : end].strip())
    return Step(
        thought=parts.get("Thought"),
        action=parts.get("Action"),
        action_input=parts.get("Action Input"),
        final_answer=parts.get("Final Answer"),
    )


def canonical_json(text: str) -> str:
    """Arguments for comparison: JSON5 read, keys sorted; "" where it cannot be read, or is longer than any call."""
    import json5

    try:
        if len(text) > ARGUMENTS_CHARACTERS:
            return ""
        return json.dumps(json5.loads(text), ensure_ascii=False, sort_keys=True)
    except Exception:  # json5 raises ValueError, RecursionError and its own kinds: all mean "not readable"
        return ""


def read_step_upstream(text: str) -> dict[str, str]:
    """The fields of the official evaluation: thought, action, action_input, observation, thought_last, final_answer."""
    text += "\n"
    first, last = text.find, text.rfind
    cuts = {
        "thought": text[: first("Action:")],
        "action": text[_after(text, "Action:") : first("Action Input:")],
        "action_input": text[_after(text, "Action Input:") : first("Observation:")],
        "observation": text[_after(text, "Observation:") : last("Thought:")],
        "thought_last": text[last("Thought:") + len("Thought:") : first("Final Answer:")],
        "final_answer": text[last("Final Answer:") + len("Final Answer:") :],
    }
    fields = {name: cut.strip() for name, cut in cuts.items()}
    return {**fields, "action_input": canonical_json(fields["action_input"])}


def calls_a_tool_upstream(reply: str) -> bool:
    """Whether the official evaluation counts the reply as a call: not when the action is its first line."""
    return "\nAction: " in reply


def _after(text: str, label: str) -> int:
    return text.find(label) + len(label)  # an absent label is "at" -1: the original's slip, kept
