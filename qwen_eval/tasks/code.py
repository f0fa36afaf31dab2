"""What benchmarks of program writing share: several completions a problem, confined runs in batches, pass@k."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from qwen_eval.config import TaskSpec
from qwen_eval.core import JSON, Completion, ConfigError, Grade, Metric, Record, Sample, Sampling, Turn
from qwen_eval.extraction.symptoms import completions_of, flags
from qwen_eval.metrics import pass_at_k, share
from qwen_eval.sandbox import Mode, Program, Verdict, run_programs
from qwen_eval.tasks.generation import GenerativeTask
from qwen_eval.tasks.registry import TaskContext


@dataclass(kw_only=True)
class CodeSpec(TaskSpec):
    """`samples_per_problem` completions are drawn at `temperature`; pass@k is reported for each of `k`."""

    split: str = "test"
    max_new_tokens: int = 512
    samples_per_problem: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    k: list[int] = field(default_factory=lambda: [1])
    timeout_s: float = 3.0  # of one program with all its tests


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The programs that our reader and the official one take from one completion; None: no program there."""

    robust: str | None
    upstream: str | None


CodeSpecT = TypeVar("CodeSpecT", bound=CodeSpec)
Item = tuple[Sample, Sequence[Turn]]


class CodeTask(GenerativeTask[CodeSpecT]):
    """Programs are read out of completions and run in the sandbox. `grade_many` runs those of many samples at once."""

    runs_programs: Literal[True] = True

    def __init__(self, spec: CodeSpecT, context: TaskContext):
        super().__init__(spec, context)
        n = spec.samples_per_problem
        if n < 1 or spec.temperature < 0:
            raise ConfigError(f"task.samples_per_problem={n}, task.temperature={spec.temperature}: both are positive")
        if n > 1 and spec.temperature == 0:
            raise ConfigError(f"task.samples_per_problem={n}: greedy samples are all the same; set task.temperature")
        for k in spec.k:
            if not 1 <= k <= n:
                raise ConfigError(f"task.k={k}: needs 1 <= k <= task.samples_per_problem={n}")

    @property
    def num_completions(self) -> int:
        return self.spec.samples_per_problem

    def sampling(self, sample: Sample) -> Sampling:
        return Sampling(temperature=self.spec.temperature, top_p=self.spec.top_p, seed=self.spec.seed)

    # --- programs ---

    @abstractmethod
    def read(self, sample: Sample, completion: Completion) -> Readings: ...

    @abstractmethod
    def program(self, sample: Sample, source: str) -> Program:
        """`source` with the benchmark's test of it."""

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        return run_programs(programs, self.spec.timeout_s, mode=cast("Mode", self.context.sandbox))

    def _outcomes(self, pairs: Iterable[tuple[Sample, str | None]]) -> dict[tuple[str, str], str]:
        """Verdict by (sample id, program): equal programs of a sample run once."""
        todo = {(sample.id, source): sample for sample, source in pairs if source is not None}
        programs = [self.program(sample, source) for (_, source), sample in todo.items()]
        return {key: verdict.reason for key, verdict in zip(todo, self.run(programs), strict=True)}

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        return self.grade_many([(sample, turns)])[0]

    def grade_many(self, items: Sequence[Item]) -> list[Grade]:
        """The grades of many samples, in their order, with all programs run as one batch."""
        completions = [completions_of(turns[0]) for _, turns in items]
        readings = [[self.read(item[0], c) for c in found] for item, found in zip(items, completions)]
        outcomes = self._outcomes(
            (sample, source)
            for (sample, _), of_sample in zip(items, readings)
            for reading in of_sample
            for source in (reading.robust, reading.upstream)
        )
        return [
            self._grade_one(sample, found, of_sample, outcomes)
            for (sample, _), found, of_sample in zip(items, completions, readings)
        ]

    def _grade_one(
        self,
        sample: Sample,
        completions: Sequence[Completion],
        readings: Sequence[Readings],
        outcomes: Mapping[tuple[str, str], str],
    ) -> Grade:
        def results(sources: Sequence[str | None]) -> list[str]:
            return ["no program" if source is None else outcomes[sample.id, source] for source in sources]

        robust = results([reading.robust for reading in readings])
        upstream = results([reading.upstream for reading in readings])
        share_robust, share_upstream = (r.count("passed") / len(r) for r in (robust, upstream))
        seen = {name for c, r in zip(completions, readings) for name in flags(c, has_answer=r.robust is not None)}
        return Grade(
            score=share_robust,
            score_upstream=share_upstream,
            extracted=[reason.partition(":")[0] for reason in robust],
            extracted_upstream=[reason.partition(":")[0] for reason in upstream],
            values={
                "num_completions": len(completions),
                "num_passed": robust.count("passed"),
                "reasons": robust,
                "reasons_upstream": upstream,
                "programs": [reading.robust for reading in readings],
                "programs_upstream": [reading.upstream for reading in readings],
            },
            flags=tuple(sorted(seen)),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        records = list(records)
        metrics: dict[str, Metric] = {}
        for k in self.spec.k:
            scores = [
                pass_at_k(n, round(n * (record.grade.score or 0.0)), k)
                for record in records
                if (n := record.grade.values.get("num_completions", 0)) >= k
            ]
            metrics[f"pass@{k}"] = share(scores)
        if not self.is_upstream:
            metrics["pass@1_upstream"] = share([record.grade.score_upstream for record in records])
        return metrics

    def describe(self) -> Mapping[str, JSON]:
        return {
            **super().describe(),
            "samples_per_problem": self.spec.samples_per_problem,
            "temperature": self.spec.temperature,
            "top_p": self.spec.top_p,
            "timeout_s": self.spec.timeout_s,
        }
