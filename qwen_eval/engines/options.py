"""Which options each engine supports. An unsupported option is an error if it changes numbers, else a warning."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ConfigError

# The native engine honours every key of a model; the others these, beside names and places.
MODEL_KEYS = ("dtype", "quant", "kv_cache", "rope", "logn", "window", "attention", "weights")
CHANGES_NUMBERS = (*MODEL_KEYS, "system", "thinking")
HONOURED = {
    "native": CHANGES_NUMBERS,
    "hf": ("dtype", "quant", "attention", "weights", "system", "thinking"),
    "vllm": ("dtype", "quant", "system", "thinking"),
    "openai": ("system", "thinking"),  # the server decided the others when it was started
    "fake": CHANGES_NUMBERS,  # has no model: nothing to dishonour
}
TUNED_BY = {
    "prefix_sharing": ("native", "vllm"),
    "max_batch_tokens": ("native", "vllm"),
    "max_batch_size": ("native", "hf", "vllm"),
    "prefill_chunk": ("native",),
    "kernels": ("native",),
    "memory_fraction": ("native", "vllm"),
    "num_threads": ("native", "hf"),
    "base_url": ("openai",),
    "api_model": ("openai",),
    "concurrency": ("openai",),
    "server": ("openai",),
    "timeout_s": ("openai",),
    "retries": ("openai",),
    "retry_share": ("openai",),
    "tokenizer": ("openai",),
    "prices": ("openai",),
    "tensor_parallel": ("vllm",),
    "pipeline_parallel": ("vllm",),
    "executor": ("vllm",),
    "fake_reply": ("fake",),
    "fake_delay_s": ("fake",),
}


def check_options(engine: EngineSpec, model: ModelSpec) -> list[str]:
    """Refuse (ConfigError) a model option the engine would not carry out; return one warning a useless tuning key."""
    defaults = ModelSpec()
    for key in CHANGES_NUMBERS:
        value = getattr(model, key)
        if key not in HONOURED[engine.name] and value != getattr(defaults, key):
            able = [name for name, keys in HONOURED.items() if key in keys and name != "fake"]
            raise ConfigError(
                f"model.{_leaf(key, value)} has no effect in engine={engine.name}; use engine={' or '.join(able)}"
            )
    return [
        f"engine.{field.name}={getattr(engine, field.name)} has no effect in engine={engine.name}"
        for field in fields(engine)
        if field.name in TUNED_BY and engine.name not in TUNED_BY[field.name]
        if getattr(engine, field.name) != field.default
    ]


def _leaf(key: str, value: Any) -> str:
    return f"rope.dynamic_ntk={value.dynamic_ntk}" if key == "rope" else f"{key}={value}"
