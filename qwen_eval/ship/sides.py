"""The two models over the same items: each asks its part of a block, and every answer is stored at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_eval.activity import stage
from qwen_eval.config import EvalSpec
from qwen_eval.core import (
    DataError,
    Engine,
    Grade,
    HasNotes,
    ModelError,
    Record,
    Request,
    Sample,
    StoreError,
    Task,
    ids_sha256,
)
from qwen_eval.engines.cache import EngineCache
from qwen_eval.engines.options import check_options
from qwen_eval.models.fingerprint import WEIGHTS
from qwen_eval.models.hub import local_checkpoint_dir
from qwen_eval.report.runs import CERTIFICATE
from qwen_eval.runs.evaluate import ask, run_spec, selected, task_context
from qwen_eval.runs.prompt_lengths import read_by_model
from qwen_eval.runs.record_json import record_from_json, record_to_json
from qwen_eval.runs.store import RunDirectory
from qwen_eval.ship.config import SIDES, ShipSpec
from qwen_eval.tasks.registry import build

FAILED = "failed"
REMOTE = ("openai", "fake")  # need no memory here
ROOM = 3  # times the bytes of the weights: they may be unpacked, and each model needs a cache


class Engines:
    """Both models where they fit in memory together, else one at a time."""

    def __init__(self, spec: ShipSpec) -> None:
        self._spec = spec
        self.is_together = spec.together == "true" or (spec.together == "auto" and fit_together(spec))
        first = EngineCache()
        self._caches = {"reference": first, "candidate": EngineCache() if self.is_together else first}

    def open(self, side: str, cell: EvalSpec) -> Engine:
        """The engine of a side; where both are open, each may take half of the memory that an engine may take."""
        if self.is_together:
            half = cell.engine.memory_fraction / 2
            cell = dataclasses.replace(cell, engine=dataclasses.replace(cell.engine, memory_fraction=half))
        return self._caches[side].open(cell)

    def close(self) -> None:
        for slot in self._caches.values():
            slot.close()


def fit_together(spec: ShipSpec) -> bool:
    """Whether both models go into the memory that is free, with room; vLLM takes it all for itself."""
    local = [side for side in SIDES if spec.engine(side).name not in REMOTE]
    if any(spec.engine(side).name == "vllm" for side in local):
        return False
    sizes = [_weight_bytes(spec, side) for side in local]
    if len(local) < 2:
        return True
    if None in sizes:
        return False
    from qwen_eval.models.device import memory_bytes
    from qwen_eval.models.load import choose_devices

    devices = [choose_devices(spec.model(side).device) for side in local]
    free = min(sum(memory_bytes(device)[0] for device in several) for several in devices)
    return ROOM * sum(size or 0 for size in sizes) < free


def _weight_bytes(spec: ShipSpec, side: str) -> int | None:
    """Of the files; None where there are none, as for random weights or a hub that was not asked yet."""
    try:
        directory = local_checkpoint_dir(spec.model(side))
    except ModelError:
        return None
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in WEIGHTS) or None


class TaskSide:
    """One task with one of the models: its items, and the records of those that were asked."""

    def __init__(self, spec: ShipSpec, side: str, name: str, directory: Path, engines: Engines) -> None:
        self.side, self._engines = side, engines
        self.cell = spec.cell(side, name, run_dir=str(directory))
        self.warnings = check_options(self.cell.engine, self.cell.model)
        with stage(f"loading {self.cell.model.name}"):
            engine = engines.open(side, self.cell)
        self.info: Mapping[str, Any] = dict(engine.info)
        self.task: Task = build(self.cell.task, task_context(self.cell, engine))
        self.notes = list(self.task.notes) if isinstance(self.task, HasNotes) else []
        self.samples = selected(self.task, self.cell)
        self._rank = {sample.id: rank for rank, sample in enumerate(self.samples)}
        self.spec: dict[str, Any] = run_spec(self.cell, self.task, self.samples, engine.info)
        self._run = RunDirectory.open(directory, elsewhere="tag=NAME")
        try:
            content = {**self.spec, "kind": CERTIFICATE, "side": side, "engine": self.info}
            self._run.check_spec(content, overwrite=spec.overwrite)
            self.records = self._stored()
        except BaseException:
            self._run.close()
            raise

    def _stored(self) -> dict[str, Record]:
        found = {record.sample_id: record for record in self._run.records()}
        stranger = next((name for name in found if name not in self._rank), None)
        if stranger is not None:
            raise StoreError(f"{self._run.path}: records.jsonl has sample {stranger} of another run; pass tag=NAME")
        return found

    def ask(self, samples: Sequence[Sample]) -> None:
        """Ask those that have no record, in the task's order, so that prefixes are shared. A failed item scores 0."""
        missing = sorted((s for s in samples if s.id not in self.records), key=lambda sample: self._rank[sample.id])
        if not missing:
            return
        engine = self._engines.open(self.side, self.cell)

        def keep_failed(sample: Sample, request: Request) -> None:
            self._keep(failed_record(engine, sample, request))

        done = len(self.records)
        model = self.cell.model.name
        ask(engine, self.task, missing, self._keep, model=model, num_done=done, keep_failed=keep_failed)

    def _keep(self, record: Record) -> None:
        self._run.append(record)
        self.records[record.sample_id] = as_stored(record)  # a resumed run reads what was written, so does this one

    def close(self) -> None:
        self._run.close()


def as_stored(record: Record) -> Record:
    """The record as it is read back: numbers have fewer digits, tuples are lists."""
    return record_from_json(json.loads(json.dumps(record_to_json(record))))


def failed_record(engine: Engine, sample: Sample, request: Request) -> Record:
    """Of an item whose numbers were not finite: no answer, and the score of a wrong one."""
    rendered = read_by_model(engine, request)
    return Record(
        sample_id=sample.id, group=sample.group, cluster=sample.cluster, target=sample.target,
        prompts=(rendered.text,), prompt_sha256=(ids_sha256(rendered.ids),), num_prompt_tokens=(len(rendered.ids),),
        answers=(), grade=Grade(score=0.0, flags=(FAILED,)),
    )  # fmt: skip


class Pair:
    """Both sides of one task. The candidate is opened when it is first needed: two models rarely fit."""

    def __init__(self, name: str, open_side: Callable[[str], TaskSide]) -> None:
        self.name = name
        self._open, self._sides = open_side, {"reference": open_side("reference")}

    @property
    def reference(self) -> TaskSide:
        return self._sides["reference"]

    @property
    def candidate(self) -> TaskSide:
        if "candidate" not in self._sides:
            opened = self._sides["candidate"] = self._open("candidate")
            if {sample.id for sample in opened.samples} != {sample.id for sample in self.reference.samples}:
                raise DataError(f"tasks={self.name}: the two models are asked other items, so they cannot be paired")
        return self._sides["candidate"]

    def side(self, name: str) -> TaskSide:
        return self.reference if name == "reference" else self.candidate

    def records(self, samples: Sequence[Sample]) -> list[tuple[Record, Record]]:
        """Both records of each item, with the scores of the protocol in force."""
        protocol = self.reference.cell.protocol
        both = (self.reference.records, self.candidate.records)
        return [(both[0][s.id].under(protocol), both[1][s.id].under(protocol)) for s in samples]

    def close(self) -> None:
        for side in self._sides.values():
            side.close()
