"""The identity of the current model: the checkpoint's fingerprint, or the endpoint with its description of the model.

The engines put the same text into `Engine.info["weights"]`. A stored run is recalled or resumed only where it is equal.
"""

from __future__ import annotations

from qwen_eval.config import EngineSpec, ModelSpec


def identity(engine: EngineSpec, model: ModelSpec) -> str:
    """Found without loading a model; ModelError or EngineError where there is no checkpoint or no server."""
    if engine.name == "fake":
        return "fake"
    if engine.name == "openai":
        from qwen_eval.engines.openai import identity_of

        return identity_of(engine, model)
    from qwen_eval.models.fingerprint import model_fingerprint

    return model_fingerprint(model)
