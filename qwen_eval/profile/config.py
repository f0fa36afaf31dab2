"""Schema of `python -m qwen_eval.profile`. Keys that are lists take a bare comma list: `seq=2048,8192`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_eval.config import ATTENTIONS, KV_CACHES, ModelSpec, check_values, not_one_of
from qwen_eval.core import ConfigError

MODES = ("generate", "encode", "serve")
METHODS = ("measured", "readme")


@dataclass(kw_only=True)
class ProfileSpec:
    """What is measured: every combination of mode, seq, batch, kv_cache and attention is a cell in its own process."""

    model: ModelSpec = field(default_factory=ModelSpec)
    mode: list[str] = field(default_factory=lambda: ["generate"])  # generate: from 1 token | encode | serve
    seq: list[int] = field(default_factory=lambda: [2048])  # generate: new tokens; encode and serve: prompt tokens
    new_tokens: int | None = None  # of mode=serve; null: 128
    batch: list[int] = field(default_factory=lambda: [1])
    kv_cache: list[str] = field(default_factory=list)  # empty: model.kv_cache
    attention: list[str] = field(default_factory=list)  # empty: model.attention
    method: str = "measured"  # or readme: the published protocol (profile=readme sets it)
    repetitions: int = 3
    warmup_tokens: int = 8  # decode steps of the unmeasured run before the measured ones
    prefill_chunk: int | None = None  # tokens of one chunk of a long prompt; null: 1024, or what fits on a GPU
    max_batch_tokens: int = 4096  # tokens of one packed prefill of a batch
    num_threads: int | None = None
    memory_gib: float | None = None  # what a cell may take, and what the plan must fit; null: what the device has
    timeout_s: float = 3600.0  # of one cell, loading included
    plan: bool = False  # say what it takes; load and measure nothing
    on: str | None = None  # plan=true: for this device instead of the one here, e.g. A100-SXM4-80GB
    published: bool = True  # published rows of the same model beside ours
    seed: int = 1024
    runs_dir: str = "runs"
    tag: str = "default"
    overwrite: bool = False
    quiet: bool = False


def check(spec: ProfileSpec) -> ProfileSpec:
    """The spec with its lists filled; ConfigError for a value out of range or without effect."""
    check_values(spec)
    spec.kv_cache = spec.kv_cache or [spec.model.kv_cache]
    spec.attention = spec.attention or [spec.model.attention]
    for key, words in (("mode", MODES), ("kv_cache", KV_CACHES), ("attention", ATTENTIONS)):
        for value in getattr(spec, key):
            if value not in words:
                raise not_one_of(key, value, words)
    if spec.on is not None and not spec.plan:
        raise ConfigError(f"on={spec.on}: has an effect with plan=true only; what is measured is measured here")
    if spec.method not in METHODS:
        raise not_one_of("method", spec.method, METHODS)
    for key in ("seq", "batch"):
        if not getattr(spec, key) or min(getattr(spec, key)) < 1:
            raise ConfigError(f"{key}={getattr(spec, key)}: one or more sizes of at least 1, such as {key}=1,8")
    for key in ("mode", "seq", "batch", "kv_cache", "attention"):
        setattr(spec, key, list(dict.fromkeys(getattr(spec, key))))
    _check_numbers(spec)
    if not spec.tag or "/" in spec.tag or spec.tag.startswith("."):
        raise ConfigError(f"tag={spec.tag}: must be a plain file name, it names a part of the run directory")
    return spec


def _check_numbers(spec: ProfileSpec) -> None:
    lowest = {"repetitions": 1, "warmup_tokens": 0, "prefill_chunk": 1, "max_batch_tokens": 1}
    lowest |= {"new_tokens": 1, "num_threads": 1}
    for key, low in lowest.items():
        value = getattr(spec, key)
        if value is not None and value < low:
            raise ConfigError(f"{key}={value}: must be at least {low}")
    if spec.memory_gib is not None and spec.memory_gib <= 0:
        raise ConfigError(f"memory_gib={spec.memory_gib}: must be positive")
    if spec.timeout_s <= 0:
        raise ConfigError(f"timeout_s={spec.timeout_s}: must be positive")
    if spec.new_tokens is not None and "serve" not in spec.mode:
        raise ConfigError(
            f"new_tokens={spec.new_tokens}: has no effect in mode={','.join(spec.mode)}; "
            "seq says it in mode=generate, and encode makes one token; use mode=serve"
        )
