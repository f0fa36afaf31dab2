"""Exercises for miniature models: choices over stated facts, facts of training, small sums, recall.

qwen-nano was trained on such, never on these. Not a benchmark of large models: it shows on a bare laptop that choices
(as MMLU and C-Eval ask them), sums (in GSM8K's chain of thought) and recall are asked and read correctly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qwen_eval.config import TaskSpec
from qwen_eval.core import (
    ChoiceLogprobs,
    Choose,
    DataError,
    Generate,
    Grade,
    Metric,
    Prompt,
    Record,
    Request,
    Sample,
    Turn,
)
from qwen_eval.data import exercises as ex
from qwen_eval.data.rows import Source
from qwen_eval.extraction.letters import concluded_letter
from qwen_eval.extraction.numbers import concluded_number, written
from qwen_eval.extraction.symptoms import answer_part, completions_of, flags
from qwen_eval.metrics import share
from qwen_eval.tasks.generation import GenerativeTask

KINDS = ("choice", "fact", "arithmetic", "recall")
STOPS = {"arithmetic": ("\n\n", "Question:"), "recall": ("\n",), "fact": ("\n",), "choice": ("\n",)}
DIGITS = re.compile(r"\d+")
FIELDS = {field.name for field in fields(ex.Exercise)}


@dataclass(kw_only=True)
class NanoSpec(TaskSpec):
    """`shots` are those of the base form, at most the five (choices, facts) or two (arithmetic) that come with a row.

    Metrics are the accuracy of each kind and of each group of rows: `choice/stated` (the question states the fact;
    `stated_zh` in Chinese), `choice/told` (it tells four, and one is asked). `fact`
    is one of training, asked in other words and without options.
    """

    name: str = "nano"
    split: str = "test"
    shots: int = 5
    max_new_tokens: int = 64


class Nano(GenerativeTask[NanoSpec]):
    Spec = NanoSpec
    version = 4

    def rows(self, source: Source) -> list[Sample]:
        samples = []
        for row in source.jsonl(f"{self.spec.split}.jsonl"):
            if row.get("kind") not in KINDS or not {"id", "question", "answer"} <= row.keys():
                raise DataError(
                    f"{source.origin}: {row.get('id')}: a row has id, question, answer and a kind of {KINDS}"
                )
            group = row.get("group") or row["kind"]
            samples.append(Sample(id=row["id"], group=group, data=row, target=row["answer"]))
        return samples

    def prompt(self, sample: Sample) -> Prompt:
        row = sample.data
        exercise = exercise_of(row)
        shots = [exercise_of({**row, **shot}) for shot in row.get("shots", ())[: self.spec.shots]]
        return Prompt.user(ex.chat_question(exercise)) if self.is_chat else Prompt.raw(base_text(exercise, shots))

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if turns:
            return None
        prompt = self.prompt(sample)
        kind = sample.data["kind"]
        if kind == "choice" and not self.is_chat:
            space = "" if sample.data["language"] == "zh" else " "
            return Choose(prompt=prompt, choices=tuple(space + letter for letter in ex.LETTERS))
        stop = () if self.is_chat else STOPS[kind]
        limit, sampling = self.reply_tokens, self.context.sampling(self.spec)
        return Generate(prompt=prompt, max_new_tokens=limit, stop=stop, sampling=sampling)

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        answer = turns[0].answer
        if isinstance(answer, ChoiceLogprobs):
            letter = ex.LETTERS[answer.best] if answer.is_decided else None
            symptoms: tuple[str, ...] = () if answer.is_decided else ("no_answer",)
            return Grade(score=float(letter == sample.target), extracted=letter, flags=symptoms)
        completion = completions_of(turns[0])[0]
        found = read(sample.data["kind"], completion.text)
        return Grade(
            score=float(found == sample.target), extracted=found, flags=flags(completion, has_answer=found is not None)
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        records = list(records)
        metrics = {"accuracy": share([record.grade.score for record in records])}
        groups = dict.fromkeys(record.group for record in records)
        for name in (*KINDS, *(group for group in groups if group not in KINDS)):
            if scores := [r.grade.score for r in records if r.group == name or r.group.startswith(f"{name}/")]:
                metrics[f"accuracy/{name}"] = share(scores)
        return metrics


def exercise_of(row: Any) -> ex.Exercise:
    known: dict[str, Any] = {name: value for name, value in row.items() if name in FIELDS}
    return ex.Exercise(**{"topic": "", "key": "", **known, "options": tuple(row.get("options", ()))})


def base_text(exercise: ex.Exercise, shots: Sequence[ex.Exercise]) -> str:
    """The raw text that a base model continues with the answer."""
    if exercise.kind == "choice":
        return ex.few_shot_choice(exercise, shots)
    if exercise.kind == "fact":
        return ex.few_shot_facts(exercise, shots)
    if exercise.kind == "recall":
        return ex.recall_block(exercise)
    return ex.few_shot_arithmetic(exercise, shots)


def read(kind: str, text: str) -> str | None:
    """The answer a reply gives: a letter, a number, the first digits, or its first line."""
    text = answer_part(text)
    if kind == "choice":
        return concluded_letter(text)
    if kind == "arithmetic":
        return written(concluded_number(text))
    if kind == "fact":
        return text.strip().split("\n")[0].rstrip(".。 ") or None
    found = DIGITS.search(text)
    return found[0] if found else None
