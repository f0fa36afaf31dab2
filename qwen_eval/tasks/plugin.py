"""Tool use as Qwen's plugin evaluation scores it: which tool, with which input, and when none is due.

`plugin` asks in ReAct form, `plugin_template` through the tool template of the checkpoint (Qwen2.5, Qwen3). Rows are
JSON lines of two kinds: the official {"prompt": the whole ReAct question, "response": the gold ReAct text}, or those of
the bundled sample {"query", "tools", "action" and "action_input", or "final_answer"}. A row is a negative when its gold
text calls no tool (or says `"is_negative": true`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from qwen_eval.config import TaskSpec
from qwen_eval.core import (
    JSON,
    ConfigError,
    DataError,
    Grade,
    Metric,
    Prompt,
    Record,
    Sample,
    Sampling,
    Tokenizer,
    Turn,
)
from qwen_eval.data.rows import Source
from qwen_eval.extraction.symptoms import answer_part, completions_of, flags
from qwen_eval.metrics import mean, share
from qwen_eval.tasks.function_calls import parse_react, read_call, schema, tools_of
from qwen_eval.tasks.generation import GenerativeTask
from qwen_eval.tasks.react import (
    calls_a_tool_upstream,
    canonical_json,
    react_prompt,
    read_step,
    read_step_upstream,
)

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

INPUT_CHARACTERS = 4_000  # of an action's input that are compared: the overlap takes time with their square


@dataclass(kw_only=True)
class PluginSpec(TaskSpec):
    name: str = "plugin"  # or plugin_template
    split: str = "test"
    mode: str = "chat"
    max_new_tokens: int = 512
    repetition_penalty: float = 1.1  # what the official run inherits from generation_config.json


@dataclass(frozen=True, kw_only=True)
class Called:
    """The tool that a text calls, None for none, and its input as JSON with sorted keys ("" where it is not JSON)."""

    tool: str | None
    arguments: str = ""

    @property
    def name(self) -> str | None:
        """As tools are compared: without case and spaces."""
        return None if self.tool is None else self.tool.strip().lower()


class Plugin(GenerativeTask[PluginSpec]):
    Spec = PluginSpec
    version = 3
    bundled = "plugin"

    @property
    def is_template(self) -> bool:
        return self.name == "plugin_template"

    # --- rows ---

    def rows(self, source: Source) -> list[Sample]:
        samples = []
        for name in source.names("*.jsonl*"):
            for i, row in enumerate(source.jsonl(name)):
                data = _own_row(row, f"{source.origin}/{name} row {i + 1}") if "query" in row else dict(row)
                if "prompt" not in data or "response" not in data:
                    raise DataError(f"{source.origin}/{name} row {i + 1}: needs both prompt and response")
                is_negative = bool(data.get("is_negative", not calls_a_tool_upstream("\n" + data["response"])))
                group = "negative" if is_negative else "positive"
                samples.append(Sample(id=f"{name}/{i}", group=group, data=data, target=data["response"]))
        if not samples:
            raise DataError(f"{source.origin}: no .jsonl file with prompt and response there")
        return samples

    # --- asking ---

    def prompt(self, sample: Sample) -> Prompt:
        if not self.is_template:
            return Prompt.user(sample.data["prompt"])
        if not self.is_chat:
            raise ConfigError(f"task.mode={self.spec.mode}: {self.name} shows tools by a chat template; use mode=chat")
        found = parse_react(sample.data["prompt"])
        if found is None:
            raise DataError(f"{self.source.origin} {sample.id}: no ReAct prompt with tools; ask it with task=plugin")
        query, tools = found
        return Prompt(messages=Prompt.user(query).messages, tools=tuple(schema(tool) for tool in tools))

    def sampling(self, sample: Sample) -> Sampling:
        return Sampling(repetition_penalty=self.spec.repetition_penalty)

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        gold = gold_of(sample.target)
        ours = called_by_template(completion.text) if self.is_template else called(completion.text)
        official = None if self.is_template else called_upstream(completion.text)
        robust = is_right(ours, gold, sample.group)
        upstream = None if official is None else is_right(official, gold, sample.group)
        read = ours if official is None else official  # of whose input: the official reading's, if any
        values: dict[str, JSON] = {
            "input_rouge_l": rouge_l(read.arguments, gold.arguments, self.context.tokenizer),
            "input_exact": float(ours.name == gold.name and bool(gold.arguments) and ours.arguments == gold.arguments),
            "lang": str(sample.data.get("lang", "")),
        }
        return Grade(
            score=float(robust),
            extracted=ours.name,
            extracted_upstream=None if official is None else official.name,
            score_upstream=None if upstream is None else float(upstream),
            values=values,
            flags=flags(completion, has_answer=bool(completion.text.strip())),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        records = list(records)
        positives = [record.grade for record in records if record.group == "positive"]
        negatives = [record.grade for record in records if record.group == "negative"]
        metrics = {
            "tool_selection": share([grade.score for grade in positives]),
            "tool_input_rouge_l": mean([grade.values["input_rouge_l"] for grade in positives]),
            "tool_input_exact": share([grade.values["input_exact"] for grade in positives]),
            "false_positive_error": _errors([grade.score for grade in negatives]),
        }
        if not self.is_upstream and not self.is_template:
            metrics["tool_selection_upstream"] = share([grade.score_upstream for grade in positives])
            metrics["false_positive_error_upstream"] = _errors([grade.score_upstream for grade in negatives])
        for lang in sorted({str(grade.values["lang"]) for grade in positives} - {""}):
            of_it = [grade.score for grade in positives if grade.values["lang"] == lang]
            metrics[f"tool_selection/{lang}"] = share(of_it)
        return metrics

    def describe(self) -> Mapping[str, JSON]:
        return {**super().describe(), "tools": "template" if self.is_template else "react"}


def _errors(scores: Sequence[float | None]) -> Metric:
    return share([None if score is None else 1 - score for score in scores], higher_is_better=False)


def _own_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A row of the bundled form with its `prompt` and `response` in the official one."""
    try:
        prompt = react_prompt(row["query"], tools_of(row["tools"]))
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{place}: needs query and tools with name_for_model and description_for_model") from None
    if "action" in row:
        given = json.dumps(row.get("action_input", {}), ensure_ascii=False)
        return {
            **row,
            "prompt": prompt,
            "response": f"Thought: I need it.\nAction: {row['action']}\nAction Input: {given}",
        }
    return {**row, "prompt": prompt, "response": f"Thought: I know.\nFinal Answer: {row.get('final_answer', '')}"}


# --- readings --------------------------------------------------------------------------------------------------------


def called(reply: str) -> Called:
    """What a ReAct reply calls: labels count at the start of a line, the first one too."""
    step = read_step(answer_part(reply))
    return Called(tool=step.action, arguments=canonical_json(step.action_input or ""))


def called_upstream(reply: str) -> Called:
    """What the official evaluation reads; it sees no call in a text that begins with one."""
    fields = read_step_upstream(reply)
    tool = fields["action"] if calls_a_tool_upstream(reply) else None
    return Called(tool=tool, arguments=fields["action_input"])


def called_by_template(reply: str) -> Called:
    call = read_call(answer_part(reply))
    return Called(tool=None) if call is None else Called(tool=call.name, arguments=call.arguments)


def is_right(found: Called, gold: Called, group: str) -> bool:
    if group == "negative":
        return found.tool is None
    return found.name is not None and found.name == gold.name


def is_right_tool(reply: str, gold: str) -> bool:
    """The official reading: the reply says "\\nAction: ", and the tool is the gold one but for case and spaces."""
    return is_right(called_upstream(reply), gold_of(gold), "positive")


def gold_of(response: str) -> Called:
    """The gold call, which the official script reads without asking whether it is one."""
    fields = read_step_upstream(response)
    return Called(tool=fields["action"], arguments=fields["action_input"])


def input_rouge_l(reply: str, gold: str, tokenizer: Tokenizer | None) -> float:
    """ROUGE-L F1 of the two action inputs over the model's own tokens; characters where no tokenizer is known."""
    return rouge_l(read_step_upstream(reply)["action_input"], read_step_upstream(gold)["action_input"], tokenizer)


def rouge_l(found: str, gold: str, tokenizer: Tokenizer | None) -> float:
    if not found or not gold:
        return 0.0
    spaced = [" ".join(_pieces(text[:INPUT_CHARACTERS], tokenizer)) for text in (gold, found)]
    return float(_scorer().score(spaced[0], spaced[1])["rougeL"].fmeasure)


@cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Whitespace())


def _pieces(text: str, tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return list(text)
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


class _Whitespace:
    def tokenize(self, text: str) -> list[str]:
        return text.split()
