"""Tools as a checkpoint's own template shows them, and calls as Qwen2.5 and Qwen3 write them: `<tool_call>{...}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_eval.tasks.react import Tool

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_REACT_TOOL = re.compile(
    r"^(?P<model>\S+): Call this tool to interact with the (?P<human>.*?) API\. What is the .*? API useful for\? "
    r"(?P<description>.*?) ?Parameters: (?P<parameters>\[.*\])",
    re.MULTILINE | re.DOTALL,
)
_TOOL_END = re.compile(r"\n\s*\n")
_HEAD, _BODY = "You have access to the following", "Use the following format:"


@dataclass(frozen=True, kw_only=True)
class FunctionCall:
    """`arguments` is JSON with sorted keys, "" where what was written is no object."""

    name: str
    arguments: str


def schema(tool: Tool) -> str:
    """A tool as the JSON schema that `apply_chat_template` takes."""
    properties = {
        part["name"]: {**_type(part), "description": str(part.get("description", ""))} for part in tool.parameters
    }
    required = [part["name"] for part in tool.parameters if part.get("required")]
    function = {
        "name": tool.name_for_model,
        "description": tool.description_for_model,
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


def _type(parameter: Mapping[str, Any]) -> dict[str, Any]:
    found = parameter.get("schema")
    return dict(found) if isinstance(found, Mapping) else {"type": str(parameter.get("type", "string"))}


def read_call(reply: str) -> FunctionCall | None:
    """The first call of a reply that can be read; None where there is none."""
    for match in _CALL.finditer(reply):
        try:
            call = json.loads(match[1].strip())
            name, arguments = call["name"], call.get("arguments", {})
            if isinstance(arguments, str):  # some models write the object as a text once more
                arguments = json.loads(arguments)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if isinstance(name, str):
            text = json.dumps(arguments, ensure_ascii=False, sort_keys=True) if isinstance(arguments, dict) else ""
            return FunctionCall(name=name, arguments=text)
    return None


def parse_react(prompt: str) -> tuple[str, list[Tool]] | None:
    """(question, tools) of a ReAct prompt as `react_prompt` writes it; None where it is of another form."""
    rest = prompt.partition(_HEAD)[2]
    listed, body, asked = rest.partition(_BODY)
    query = asked.rpartition("\nQuestion: ")[2].strip()
    tools = [_tool(match) for match in map(_REACT_TOOL.match, _TOOL_END.split(listed)) if match]
    if not body or not query or not tools or any(tool is None for tool in tools):
        return None
    return query, [tool for tool in tools if tool is not None]


def _tool(match: re.Match[str]) -> Tool | None:
    try:
        parameters = json.loads(match["parameters"])
    except ValueError:
        return None
    if not all(isinstance(part, dict) and "name" in part for part in parameters):
        return None
    return Tool(
        name_for_model=match["model"],
        name_for_human=match["human"],
        description_for_model=match["description"],
        parameters=parameters,
    )


def tools_of(rows: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Raises KeyError for a row that is no tool."""
    return [
        Tool(
            name_for_model=row["name_for_model"],
            name_for_human=row.get("name_for_human", row["name_for_model"]),
            description_for_model=row["description_for_model"],
            parameters=row.get("parameters", ()),
        )
        for row in rows
    ]
