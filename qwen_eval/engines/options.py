"""Which options each engine supports. An unsupported option is an error if it changes numbers, else a warning."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ConfigError
from qwen_eval.engines.kinds import MODEL_OPTIONS, EngineKind, kind, kinds
from qwen_eval.models.quant.formats import quant_format


def check_options(engine: EngineSpec, model: ModelSpec, *, keep_hidden: bool = False) -> list[str]:
    """Refuse (ConfigError) an option the engine would not carry out; return one warning a useless tuning key."""
    quant_format(model.quant)
    own, defaults = kind(engine.name), ModelSpec()
    for key in MODEL_OPTIONS:
        value = getattr(model, key)
        if key not in own.honours and value != getattr(defaults, key):
            raise _refused(own, f"model.{_leaf(key, value)}", [each for each in kinds() if key in each.honours])
    if keep_hidden and not own.keeps_hidden:
        raise _refused(own, "keep_hidden=true", [each for each in kinds() if each.keeps_hidden])
    return [
        f"engine.{field.name}={getattr(engine, field.name)} has no effect in engine={engine.name}"
        for field in fields(engine)
        if field.name not in ("name", *own.tuned_by)
        if getattr(engine, field.name) != field.default
    ]


def _refused(own: EngineKind, option: str, able: list[EngineKind]) -> ConfigError:
    names = " or ".join(each.name for each in able if each.model_at != "nowhere")
    return ConfigError(f"{option} has no effect in engine={own.name}; use engine={names}")


def _leaf(key: str, value: Any) -> str:
    return f"rope.dynamic_ntk={value.dynamic_ntk}" if key == "rope" else f"{key}={value}"
