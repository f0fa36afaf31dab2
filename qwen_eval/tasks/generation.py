"""What every benchmark that reads a generated text shares: its rows, base or chat form, one question a sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from qwen_eval.core import (
    JSON,
    ConfigError,
    Generate,
    Grade,
    Metric,
    Prompt,
    Record,
    Request,
    Sample,
    Sampling,
    Turn,
)
from qwen_eval.data.rows import Source
from qwen_eval.data.sources import nearest, num_drawn
from qwen_eval.metrics import share
from qwen_eval.tasks.benchmark import Benchmark, SpecT
from qwen_eval.tasks.registry import TaskContext

PROMPTS = Path(__file__).parent.parent / "assets" / "prompts"


def prompt_text(name: str) -> str:
    """An official few-shot text, byte for byte."""
    return (PROMPTS / name).read_bytes().decode("utf-8")


class GenerativeTask(Benchmark[SpecT]):
    """Ask once and extract the answer from the text. Subclasses define the rows, the prompt and the extraction.

    Under `protocol=upstream` only the end of text stops a generation, and the extraction of the official scripts is
    used. Otherwise `stops` end it where the answer cannot change any more.
    """

    def __init__(self, spec: SpecT, context: TaskContext):
        super().__init__(spec, context)
        if spec.max_new_tokens < 1:
            raise ConfigError(f"task.max_new_tokens={spec.max_new_tokens}: at least 1")

    # --- rows ---

    @abstractmethod
    def rows(self, source: Source) -> list[Sample]:
        """All samples of the split, in the official order."""

    @cached_property
    def _samples(self) -> Sequence[Sample]:
        samples = self.rows(self.source)
        if self.spec.subjects:
            groups = sorted({sample.group for sample in samples})
            for subject in self.spec.subjects:
                if subject not in groups:
                    raise ConfigError(f"task.subjects={subject}: not in {self.name}{nearest(subject, groups)}")
            samples = [sample for sample in samples if sample.group in self.spec.subjects]
        return samples

    def samples(self) -> Sequence[Sample]:
        return self._samples

    # --- asking ---

    @abstractmethod
    def prompt(self, sample: Sample) -> Prompt: ...

    def stops(self) -> tuple[str, ...]:
        """Strings that end a base model's answer; never used in chats nor under `protocol=upstream`."""
        return ()

    def sampling(self, sample: Sample) -> Sampling:
        return Sampling()

    @property
    def num_completions(self) -> int:
        return 1

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if turns:
            return None
        return Generate(
            prompt=self.prompt(sample),
            max_new_tokens=self.reply_tokens,
            stop=() if self.is_chat or self.is_upstream else self.stops(),
            sampling=self.context.sampling(self.spec, self.sampling(sample)),
            n=self.num_completions,
        )

    # --- grading ---

    @abstractmethod
    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade: ...

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        records = list(records)
        metrics = {"accuracy": share([record.grade.score for record in records])}
        if not self.is_upstream:
            metrics["accuracy_upstream"] = share([record.grade.score_upstream for record in records])
        return metrics

    def describe(self) -> Mapping[str, JSON]:
        return {
            "split": self.spec.split,
            "shots": self.shots,
            "format": self.form,
            "num_samples": num_drawn(len(self.samples()), self.spec.limit),
            "max_new_tokens": self.spec.max_new_tokens,
            **super().describe(),
        }

    @property
    def shots(self) -> int:
        return self.spec.shots
