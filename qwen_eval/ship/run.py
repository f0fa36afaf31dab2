"""The loop: draw a block, ask both models, look, and stop a task as soon as its answer is certain."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwen_eval.core import Sample, Score
from qwen_eval.report.runs import CERTIFICATE
from qwen_eval.report.sequential import Array
from qwen_eval.runs.provenance import provenance
from qwen_eval.runs.store import FORMAT, RunDirectory
from qwen_eval.ship.config import SIDES, ShipSpec
from qwen_eval.ship.drawing import drawn_order, ends_until, is_macro, reach, weights
from qwen_eval.ship.sides import FAILED, Engines, Pair, TaskSide
from qwen_eval.ship.standing import ShipVerdict, Standing, draws_of, of_items, of_texts, verdict

# What a certificate was made for; the same directory is resumed only for the same question.
ASKED = ("margin", "margin_ppl", "alpha", "seed", "protocol")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked of one task: its items in the drawn order, and what each side was."""

    standing: Standing
    ordered: Sequence[Sample]  # all of the benchmark
    weights: Array
    is_macro: bool
    pair: Pair

    @property
    def drawn(self) -> Sequence[Sample]:
        return self.ordered[: self.standing.num_items]

    @property
    def notes(self) -> list[str]:
        """What the task says of its data, options without effect, and prompts that are not the same."""
        sides = [self.pair.side(side) for side in SIDES]
        found = [note for side in sides for note in (*side.warnings, *side.notes)]
        if sides[0].spec["decides"]["requests_sha256"] != sides[1].spec["decides"]["requests_sha256"]:
            found.append("the two models are asked in other words, as where one of them is a chat model")
        task = sides[0].cell.task
        if task.limit is not None or task.subjects:
            part = [*([f"limit {task.limit}"] if task.limit is not None else []), *task.subjects]
            found.append(f"the benchmark is a part: {', '.join(part)}")
        if "bundled" in str(sides[0].spec["decides"]["benchmark"].get("origin", "")):
            found.append("the benchmark is the bundled sample")
        return found

    def failed(self, side: str) -> list[str]:
        records = self.pair.side(side).records
        return [sample.id for sample in self.drawn if FAILED in records[sample.id].grade.flags]


@dataclass
class Budget:
    """Time left to this command. A block that was begun is finished: evidence is made of whole blocks only."""

    max_minutes: float | None
    start_s: float = field(default_factory=time.monotonic)

    @property
    def is_spent(self) -> bool:
        return self.max_minutes is not None and time.monotonic() - self.start_s >= 60 * self.max_minutes


def ship_directory(spec: ShipSpec) -> Path:
    return Path(spec.runs_dir) / CERTIFICATE / f"{spec.reference.name}-vs-{spec.candidate.name}" / spec.tag


class ShipRun:
    """One certificate in the making. `with ShipRun(spec) as run: run.all_tasks()`."""

    def __init__(self, spec: ShipSpec) -> None:
        self.spec, self.path = spec, ship_directory(spec)
        self.asked: dict[str, Asked] = {}
        self._budget = Budget(spec.max_minutes)
        self._directory = RunDirectory.open(self.path, elsewhere="tag=NAME")
        self._engines: Engines | None = None
        try:
            self._directory.check_spec(self._question(), overwrite=spec.overwrite)
            self._engines = Engines(spec)
        except BaseException:
            self.close()
            raise

    def _question(self) -> dict[str, Any]:
        spec = self.spec
        decides: dict[str, Any] = {key: getattr(spec, key) for key in ASKED}
        decides |= {"task": ",".join(spec.tasks)}
        config = {"reference": spec.reference.name, "candidate": spec.candidate.name}
        return {"format": FORMAT, "kind": CERTIFICATE, "config": config, "decides": decides, "provenance": provenance()}

    def all_tasks(self) -> ShipVerdict:
        """Task by task; unless `all_tasks` is set, the first one that fails ends it."""
        for name in self.spec.tasks:
            if self.verdict.word == "do not ship" and not self.spec.all_tasks:
                break
            if self.asked and self._budget.is_spent:
                break
            self._one_task(name)
        return self.verdict

    @property
    def verdict(self) -> ShipVerdict:
        return verdict([asked.standing for asked in self.asked.values()], list(self.spec.tasks), self.spec.alpha)

    def _one_task(self, name: str) -> None:
        pair = Pair(name, partial(self._open_side, name))
        try:
            samples = pair.reference.samples
            is_text = isinstance(pair.reference.task.request(samples[0], ()), Score)
            found = self._read_texts(pair) if is_text else self._draw(pair)
            if found is not None:
                self.asked[name] = found
        finally:
            pair.close()

    def _open_side(self, name: str, side: str) -> TaskSide:
        assert self._engines is not None
        return TaskSide(self.spec, side, name, self.path / name / side, self._engines)

    # --- items ---

    def _draw(self, pair: Pair) -> Asked | None:
        """Block by block, the reference first; None where time was over before the first block was whole."""
        assert self._engines is not None
        ordered = drawn_order(pair.reference.samples, self.spec.seed)
        counts = weights(pair.reference.task, ordered)
        ends = ends_until(len(ordered), self.spec.max_items)
        num_drawn = 0
        for at, end in enumerate(ends):
            far = reach(ends, at, is_together=self._engines.is_together)
            if self._budget.is_spent or not self._run_ahead(pair, ordered, [e for e in ends if e <= far], end):
                break
            pair.candidate.ask(ordered[num_drawn:end])
            num_drawn = end
            if self._is_decided(self._standing(pair, ordered[:num_drawn], counts, ends, is_final=False)):
                break
        if num_drawn == 0:
            return None
        standing = self._standing(pair, ordered[:num_drawn], counts, ends, is_final=True)
        macro = is_macro(pair.reference.task)
        return Asked(standing=standing, ordered=ordered, weights=counts, is_macro=macro, pair=pair)

    def _run_ahead(self, pair: Pair, ordered: Sequence[Sample], ends: Sequence[int], wanted: int) -> bool:
        """Ask the reference by whole blocks; False where time was over before `wanted`."""
        start = 0
        for end in ends:
            if self._budget.is_spent and end > wanted:
                break
            pair.reference.ask(ordered[start:end])
            start = end
        return start >= wanted

    def _standing(
        self, pair: Pair, drawn: Sequence[Sample], counts: Array, ends: Sequence[int], *, is_final: bool
    ) -> Standing:
        draws = draws_of(pair.records(drawn), counts)
        return of_items(pair.name, draws, ends, self.spec.margin / 100, self.spec.alpha, is_final=is_final)

    def _is_decided(self, standing: Standing) -> bool:
        alpha = self.spec.alpha
        others = [asked.standing for asked in self.asked.values()]
        found = verdict([*others, standing], list(self.spec.tasks), alpha).by_task[standing.task]
        if found == "ship" and self.spec.two_sided:
            return standing.is_equivalent(alpha)
        return found != "not decided"

    # --- texts ---

    def _read_texts(self, pair: Pair) -> Asked | None:
        samples = pair.reference.samples
        for side in SIDES:
            if self._budget.is_spent:
                return None
            pair.side(side).ask(samples)
        metrics = pair.reference.task.summarise(pair.reference.records.values())
        group = next(iter(metrics)).rpartition("/")[2]  # of several lengths the headline's alone
        ordered = [sample for sample in samples if sample.group == group] or list(samples)
        standing = of_texts(pair.name, pair.records(ordered), self.spec.margin_ppl, self.spec.alpha)
        standing = dataclasses.replace(standing, num_items=len(ordered), size=len(ordered))
        counts = weights(pair.reference.task, ordered)
        return Asked(standing=standing, ordered=ordered, weights=counts, is_macro=False, pair=pair)

    # --- ---

    def close(self) -> None:
        if self._engines is not None:
            self._engines.close()
        self._directory.close()

    def __enter__(self) -> ShipRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
