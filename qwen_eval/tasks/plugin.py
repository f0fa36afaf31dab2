"""Tool use in ReAct form, as Qwen's plugin evaluation scores it: which tool, with which input, and when none is due.

Rows are the user's: JSON lines {"prompt": the whole ReAct question, "response": the gold ReAct text}; a row is a
negative when its gold text calls no tool (or says `"is_negative": true`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwen_eval.config import TaskSpec
from qwen_eval.core import DataError, Grade, Metric, Prompt, Record, Sample, Sampling, Tokenizer, Turn
from qwen_eval.data.sources import Source
from qwen_eval.extraction.symptoms import answer_part, completions_of, flags
from qwen_eval.metrics import mean, share
from qwen_eval.tasks.generation import GenerativeTask
from qwen_eval.tasks.react import calls_a_tool_upstream, read_step, read_step_upstream

INPUT_CHARACTERS = 4_000  # of an action's input that are compared: the overlap takes time with their square


@dataclass(kw_only=True)
class Spec(TaskSpec):
    name: str = "plugin"
    split: str = "test"
    mode: str = "chat"
    max_new_tokens: int = 512
    repetition_penalty: float = 1.1  # what the official run inherits from generation_config.json


class Plugin(GenerativeTask[Spec]):
    Spec = Spec
    version = 2

    def rows(self, source: Source) -> list[Sample]:
        samples = []
        for name in source.names("*.jsonl*"):
            for i, row in enumerate(source.jsonl(name)):
                if "prompt" not in row or "response" not in row:
                    raise DataError(f"{source.origin}/{name} row {i}: needs both prompt and response")
                is_negative = bool(row.get("is_negative", not calls_a_tool_upstream("\n" + row["response"])))
                group = "negative" if is_negative else "positive"
                samples.append(Sample(id=f"{name}/{i}", group=group, data=row, target=row["response"]))
        if not samples:
            raise DataError(f"{source.origin}: no .jsonl file with prompt and response there")
        return samples

    def prompt(self, sample: Sample) -> Prompt:
        return Prompt.user(sample.data["prompt"])

    def sampling(self, sample: Sample) -> Sampling:
        return Sampling(repetition_penalty=self.spec.repetition_penalty)

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        tool, tool_upstream = read_step(answer_part(completion.text)).action, called_upstream(completion.text)
        if sample.group == "negative":
            robust, upstream = tool is None, tool_upstream is None
        else:
            robust = _same_tool(tool, read_step(sample.target).action)
            upstream = is_right_tool(completion.text, sample.target)
        rouge = input_rouge_l(completion.text, sample.target, self.context.tokenizer)
        return Grade(
            score=float(robust),
            extracted=tool,
            extracted_upstream=tool_upstream,
            score_upstream=float(upstream),
            values={"input_rouge_l": rouge},
            flags=flags(completion, has_answer=bool(completion.text.strip())),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        records = list(records)
        positives = [record.grade for record in records if record.group == "positive"]
        negatives = [record.grade for record in records if record.group == "negative"]
        errors = [None if grade.score is None else 1 - grade.score for grade in negatives]
        return {
            "tool_selection": share([grade.score for grade in positives]),
            "tool_input_rouge_l": mean([grade.values["input_rouge_l"] for grade in positives]),
            "false_positive_error": share(errors, higher_is_better=False),
        }


def is_right_tool(reply: str, gold: str) -> bool:
    """The official reading: the reply says "\\nAction: ", and the tool is the gold one but for case and spaces."""
    reply_tool, gold_tool = read_step_upstream(reply)["action"], read_step_upstream(gold)["action"]
    return calls_a_tool_upstream(reply) and _same_tool(reply_tool, gold_tool)


def called_upstream(reply: str) -> str | None:
    """The tool that the official evaluation reads, where it counts the reply as a call."""
    return read_step_upstream(reply)["action"] if calls_a_tool_upstream(reply) else None


def _same_tool(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one.strip().lower() == other.strip().lower()


def input_rouge_l(reply: str, gold: str, tokenizer: Tokenizer | None) -> float:
    """ROUGE-L F1 of the two action inputs over the model's own tokens; characters where no tokenizer is known."""
    texts = [read_step_upstream(text)["action_input"][:INPUT_CHARACTERS] for text in (gold, reply)]
    if not all(texts):
        return 0.0
    spaced = [" ".join(_pieces(text, tokenizer)) for text in texts]
    return float(_scorer().score(spaced[0], spaced[1])["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Whitespace())


def _pieces(text: str, tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return list(text)
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


class _Whitespace:
    def tokenize(self, text: str) -> list[str]:
        return text.split()
