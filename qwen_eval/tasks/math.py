"""MATH: competition problems in seven subjects and five levels (https://arxiv.org/abs/2103.03874).

Base models get the four worked problems of Minerva (https://arxiv.org/abs/2206.14858), chat models the problem with
the request to box the answer. Answers are compared by meaning; `protocol=upstream` compares normalised strings.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_eval.config import TaskSpec
from qwen_eval.core import GRADING_TIMEOUT, ConfigError, DataError, Grade, Message, Metric, Prompt, Record, Sample, Turn
from qwen_eval.data.rows import Source
from qwen_eval.extraction.math import boxed, concluded_answer, is_same, is_same_upstream, upstream_answer
from qwen_eval.extraction.math_verifier import ComparisonStopped
from qwen_eval.extraction.symptoms import completions_of, flags
from qwen_eval.metrics import share
from qwen_eval.tasks.generation import GenerativeTask, prompt_text

FILES = ("{split}.jsonl", "math_oai500_{split}.jsonl", "{split}.jsonl.gz")
BOX_REQUEST = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
STOPS = ("Problem:", "I hope it is correct")


@dataclass(kw_only=True)
class MathSpec(TaskSpec):
    name: str = "math"
    hub_id: str | None = "HuggingFaceH4/MATH-500"  # the full test split was withdrawn from the hub
    split: str = "test"
    shots: int = -1  # -1: 4 for base models and 0 in chats
    max_new_tokens: int = 512


class Math(GenerativeTask[MathSpec]):
    Spec = MathSpec
    version = 2
    grades_elsewhere: Literal[True] = True  # formulas are compared in a process of their own

    @property
    def shots(self) -> int:
        return self.spec.shots if self.spec.shots >= 0 else (0 if self.is_chat else 4)

    def rows(self, source: Source) -> list[Sample]:
        split = self.spec.split
        names = [name.format(split=split) for name in FILES]
        rows = source.hub_rows(None, split) if source.is_hub else source.jsonl(*names)
        samples = []
        for i, row in enumerate(rows):
            gold = row.get("answer") or boxed(str(row.get("solution", "")))
            if "problem" not in row or gold is None:
                raise DataError(
                    f"{source.origin} row {i + 1}: no problem with a boxed or given answer, not a row of MATH"
                )
            subject = str(row.get("type") or row.get("subject") or "all")
            samples.append(Sample(id=f"{split}/{i}", group=subject, data=row, target=str(gold)))
        return samples

    def prompt(self, sample: Sample) -> Prompt:
        stored: list[dict[str, str]] = json.loads(prompt_text("math_4shot.json"))
        *examples, query = stored
        if not 0 <= self.shots <= len(examples) // 2:
            raise ConfigError(f"task.shots={self.shots}: the official prompt has {len(examples) // 2} examples")
        problem: str = sample.data["problem"]
        texts = [turn["prompt"] for turn in examples[: 2 * self.shots]]
        texts.append(query["prompt"].replace("{problem}", problem))
        if not self.is_chat:
            return Prompt.raw("\n".join(texts))
        if not self.shots:
            return Prompt.user(problem + BOX_REQUEST)
        turns = [Message(role=("assistant" if i % 2 else "user"), content=text) for i, text in enumerate(texts)]
        return Prompt(messages=(Message(role="system", content="You are a helpful assistant."), *turns))

    def stops(self) -> tuple[str, ...]:
        return STOPS

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        answer, read_upstream = concluded_answer(completion.text), upstream_answer(completion.text)
        is_right_upstream = is_same_upstream(read_upstream, sample.target)
        is_right, stopped = _compared(answer, sample.target)
        return Grade(
            score=float(is_right),
            extracted=answer,
            extracted_upstream=read_upstream,
            score_upstream=float(is_right_upstream),
            values={"level": str(sample.data.get("level", "")).removeprefix("Level ")},
            flags=(*stopped, *flags(completion, has_answer=answer is not None)),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        records = list(records)
        groups: dict[str, list[float | None]] = defaultdict(list)
        for record in records:
            groups[record.group].append(record.grade.score)
            if level := record.grade.values.get("level"):
                groups[f"level {level}"].append(record.grade.score)
        per_group = {f"accuracy/{name}": share(scores) for name, scores in sorted(groups.items())}
        return super().summarise(records) | per_group


def _compared(answer: str | None, gold: str) -> tuple[bool, tuple[str, ...]]:
    """Whether both mean the same, and the flag of a comparison that was stopped: it counts as wrong."""
    try:
        return is_same(answer, gold), ()
    except ComparisonStopped:
        return False, (GRADING_TIMEOUT,)
