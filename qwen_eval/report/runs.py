"""Run directories as the report sees them: what was run, under which protocol, in which state, with which answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from qwen_eval.core import JSON, ConfigError, Metric, Record, StoreError
from qwen_eval.models.quant.formats import FORMATS
from qwen_eval.runs.integrity import refuse_damaged
from qwen_eval.runs.store import RECORDS, metric_from_json, read_json, read_records

CERTIFICATE = "ship"  # the kind of what a certificate was made from: a random part of a benchmark, no run to tabulate
Status = Literal["complete", "partial", "unfinished", "failed", "foreign"]


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A directory that looks like a run and is none that can be read."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """One run directory. `records`, with the scores of the run's protocol, are read when first asked for."""

    path: Path
    spec: Mapping[str, JSON]
    result: Mapping[str, JSON]

    @property
    def kind(self) -> str:
        return str(self.spec.get("kind", "eval"))

    @property
    def config(self) -> Mapping[str, JSON]:
        return _mapping(self.spec.get("config"))

    @property
    def decides(self) -> Mapping[str, JSON]:
        return _mapping(self.spec.get("decides"))

    @property
    def model_spec(self) -> Mapping[str, JSON]:
        return _mapping(self.config.get("model"))

    @property
    def engine_info(self) -> Mapping[str, JSON]:
        return _mapping(self.result.get("engine"))

    @property
    def benchmark(self) -> Mapping[str, JSON]:
        """What the task said of itself: split, shots, sha256 of its data ..."""
        return _mapping(self.decides.get("benchmark"))

    @property
    def task(self) -> str:
        return str(_mapping(self.config.get("task")).get("name") or self.path.parent.parent.name)

    @property
    def model(self) -> str:
        return str(self.model_spec.get("name") or self.path.parent.name)

    @property
    def tag(self) -> str:
        return str(self.config.get("tag") or "default")

    @property
    def variant(self) -> str:
        return variant_name(self.model_spec, self.engine_info)

    @property
    def label(self) -> str:
        """The model, with its tag where that is not the default one."""
        return self.model if self.tag == "default" else f"{self.model} [{self.tag}]"

    @property
    def weights(self) -> str:
        """The digest of the weights; "" for a run that recorded none."""
        return str(self.decides.get("weights") or "")

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        return _metrics(self.result.get("metrics"))

    @cached_property
    def rates(self) -> dict[str, Metric]:
        return _metrics(self.result.get("rates"))

    @property
    def headline(self) -> tuple[str, Metric] | None:
        return next(iter(self.metrics.items()), None)

    @property
    def num_samples(self) -> int | None:
        found = self.result.get("n", self.decides.get("num_samples"))
        return None if found is None else int(found)

    @property
    def status(self) -> Status:
        if self.kind == "eval" and not (self.config.get("task") and self.config.get("model")):
            return "foreign"
        if not self.result:
            return "unfinished"
        if self.result.get("error"):
            return "failed"
        if self.kind == "eval" and (self.headline is None or math.isnan(self.headline[1].value)):
            return "failed"
        return "partial" if self.result.get("partial") else "complete"

    @property
    def status_note(self) -> str:
        """The status with what is known of it, for a table: "partial (limit 100)"."""
        if self.status == "partial":
            parts = _mapping(self.result.get("partial"))
            return (
                "partial ("
                + ", ".join(
                    _plain(value) if key == "data" else f"{key} {_plain(value)}" for key, value in parts.items()
                )
                + ")"
            )
        if self.status == "unfinished":
            return f"unfinished ({len(self.records)} of {self.num_samples or '?'} samples)"
        return self.status

    @cached_property
    def records(self) -> tuple[Record, ...]:
        protocol = str(self.decides.get("protocol"))
        return tuple(record.under(protocol) for record in read_records(self.path / RECORDS))


@dataclass(frozen=True, kw_only=True)
class RunSet:
    runs: tuple[LoadedRun, ...]
    unreadable: tuple[Unreadable, ...]

    @property
    def evals(self) -> tuple[LoadedRun, ...]:
        return tuple(run for run in self.runs if run.kind == "eval")

    @property
    def profiles(self) -> tuple[LoadedRun, ...]:
        return tuple(run for run in self.runs if run.kind != "eval")

    @property
    def finished(self) -> tuple[LoadedRun, ...]:
        """Evaluations with a number: complete or partial."""
        return tuple(run for run in self.evals if run.status in ("complete", "partial"))


def find_runs(roots: Iterable[str | Path]) -> RunSet:
    """Every run directory under `roots` (or the roots themselves), sorted by path; damaged ones are named, not dropped.

    ConfigError for a root that does not exist.
    """
    runs: list[LoadedRun] = []
    unreadable: list[Unreadable] = []
    for directory in _candidates(roots):
        try:
            run = load_run(directory)
            if run.kind != CERTIFICATE:
                runs.append(run)
        except (OSError, StoreError) as error:
            reason = str(error).removeprefix(str(directory)).lstrip("/: ")
            unreadable.append(Unreadable(path=directory, reason=reason))
    return RunSet(runs=tuple(runs), unreadable=tuple(unreadable))


def load_run(directory: Path) -> LoadedRun:
    """The spec and the result of one directory; StoreError that says what is wrong with it."""
    refuse_damaged(directory)
    spec = read_json(directory / "spec.json")
    result = read_json(directory / "result.json") if (directory / "result.json").exists() else {}
    return LoadedRun(path=directory, spec=spec, result=result)


def variant_name(model: Mapping[str, JSON], info: Mapping[str, JSON]) -> str:
    """`"BF16"`, `"Int4"`, `"NF4"`, `"BF16, KV int8"` ...: the precision column of the published tables."""
    parts = [precision_name(model, info)]
    rope = _mapping(model.get("rope"))
    for key, value in (("NTK", rope.get("dynamic_ntk")), ("LogN", model.get("logn"))):
        if str(value).lower() in ("true", "false"):
            parts.append(key if str(value).lower() == "true" else f"no {key}")
    if str(model.get("window") or "none") != "none":
        parts.append("window")
    return ", ".join(parts)


def precision_name(model: Mapping[str, JSON], info: Mapping[str, JSON]) -> str:
    dtypes = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
    quant = str(info.get("quant") or model.get("quant") or "none")  # a packed checkpoint need not be announced
    dtype = str(info.get("dtype") or model.get("dtype") or "auto").removeprefix("torch.")
    known = FORMATS.get(quant)
    name = (known.label if known else quant) if quant != "none" else dtypes.get(dtype, dtype.upper())
    return f"{name}, KV int8" if model.get("kv_cache") == "int8" else name


def base_name(model: str) -> str:
    """`"qwen-14b-chat-int4"` -> `"qwen-14b-chat"`: the row that its variants share."""
    lowered = model.lower()
    for ending in ("-llm-int8", "-int4", "-int8", "-nf4", "-bf16", "-fp16", "-fp32", "-kv8", "-kvint8"):
        if lowered.endswith(ending):
            return model[: -len(ending)]
    return model


def order(run: LoadedRun) -> tuple[JSON, ...]:
    """Models by name with numbers as numbers, then precision, task, path."""
    return (*natural(run.label), precision_rank(run.variant), run.variant, run.task, str(run.path))


def natural(text: str) -> tuple[tuple[tuple[int, float, str], ...]]:
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return (tuple((0, float(p), "") if p[:1].isdigit() else (1, 0.0, p) for p in parts if p),)


def precision_rank(variant: str) -> int:
    labels = [each.label for each in sorted(FORMATS.values(), key=lambda each: (-each.bits, not each.is_stored))]
    ranks = ("FP32", "BF16", "FP16", "AUTO", *filter(None, labels))
    first = variant.partition(",")[0]
    return ranks.index(first) * 10 + variant.count(",") if first in ranks else 99


def profile_cells(run: LoadedRun) -> list[Mapping[str, JSON]]:
    cells = run.result.get("cells")
    return [cell for cell in cells if isinstance(cell, Mapping)] if isinstance(cells, list) else []


def speeds_of(cell: Mapping[str, JSON]) -> list[float]:
    """Raw tokens/s of each repeat; one value where only one is stored."""
    raw = cell.get("tok_per_s")
    values = raw if isinstance(raw, list) else [raw]
    return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]


def device_name(run: LoadedRun) -> str:
    device = run.result.get("device") or run.engine_info.get("device")
    if isinstance(device, Mapping):
        device = device.get("name")
    return str(device or "unknown")


def _candidates(roots: Iterable[str | Path]) -> list[Path]:
    found: set[Path] = set()
    for root in map(Path, roots):
        if not root.is_dir():
            raise ConfigError(f"{root}: no such directory; give a run directory or one above them (runs=runs)")
        for name in ("spec.json", "records.jsonl", "result.json"):
            found.update(path.parent for path in root.rglob(name))
    return sorted(found)


def _metrics(rows: JSON) -> dict[str, Metric]:
    return {
        str(name): metric_from_json(row)
        for name, row in _mapping(rows).items()
        if isinstance(row, Mapping) and "value" in row
    }


def _mapping(value: JSON) -> Mapping[str, JSON]:
    return value if isinstance(value, Mapping) else {}


def _plain(value: JSON) -> str:
    if value is None or value == "":
        return "none"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
