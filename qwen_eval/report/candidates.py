"""What the page leads with: each candidate against its reference, in one line over all their tasks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qwen_eval.core import QwenEvalError
from qwen_eval.report.compare import adjusted, compare_runs
from qwen_eval.report.comparison import Comparison, Margins, Side, Verdict
from qwen_eval.report.references import pairs
from qwen_eval.report.verdict import Judgement, joint, judge_all
from qwen_eval.runs.run import Run

Tone: TypeAlias = Literal["good", "bad", "open"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One variant against its reference, over all tasks that both have. `name` is `"REFERENCE → CANDIDATE"`."""

    name: str
    judgements: tuple[Judgement, ...]

    @property
    def quality(self) -> tuple[Judgement, ...]:
        return tuple(j for j in self.judgements if j.comparison.family != "speed")

    @property
    def worst(self) -> Judgement:
        """The one whose difference is furthest to the worse, by its margin; one without a difference before all."""
        return min(self.quality or self.judgements, key=_room)

    @property
    def tone(self) -> Tone:
        verdicts = {j.verdict for j in self.judgements}
        words = {j.decision.word if j.decision else "" for j in self.quality}
        if verdicts & {"worse", "not comparable"} or any(map(_is_broken, self.quality)):
            return "bad"
        return "open" if words & {"", "not decided"} and not self._is_identical else "good"

    @property
    def text(self) -> str:
        """The answer in one sentence: what broke, else what all tasks together say."""
        words: tuple[tuple[str, Verdict], ...]
        words = (("changed for the worse", "worse"), ("not comparable", "not comparable"))
        said = [f"{word}: {', '.join(tasks)}" for word, verdict in words if (tasks := self._tasks(verdict))]
        return "; ".join([*said, *self._together()]) or "speed and memory as before, within the margin"

    def _tasks(self, verdict: Verdict) -> list[str]:
        """Tasks of this verdict; not those that the answer by the margin names as worse already."""
        found = [j for j in self.judgements if j.verdict == verdict and not _is_broken(j)]
        return list(dict.fromkeys(j.comparison.task for j in found))

    def _together(self) -> list[str]:
        judged = [j for j in self.quality if j.verdict != "not comparable"]
        said = [j.decision.text if j.decision else j.why for j in judged]
        if len(judged) > 1:
            said = [joint(judged)]
        if not self._is_identical:
            return said
        is_enough = all(j.decision and j.decision.word == "equivalent" for j in judged)
        return [*said * is_enough, "every answer is the same"]

    @property
    def _is_identical(self) -> bool:
        return bool(self.quality) and all(j.comparison.is_identical for j in self.quality)


def _room(judgement: Judgement) -> float:
    c = judgement.comparison
    if c.difference is None or not c.margin:
        return -math.inf
    return (c.difference.delta if c.higher_is_better else -c.difference.delta) / c.margin


def _is_broken(judgement: Judgement) -> bool:
    return judgement.decision is not None and judgement.decision.word == "worse by more than the margin"


def candidates(judgements: Sequence[Judgement]) -> list[Candidate]:
    """Judgements by pair of model and variant, in the order of the first of each."""
    members: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        members[pair_of(judgement.comparison)].append(judgement)
    return [Candidate(name=name, judgements=tuple(found)) for name, found in members.items()]


def in_order(judgements: Sequence[Judgement]) -> list[Judgement]:
    """The same, with the context lengths of one run from short to long."""
    places = {j.comparison.paths: i for i, j in reversed(list(enumerate(judgements)))}

    def place(judgement: Judgement) -> tuple[int, int]:
        length = judgement.comparison.metric.removeprefix("ppl/")
        return places[judgement.comparison.paths], int(length) if length.isdecimal() else 0

    return sorted(judgements, key=place)


def pair_of(comparison: Comparison) -> str:
    return comparison.pair or comparison.label


def against_references(runs: Sequence[Run], margins: Margins) -> list[Judgement]:
    """Every run that has a reference, judged against it; Holm over all of them. What cannot be read is left out."""
    found: list[Comparison] = []
    for reference, run in pairs(runs):
        try:
            found += compare_runs(Side(run=reference), Side(run=run), margins)
        except (QwenEvalError, OSError):
            continue  # the table of problems names it
    return judge_all(adjusted(found))
