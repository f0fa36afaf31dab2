"""One cell of a grid: which model, how many sequences, how long; and the cost model of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_eval.config import ModelSpec, RopeSpec
from qwen_eval.core import JSON, ConfigError
from qwen_eval.models.config import ModelConfig, read_fields
from qwen_eval.models.cost import PREFILL_CHUNK, Cost
from qwen_eval.models.hub import asset_dir, local_dir
from qwen_eval.models.lora import base_of
from qwen_eval.models.quant.formats import detected
from qwen_eval.profile.config import ProfileSpec

SERVE_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """`batch` sequences of `prompt_tokens`, each continued by `new_tokens` (the first of them by the prefill)."""

    mode: str
    seq: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    kv_cache: str
    attention: str

    @property
    def name(self) -> str:
        """What is measured, without the sizes: the same for the same cell of two models."""
        extra = [f"kv={self.kv_cache}"] if self.kv_cache != "auto" else []
        extra += [f"attention={self.attention}"] if self.attention != "auto" else []
        return " ".join([self.mode, *extra])

    @property
    def key(self) -> str:
        """Names the cell within its run."""
        return f"{self.name} {self.batch}x{self.prompt_tokens}+{self.new_tokens}"

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.new_tokens


def cells(spec: ProfileSpec) -> list[GridCell]:
    """The grid of a checked spec: sizes innermost, so that the table fills row by row."""
    return [
        _cell(spec, mode, seq, batch, kv_cache, attention)
        for mode in spec.mode
        for attention in spec.attention
        for kv_cache in spec.kv_cache
        for batch in spec.batch
        for seq in spec.seq
    ]


def _cell(spec: ProfileSpec, mode: str, seq: int, batch: int, kv_cache: str, attention: str) -> GridCell:
    shapes = {"generate": (1, seq), "encode": (seq, 1), "serve": (seq, spec.new_tokens or SERVE_NEW_TOKENS)}
    prompt, new = shapes[mode]
    return GridCell(
        mode=mode,
        seq=seq,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        kv_cache=kv_cache,
        attention=attention,
    )


def spec_from_json(fields: Mapping[str, Any]) -> ProfileSpec:
    """The inverse of `dataclasses.asdict`."""
    model = fields["model"]
    return ProfileSpec(**{**fields, "model": ModelSpec(**{**model, "rope": RopeSpec(**model["rope"])})})


def shape_fields(model: ModelSpec) -> dict[str, Any]:
    """config.json of the shape: the checkpoint's where it is on this machine, else `model.arch`. Nothing is fetched."""
    if model.path is None and (model.asset is None or model.weights == "random") and model.arch:
        return dict(model.arch)
    if model.path is None and model.asset is None:
        raise ConfigError(f"model={model.name}: no shape to plan with; give model.path= or model.arch")
    directory = local_dir(model.path) if model.path is not None else asset_dir(str(model.asset))
    fields = read_fields(base_of(directory) / "config.json")
    return {**fields, **model.arch} if model.weights == "random" else fields


def shape_of(model: ModelSpec) -> ModelConfig:
    return ModelConfig.from_hf(shape_fields(model))


def quant_of(model: ModelSpec) -> str:
    """`model.quant`, or what the files on this machine are packed in where it is not said."""
    packed = shape_fields(model).get("quantization_config")
    found = detected(packed) if model.quant == "none" and model.weights != "random" else None
    return found.name if found else model.quant


def cost_of(
    spec: ProfileSpec,
    cell: GridCell,
    config: ModelConfig,
    *,
    dtype: str,
    is_packed: bool,
    is_copied: bool = True,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Cost:
    """`prefill_chunk`: where `spec` leaves it open."""
    return Cost(
        config=config,
        quant=quant_of(spec.model),
        dtype=dtype,
        kv_cache=cell.kv_cache,
        is_packed=is_packed,
        is_copied=is_copied,
        prefill_chunk=spec.prefill_chunk or prefill_chunk,
        max_batch_tokens=spec.max_batch_tokens,
    )


def to_json(cell: GridCell) -> dict[str, JSON]:
    return {"name": cell.name, "key": cell.key, **dataclasses.asdict(cell)}
