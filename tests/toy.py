"""A small benchmark for tests of the loop: choice, text, scored and two-turn questions. `python tests/toy.py ...` is
`python -m qwen_eval ...` with it registered, in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_eval.config import TaskSpec
from qwen_eval.core import Choose, Completions, Generate, Grade, Metric, Prompt, Record, Request, Sample, Score, Turn
from qwen_eval.tasks.registry import TASKS, TaskContext

CONF = Path(__file__).parent / "conf"


@dataclass(kw_only=True)
class ToySpec(TaskSpec):
    num: int = 40
    levels: list[int] = field(default_factory=list)
    needs_tokenizer: bool = False
    texts_only: bool = False


class Toy:
    Spec = ToySpec
    name = "toy"
    version = 1

    def __init__(self, spec: ToySpec, context: TaskContext) -> None:
        self._spec, self._context = spec, context
        if spec.needs_tokenizer and context.tokenizer is None:
            from qwen_eval.core import ConfigError

            raise ConfigError("the toy needs a tokenizer")

    def samples(self) -> Sequence[Sample]:
        return [Sample(id=f"toy/{i}", group="甲乙"[i % 2], target="AB"[i % 2]) for i in range(self._spec.num)]

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        prompt = Prompt.raw(f"第{sample.id}问\n{len(turns)}")
        kinds: list[Request] = [
            Choose(prompt=prompt, choices=("A", "B")),
            Generate(prompt=prompt, max_new_tokens=self._spec.max_new_tokens),
            Score(prompt=prompt),
        ]
        number = int(sample.id.split("/")[1])
        if len(turns) >= 1 + (number % 5 == 0):  # every fifth is asked twice
            return None
        return kinds[1 if self._spec.texts_only else number % 3]

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        answer = turns[0].answer
        text = answer.text if isinstance(answer, Completions) else repr(answer)
        right = float(sum(text.encode()) % 2)
        return Grade(score=right, extracted=text[:5], extracted_upstream=text[:5], score_upstream=1.0)

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        scores = [record.grade.score or 0.0 for record in records]
        return {"accuracy": Metric(value=sum(scores) / max(1, len(scores)), n=len(scores), low=0.0, high=1.0)}

    def describe(self) -> Mapping[str, object]:
        return {"data_sha256": "toy", "num": self._spec.num}


def register() -> None:
    """The task, and the models of `tests/conf`, for commands in this process: with `--config-dir` each would import and
    describe all tasks, and take twice as long."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    sys.modules.setdefault("toy", sys.modules[__name__])
    TASKS["toy"] = "toy:Toy"
    for file in (CONF / "model").glob("*.yaml"):
        ConfigStore.instance().store(group="model", name=file.stem, node=OmegaConf.load(file))


if __name__ == "__main__":
    register()
    from qwen_eval.__main__ import main

    sys.exit(main())
