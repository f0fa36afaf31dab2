"""`python -m qwen_eval.profile mode=finetune method=lora,qlora seq=256,512`: memory and seconds of an optimizer step.

A step is `accumulation` micro-batches of one sequence, forward and backward, and the optimizer, as the published tables
mean it. Each method and length is measured in a process of its own; several GPUs can be planned, not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_eval.activity import stage
from qwen_eval.config import ModelSpec, RopeSpec, check_values, not_one_of
from qwen_eval.core import JSON, ConfigError, ModelError
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.training_cost import METHODS, SHARDINGS, TuningCost
from qwen_eval.profile.cells import quant_of, shape_of
from qwen_eval.profile.grid import DONE, in_child
from qwen_eval.runs.fields import rows
from qwen_eval.runs.provenance import deciding_versions, provenance
from qwen_eval.runs.store import FORMAT, RunDirectory

METHOD_NAMES = {"lora": "LoRA", "lora_emb": "LoRA (emb)", "qlora": "Q-LoRA", "full": "Full-parameter"}  # as published
TASK = "finetune"
CHILD = ("-m", "qwen_eval.profile.finetune_child")
GRID = ("mode", "method", "seq", "plan", "on", "gpus", "sharding")  # say which cells, not how each is measured
PLACES = ("runs_dir", "tag", "overwrite", "quiet", "published", "timeout_s")

MeasureStep = Callable[["FinetuneSpec", "Tuning"], dict[str, JSON]]


@dataclass(kw_only=True)
class FinetuneSpec:
    """Every combination of method and seq is measured. The defaults are the published settings."""

    model: ModelSpec = field(default_factory=ModelSpec)
    mode: list[str] = field(default_factory=lambda: ["finetune"])
    method: list[str] = field(default_factory=lambda: ["lora"])  # lora | lora_emb | qlora | full
    seq: list[int] = field(default_factory=lambda: [256])  # tokens of a micro-batch
    accumulation: int = 8  # micro-batches of a step
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    checkpointing: bool = True  # activations of a block are made again in the backward pass
    repetitions: int = 3  # steps that are measured, after one that is not
    num_threads: int | None = None
    memory_gib: float | None = None  # what a cell may take, and what the plan must fit; null: what the device has
    timeout_s: float = 3600.0
    plan: bool = False
    on: str | None = None  # plan=true: for this device, e.g. A100-SXM4-80GB
    gpus: int = 1  # plan=true only
    sharding: str = "none"  # none | zero2 | zero3 | fsdp
    published: bool = True
    seed: int = 1024
    runs_dir: str = "runs"
    tag: str = "default"
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One cell."""

    method: str
    seq: int

    @property
    def name(self) -> str:
        return f"finetune {self.method}"

    @property
    def key(self) -> str:
        return f"{self.name} {self.seq}"


def check(spec: FinetuneSpec) -> FinetuneSpec:
    """ConfigError for a value out of range or without effect."""
    check_values(spec)
    if spec.mode != ["finetune"]:
        raise ConfigError(f"mode={','.join(spec.mode)}: finetune is profiled by itself; run the other modes apart")
    for method in spec.method:
        if method not in METHODS:
            raise not_one_of("method", method, METHODS)
    if spec.sharding not in SHARDINGS:
        raise not_one_of("sharding", spec.sharding, SHARDINGS)
    lowest = {"accumulation": 1, "rank": 1, "repetitions": 1, "num_threads": 1, "gpus": 1}
    for key, low in lowest.items():
        value = getattr(spec, key)
        if value is not None and value < low:
            raise ConfigError(f"{key}={value}: must be at least {low}")
    if not spec.method or not spec.seq or min(spec.seq) < 2:
        raise ConfigError(f"seq={spec.seq}: one or more lengths of at least 2 tokens")
    if not spec.plan and (spec.gpus > 1 or spec.on is not None):
        raise ConfigError(f"gpus={spec.gpus}, on={spec.on}: several or other GPUs are planned, not measured; plan=true")
    if (spec.gpus > 1) == (spec.sharding == "none"):
        raise ConfigError(f"gpus={spec.gpus}, sharding={spec.sharding}: several GPUs share by one of {SHARDINGS[1:]}")
    if not 0 <= spec.dropout < 1:
        raise ConfigError(f"dropout={spec.dropout}: must be in [0, 1)")
    return spec


def tunings(spec: FinetuneSpec) -> list[Tuning]:
    return [Tuning(method=method, seq=seq) for method in dict.fromkeys(spec.method) for seq in dict.fromkeys(spec.seq)]


def model_of(spec: FinetuneSpec, tuning: Tuning) -> ModelSpec:
    """The model with its base quantized where the method is Q-LoRA: NF4, unless it says how itself."""
    if tuning.method == "qlora" and spec.model.quant == "none" and quant_of(spec.model) == "none":
        return replace(spec.model, quant="nf4")
    return spec.model


def refuse(tuning: Tuning, quant: str) -> None:
    """Methods that a base cannot have."""
    if quant.startswith("gptq"):
        raise ConfigError(
            f"method={tuning.method}: the base is {quant}, whose kernels have no backward pass here; give the "
            "unquantized checkpoint, method=qlora makes it NF4"
        )
    if tuning.method == "full" and quant != "none":
        raise ConfigError(f"method=full: a base in {quant} cannot be trained; use model.quant=none")


def cost_of(spec: FinetuneSpec, tuning: Tuning, config: ModelConfig, dtype: str) -> TuningCost:
    return TuningCost(
        config=config,
        method=tuning.method,
        quant=quant_of(model_of(spec, tuning)),
        dtype=dtype,
        seq=tuning.seq,
        rank=spec.rank,
        accumulation=spec.accumulation,
        checkpointing=spec.checkpointing,
        gpus=spec.gpus,
        sharding=spec.sharding,
    )


def spec_from_json(fields: Mapping[str, Any]) -> FinetuneSpec:
    """The inverse of `dataclasses.asdict`."""
    model = fields["model"]
    return FinetuneSpec(**{**fields, "model": ModelSpec(**{**model, "rope": RopeSpec(**model["rope"])})})


# --- the grid --------------------------------------------------------------------------------------------------------


def run_grid(spec: FinetuneSpec, measure: MeasureStep | None = None) -> Path:
    """Measure what is missing; returns the run directory, whose result.json is whole after every cell."""
    for tuning in tunings(spec):
        refuse(tuning, quant_of(model_of(spec, tuning)))
    path = Path(spec.runs_dir) / "profile" / TASK / spec.model.name / spec.tag
    with RunDirectory.open(path) as run:
        run.check_spec(run_spec(spec), overwrite=spec.overwrite)
        stored = [] if spec.overwrite else rows((run.result() or {}).get("cells"))
        known: dict[str, Mapping[str, Any]] = {str(row["key"]): row for row in stored}
        for tuning in tunings(spec):
            if known.get(tuning.key, {}).get("status") in DONE:
                continue
            with stage(f"{spec.model.name}: measuring {tuning.key}"):
                row = (measure or _measured)(spec, tuning)
            if row.get("error") in (ModelError.__name__, ConfigError.__name__):
                raise (ModelError if row["error"] == ModelError.__name__ else ConfigError)(str(row["reason"]))
            known[tuning.key] = {**cell_fields(spec, tuning), **row}
            run.finish(_result(spec, known))
    return path


def _measured(spec: FinetuneSpec, tuning: Tuning) -> dict[str, JSON]:
    return in_child(spec, tuning, CHILD)


def cell_fields(spec: FinetuneSpec, tuning: Tuning) -> dict[str, JSON]:
    """A cell as all profiles have it, so that it is compared, gated and shown like others."""
    return {
        "name": tuning.name, "key": tuning.key, "mode": "finetune", "method": tuning.method, "seq": tuning.seq,
        "batch": 1, "prompt_tokens": tuning.seq, "new_tokens": 0, "kv_cache": "auto", "attention": "auto",
        "accumulation": spec.accumulation,
    }  # fmt: skip


def run_spec(spec: FinetuneSpec) -> dict[str, JSON]:
    fields = dataclasses.asdict(spec)
    how = {key: value for key, value in fields.items() if key not in (*GRID, *PLACES)}
    decides = {**how, "packages": deciding_versions()}
    config = {**fields, "task": {"name": TASK}, "method": TASK}
    return {"format": FORMAT, "kind": "profile", "config": config, "decides": decides, "provenance": provenance()}


def _result(spec: FinetuneSpec, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    wanted, found = tunings(spec), list(known.values())
    num_known = sum(tuning.key in known for tuning in wanted)
    ok = next((row for row in found if row.get("status") == "ok"), {})
    return {
        "kind": "profile",
        "method": TASK,
        "cells": found,
        "device": ok.get("device"),
        "engine": ok.get("engine", {}),
        "partial": {} if num_known == len(wanted) else {"cells": f"{num_known} of {len(wanted)}"},
        "provenance": provenance(),
    }


def config_of(spec: FinetuneSpec) -> ModelConfig:
    return shape_of(spec.model)
