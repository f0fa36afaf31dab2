"""Schema of `python -m qwen_eval.quantize`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_eval.config import ModelSpec, check_values
from qwen_eval.core import ConfigError


@dataclass(kw_only=True)
class QuantizeSpec:
    """The published recipe is the default: group 128, symmetric, damp 0.01, no act-order, true sequential."""

    model: ModelSpec = field(default_factory=ModelSpec)
    bits: int = 4
    group_size: int = 128  # -1: one group for all inputs
    sym: bool = True
    desc_act: bool = False
    damp: float = 0.01
    calibration: str | None = None  # .txt, or .jsonl of {"text"} or {"messages"}; null: the bundled text
    num_sequences: int = 128
    sequence_tokens: int = 512
    out: str | None = None  # directory to be made; null: checkpoints/<model>-gptq-int<bits>
    overwrite: bool = False
    quiet: bool = False


def check(spec: QuantizeSpec) -> None:
    """ConfigError for a value out of range."""
    check_values(spec)
    if spec.bits not in (4, 8):
        raise ConfigError(f"bits={spec.bits}: must be 4 or 8")
    if spec.group_size != -1 and spec.group_size < 1:
        raise ConfigError(f"group_size={spec.group_size}: must be -1 (one group) or positive, e.g. 128")
    if not 0 < spec.damp < 1:
        raise ConfigError(f"damp={spec.damp}: must be in (0, 1), e.g. 0.01")
    for key in ("num_sequences", "sequence_tokens"):
        if getattr(spec, key) < 1:
            raise ConfigError(f"{key}={getattr(spec, key)}: must be at least 1")
    if spec.model.weights == "random":
        raise ConfigError("model.weights=random: there is nothing to quantize; give model.path= or a trained model")
