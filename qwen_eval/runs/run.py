"""A run as it stands in its directory, finished or not: the one class that recall, report, gate and Python share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen_eval.core import JSON, Metric, Record
from qwen_eval.models.quant.formats import FORMATS
from qwen_eval.runs.fields import as_count, as_number, section
from qwen_eval.runs.frame import frame_of
from qwen_eval.runs.integrity import refuse_damaged
from qwen_eval.runs.record_json import metric_from_json
from qwen_eval.runs.store import RECORDS, RESULT, SPEC, read_json, read_records

if TYPE_CHECKING:
    from pandas import DataFrame

Status = Literal["complete", "partial", "unfinished", "failed", "foreign"]


@dataclass(frozen=True, kw_only=True)
class SessionCounts:
    """The command that finished a run. What earlier commands asked is `num_resumed` samples, of unknown time."""

    run_s: float
    num_samples: int
    num_resumed: int
    num_prompt_tokens: int
    num_answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory, read. `records` are read when first asked for; tables need the result alone.

    `spec` and `result` are the objects in spec.json and result.json; `result` is empty until the run is finished.
    `was_finished`: an earlier command had finished the run, so the command that returns it asked nothing.
    """

    path: Path
    spec: Mapping[str, JSON]
    result: Mapping[str, JSON]
    was_finished: bool = False

    @property
    def kind(self) -> str:
        return str(self.spec.get("kind", "eval"))

    @property
    def config(self) -> Mapping[str, JSON]:
        """Every setting of the run, as the command composed it."""
        return section(self.spec.get("config"))

    @property
    def decides(self) -> Mapping[str, JSON]:
        """The settings that can change the numbers: a run is resumed only where all of them are equal."""
        return section(self.spec.get("decides"))

    @property
    def task_spec(self) -> Mapping[str, JSON]:
        return section(self.config.get("task"))

    @property
    def model_spec(self) -> Mapping[str, JSON]:
        return section(self.config.get("model"))

    @property
    def engine_info(self) -> Mapping[str, JSON]:
        """What the engine reported: dtype and kernels in use, device, digest of the weights."""
        return section(self.result.get("engine"))

    @property
    def benchmark(self) -> Mapping[str, JSON]:
        """What the task reported of itself: split, shots, sha256 of its data."""
        return section(self.decides.get("benchmark"))

    @property
    def task(self) -> str:
        return str(self.task_spec.get("name") or self.path.parent.parent.name)

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
        """Metrics by name with their 95 % intervals, the headline first; empty until the run is finished."""
        return _metrics(self.result.get("metrics"))

    @cached_property
    def rates(self) -> dict[str, Metric]:
        """Shares of truncated, empty, looping ... answers."""
        return _metrics(self.result.get("rates"))

    @property
    def headline(self) -> tuple[str, Metric] | None:
        return next(iter(self.metrics.items()), None)

    @property
    def num_samples(self) -> int | None:
        found = self.result.get("n", self.decides.get("num_samples"))
        return None if found is None else as_count(found)

    @property
    def partial(self) -> Mapping[str, JSON]:
        """Which part of the benchmark was run; empty for the whole."""
        return section(self.result.get("partial"))

    @property
    def is_bundled_sample(self) -> bool:
        """Whether the rows are the few in the package, which are no benchmark."""
        return "data" in self.partial

    @property
    def warnings(self) -> tuple[str, ...]:
        found = self.result.get("warnings")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def session(self) -> SessionCounts | None:
        """None for runs without one: unfinished runs and profiles."""
        row = section(self.result.get("run"))
        if not row:
            return None
        counts = {key: as_count(row[key]) for key in _COUNTS}
        return SessionCounts(run_s=as_number(row["run_s"]), **counts)

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
        return "partial" if self.partial else "complete"

    @property
    def status_note(self) -> str:
        """The status with details for a table: "partial (limit 100)"."""
        if self.status == "partial":
            parts = ("" if key == "data" else f"{key} " for key in self.partial)
            return f"partial ({', '.join(part + _plain(value) for part, value in zip(parts, self.partial.values()))})"
        if self.status == "unfinished":
            return f"unfinished ({len(self.records)} of {self.num_samples or '?'} samples)"
        return self.status

    @property
    def protocol(self) -> str:
        return str(self.decides.get("protocol") or "")

    @cached_property
    def stored_records(self) -> tuple[Record, ...]:
        """The records as stored, with the scores of both protocols; StoreError where the file is damaged."""
        return tuple(read_records(self.path / RECORDS))

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """The graded samples in the order of their answers, with the scores of the run's protocol."""
        return tuple(record.under(self.protocol) for record in self.stored_records)

    def samples(self) -> DataFrame:
        """One row a sample, with the columns of `runs.frame.COLUMNS`; task-specific numbers are `values.NAME`."""
        return frame_of(self.records)


_COUNTS = ("num_samples", "num_resumed", "num_prompt_tokens", "num_answer_tokens")


def load_run(directory: Path | str) -> Run:
    """The run in a directory, finished or not. StoreError for another directory and for a damaged run."""
    directory = Path(directory)
    refuse_damaged(directory)
    result = read_json(directory / RESULT) if (directory / RESULT).exists() else {}
    return Run(path=directory, spec=read_json(directory / SPEC), result=result)


def variant_name(model: Mapping[str, JSON], info: Mapping[str, JSON]) -> str:
    """`"BF16"`, `"Int4"`, `"NF4"`, `"BF16, KV int8"` ...: the precision column of the published tables."""
    parts = [precision_name(model, info)]
    rope = section(model.get("rope"))
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


def _metrics(value: JSON) -> dict[str, Metric]:
    found = section(value)
    return {name: metric_from_json(row) for name, row in found.items() if "value" in section(row)}


def _plain(value: JSON) -> str:
    if value is None or value == "":
        return "none"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
