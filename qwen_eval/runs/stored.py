"""The configuration in the spec.json of a stored run, as dataclasses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from qwen_eval.config import EngineSpec, EvalSpec, TaskSpec
from qwen_eval.core import JSON, ConfigError, StoreError
from qwen_eval.engines.kinds import kind
from qwen_eval.tasks.registry import TASKS, task_class


def stored_config(spec: Mapping[str, JSON]) -> EvalSpec:
    """StoreError in one line for a configuration of another version, or one that asks to be filled in here."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = spec.get("config")
    task = config.get("task") if isinstance(config, Mapping) else None
    name = task.get("name") if isinstance(task, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(name, str) or name not in TASKS:
        raise StoreError(f"spec.json: no configuration of a known task (task.name={str(name)[:40]})")
    if any("${" in text for text in _texts(config)):
        # what stands between these braces would be looked up in this machine's environment
        raise StoreError("spec.json: holds ${…}, which no run of ours writes; refused")
    try:
        engine: Any = kind(_engine_name(config)).spec
        found: Any = OmegaConf.to_object(OmegaConf.merge(_schema(task_class(name).Spec, engine), config))
    except (OmegaConfBaseException, ConfigError, TypeError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise StoreError(f"the run's configuration is of another version: {reason}") from error
    assert isinstance(found, EvalSpec), type(found)
    assert isinstance(found.task, TaskSpec), type(found.task)
    return found


@cache  # a report reads hundreds of runs; merging leaves it as it is
def _schema(task: type, engine: type) -> Any:
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(EvalSpec)
    schema.task = OmegaConf.structured(task)
    schema.engine = OmegaConf.structured(engine)
    return schema


def _engine_name(config: Mapping[str, JSON]) -> str:
    engine = config.get("engine")
    name = engine.get("name") if isinstance(engine, Mapping) else None
    return str(name or EngineSpec().name)


def _texts(value: JSON) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
