"""Engines: who answers requests. Each is imported only when asked for."""

from __future__ import annotations

import importlib

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ConfigError, Engine

ENGINES = {
    "native": "qwen_eval.engines.native.engine:open_engine",
    "hf": "qwen_eval.engines.hf:open_engine",
    "openai": "qwen_eval.engines.openai:open_engine",
    "vllm": "qwen_eval.engines.vllm:open_engine",
    "fake": "qwen_eval.engines.fake:open_engine",
}


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> Engine:
    """Load what the engine needs and return it; EngineError or ModelError in one line where that cannot be."""
    if spec.name not in ENGINES:
        raise ConfigError(f"engine.name={spec.name}: not an engine; one of {', '.join(sorted(ENGINES))}")
    module, _, function = ENGINES[spec.name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), function)(spec, model, protocol=protocol)
    return engine
