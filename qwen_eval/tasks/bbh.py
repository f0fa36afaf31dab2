"""BIG-Bench Hard: 27 tasks, 3-shot chain of thought, unweighted mean over tasks (https://arxiv.org/abs/2210.09261).

Prompts are the authors' own; the frame around them and the official reading are those of OpenCompass.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from qwen_eval.config import TaskSpec
from qwen_eval.core import DataError, Grade, Metric, Prompt, Record, Sample, Turn
from qwen_eval.data.files import Folder
from qwen_eval.data.rows import Source
from qwen_eval.data.sources import SAMPLES
from qwen_eval.extraction.short_answers import canonical, concluded_choice
from qwen_eval.extraction.symptoms import completions_of, flags
from qwen_eval.metrics import macro, share
from qwen_eval.tasks.generation import GenerativeTask

INSTRUCTION = "Follow the given examples and answer the question.\n{examples}\n\nQ: {question}\nA: "
CHAT_INSTRUCTION = INSTRUCTION + "Let's think step by step."
CANARY = "-----\n"
STOPS = ("\nQ:", "\n\nQ:")


@dataclass(kw_only=True)
class BbhSpec(TaskSpec):
    name: str = "bbh"
    hub_id: str | None = "lukaemon/bbh"
    split: str = "test"
    shots: int = 3
    max_new_tokens: int = 512


class Bbh(GenerativeTask[BbhSpec]):
    Spec = BbhSpec
    version = 2
    average: ClassVar[Literal["macro"]] = "macro"

    @cached_property
    def _examples(self) -> dict[str, str]:
        """The worked examples of each task: beside the data, else the bundled copy of the same files."""
        source = self.source
        if source.is_hub or not source.names("*cot-prompts/*.txt"):
            source = Source("bundled:bbh", Folder(SAMPLES / "bbh"))
        names = source.names("*cot-prompts/*.txt")
        return {_stem(name): source.text(name).partition(CANARY)[2].strip() for name in names}

    def rows(self, source: Source) -> list[Sample]:
        samples = []
        for task, rows in self._tables(source).items():
            if task not in self._examples:
                raise DataError(f"{source.origin}: {task} is not a task of BBH; it has no cot-prompts/{task}.txt")
            for i, row in enumerate(rows):
                samples.append(Sample(id=f"{task}/{i}", group=task, data=row, target=row["target"]))
        return samples

    def _tables(self, source: Source) -> dict[str, list[dict[str, str]]]:
        if source.is_hub:
            tasks = sorted(_stem(path.name) for path in (SAMPLES / "bbh" / "bbh").glob("*.json"))
            return {task: source.hub_rows(task, self.spec.split) for task in tasks}
        names = [name for name in source.names("*.json") if not _stem(name).isupper()]
        if not names:
            raise DataError(f"{source.origin}: no task files (bbh/boolean_expressions.json, ...) there; {source.how}")
        tables = {}
        for name in names:
            table = source.json(name)
            if not isinstance(table, dict) or "examples" not in table:
                raise DataError(f"{source.origin}/{name}: no 'examples' in it, not a task of BBH")
            tables[_stem(name)] = table["examples"]
        return tables

    def prompt(self, sample: Sample) -> Prompt:
        frame = CHAT_INSTRUCTION if self.is_chat else INSTRUCTION
        text = frame.replace("{examples}", self._examples[sample.group]).replace("{question}", sample.data["input"])
        return Prompt.user(text) if self.is_chat else Prompt.raw(text)

    def stops(self) -> tuple[str, ...]:
        return STOPS

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        answer = concluded_choice(completion.text, sample.target, sample.data["input"])
        read_upstream = upstream_answer(completion.text, sample.target)
        is_right_upstream = read_upstream == upstream_target(sample.target)
        return Grade(
            score=float(answer == canonical(sample.target)),
            extracted=answer,
            extracted_upstream=read_upstream,
            score_upstream=float(is_right_upstream),
            flags=flags(completion, has_answer=answer is not None),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """The mean over tasks, each counting the same; then each task."""
        records = list(records)
        scores: dict[str, list[float | None]] = defaultdict(list)
        upstream: dict[str, list[float | None]] = defaultdict(list)
        for record in records:
            scores[record.group].append(record.grade.score)
            upstream[record.group].append(record.grade.score_upstream)
        metrics = {"accuracy": macro(scores)}
        if not self.is_upstream:
            metrics["accuracy_upstream"] = macro(upstream)
        return metrics | {f"accuracy/{task}": share(of_task) for task, of_task in sorted(scores.items())}


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


# --- as the official scripts read ---------------------------------------------------------------------------------


def upstream_target(target: str) -> str:
    return target.strip("()") if re.fullmatch(r"\([A-R]\)", target) else target


def upstream_answer(text: str, target: str) -> str:
    """The official reading: what stands behind the first "answer is " in its line; the first letter for options."""
    line = text.partition("answer is ")[2] if "answer is " in text else text
    line = line.split("\n")[0].strip()
    if re.fullmatch(r"\([A-R]\)", target):
        option = re.search(r"\(([A-Z])\)", line) or re.search(r"([A-Z])", line)
        return option[1] if option else line
    return line.removesuffix(".")
