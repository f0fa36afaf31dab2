"""The configuration of a model as it is run: config.json with what a `ModelSpec` says over it. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_eval.config import ModelSpec
from qwen_eval.core import ConfigError
from qwen_eval.models.config import ModelConfig, read_fields


def read_config(directory: Path, spec: ModelSpec) -> dict[str, Any]:
    """config.json of the checkpoint; for random weights `model.arch` on top, or alone without a checkpoint."""
    if spec.weights == "random" and spec.arch and spec.path is None and spec.asset is None:
        return dict(spec.arch)
    fields = read_fields(directory / "config.json")
    return {**fields, **spec.arch} if spec.weights == "random" else fields


def with_overrides(config: ModelConfig, spec: ModelSpec) -> ModelConfig:
    """The position rules of `spec` over those of the checkpoint."""
    return replace(
        config,
        dynamic_ntk=_switch("model.rope.dynamic_ntk", spec.rope.dynamic_ntk, config.dynamic_ntk),
        logn=_switch("model.logn", spec.logn, config.logn),
        windows=layer_windows(spec.window, config) or config.windows,
    )


def _switch(key: str, value: str, default: bool) -> bool:
    choices = {"auto": default, "true": True, "false": False}
    if str(value).lower() not in choices:
        raise ConfigError(f"{key}={value}: one of auto, true, false")
    return choices[str(value).lower()]


def layer_windows(window: str, config: ModelConfig) -> tuple[int | None, ...]:
    """Attention windows per layer: "none", "layerwise" or a comma list of sizes for equal groups of layers.

    Layer-wise: an eighth of the layers sees the training length, the next eighth twice that, and so on (four layers a
    group in the 7B, as its authors described; no code of theirs was published: this schedule is ours).
    """
    if window == "none":
        return ()
    layers = config.num_layers
    if window == "layerwise":
        group = max(1, layers // 8)
        return tuple(config.train_length * 2 ** (i // group) for i in range(layers))
    try:
        sizes = [int(part) for part in str(window).split(",")]
    except ValueError:
        raise ConfigError(f"model.window={window}: none, layerwise, or sizes in tokens such as '2048,4096'") from None
    if min(sizes) < 1 or len(sizes) > layers:
        raise ConfigError(f"model.window={window}: 1 to {layers} sizes, each at least 1 token")
    return tuple(sizes[i * len(sizes) // layers] for i in range(layers))
