"""The engines by name. Each declares in its module which options it takes, what decides its answers and how it opens.

A declaration imports neither torch nor a model library: `opens` names the function that does, called when an engine is
needed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from typing import Any, Literal

from qwen_eval.config import EngineSpec, ModelSpec, announced, not_one_of
from qwen_eval.core import Engine
from qwen_eval.models.fingerprint import model_fingerprint

# Name -> module with a variable ENGINE. An engine that is neither here nor announced does not exist.
ENGINES = announced("qwen_eval.engines") | {
    "native": "qwen_eval.engines.native",
    "hf": "qwen_eval.engines.hf",
    "openai": "qwen_eval.engines.openai",
    "vllm": "qwen_eval.engines.vllm",
    "fake": "qwen_eval.engines.fake",
}
WORKERS = "qwen_eval.engines.workers.engine:open_engine"  # several of one kind, of those that declare `workers`
# Keys of a model that say which it is and where, not how it is run: they concern every engine.
NAMES_AND_PLACES = (
    "name", "hub_id", "modelscope_id", "hub", "revision", "path", "asset", "chat", "device", "seed", "digest", "arch",
)  # fmt: skip
MODEL_OPTIONS = tuple(item.name for item in fields(ModelSpec) if item.name not in NAMES_AND_PLACES)


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """What an engine's module declares. An option that is not listed is refused, or said to have no effect.

    `identity` is what the engine puts into `Engine.info["weights"]`, found without loading a model: a stored run is
    recalled or resumed only where it is equal.
    """

    name: str
    opens: str  # "module:function", called with (EngineSpec, ModelSpec, protocol=)
    honours: tuple[str, ...]  # keys of `model`, of MODEL_OPTIONS
    tuned_by: tuple[str, ...] = ()  # keys of `engine`
    decides: tuple[str, ...] = ()  # those of them that change answers, not only speed
    model_at: Literal["checkpoint", "server", "nowhere"] = "checkpoint"
    keeps_hidden: bool = False  # whether it fulfils `Score.keep_hidden`
    identity: str = ""  # "module:function", called with (EngineSpec, ModelSpec); "": the checkpoint's fingerprint
    spec: type[EngineSpec] = EngineSpec  # its schema, with keys of its own


def kind(name: str) -> EngineKind:
    """The declaration of an engine; ConfigError for an unknown name."""
    if name not in ENGINES:
        raise not_one_of("engine.name", name, ENGINES)
    found: EngineKind = importlib.import_module(ENGINES[name]).ENGINE
    assert found.name == name, f"{ENGINES[name]} declares {found.name}, not {name}"
    return found


def kinds() -> list[EngineKind]:
    return [kind(name) for name in ENGINES]


def deciding_keys() -> tuple[str, ...]:
    """Keys of `engine` that change answers; batching, sharing and threads change speed alone."""
    return tuple(dict.fromkeys(["name", *(key for each in kinds() for key in each.decides)]))


def identity(engine: EngineSpec, model: ModelSpec) -> str:
    """What would answer now: a checkpoint's fingerprint, or an endpoint with what it says of its model.

    Found without loading a model; ModelError or EngineError where there is no checkpoint or no server.
    """
    function = kind(engine.name).identity
    return str(_named(function)(engine, model)) if function else model_fingerprint(model)


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> Engine:
    """Load what the engine needs and return it; EngineError or ModelError in one line where that cannot be."""
    own = kind(spec.name)
    is_spread = "workers" in own.tuned_by and (spec.workers > 1 or spec.ray != EngineSpec.ray)
    engine: Engine = _named(WORKERS if is_spread else own.opens)(spec, model, protocol=protocol)
    return engine


def _named(place: str) -> Any:
    """`"module:function"`, imported."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)
