"""LoRA adapters (https://arxiv.org/abs/2106.09685) as PEFT stores them: their settings, and where their base is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_eval.core import ModelError
from qwen_eval.models.config import read_fields, shown
from qwen_eval.models.hub import ORDER

CONFIG = "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "qwen.tiktoken")
HONOURED = "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern base_model_name_or_path revision"
# What training did, or which modules it chose: the stored tensors say that themselves.
HARMLESS = """
    auto_mapping task_type inference_mode peft_version target_modules exclude_modules modules_to_save lora_dropout
    layers_to_transform layers_pattern megatron_config megatron_core runtime_config eva_config qalora_group_size
    ensure_weight_tying loftq_config corda_config
"""
# Anything else than these is another method, or changes the base itself.
FIXED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """`alphas`: lora_alpha of the modules whose name ends so; `alpha` that of all others."""

    base: str
    revision: str | None
    alpha: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    is_rank_stabilised: bool = False

    def scale(self, module: str, rank: int) -> float:
        named = (alpha for name, alpha in self.alphas.items() if f".{module}".endswith(f".{name}"))
        return next(named, self.alpha) / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def is_adapter(directory: Path) -> bool:
    """Whether this is the directory of an adapter; ModelError if it also has complete weights, which is ambiguous."""
    if not (directory / CONFIG).is_file():
        return False
    whole = next((name for name in ORDER if (directory / name).is_file()), None)
    if whole is not None:
        raise ModelError(f"{directory}: holds both {CONFIG} and {whole}; move one of them to another directory")
    return True


def refuse_adapter(directory: Path, engine: str) -> None:
    """For engines that would read the directory as a whole model."""
    if is_adapter(directory):
        base = read_lora_config(directory).base
        raise ModelError(
            f"{directory}: a LoRA adapter of {shown(base)[1:-1]}; engine={engine} reads whole models: "
            "use engine=native, which merges it, or merge it first"
        )


def read_lora_config(directory: Path) -> LoraConfig:
    """ModelError for another method than plain LoRA, and for settings that this merge would not carry out."""
    path = directory / CONFIG
    fields = {name: value for name, value in read_fields(path).items() if value is not None}
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path}: base_model_name_or_path={shown(base)} names no base model")
    of_base = f"an adapter of {shown(base)[1:-1]}"
    if fields.get("peft_type") != "LORA":
        raise ModelError(f"{path}: {of_base} by peft_type={shown(fields.get('peft_type'))}; only LORA is merged")
    for name, value in fields.items():
        if name in FIXED and value not in FIXED[name]:
            raise ModelError(f"{path}: {of_base} with {name}={shown(value)}, which is not merged here; merge it first")
        if value and name not in FIXED and name not in (HONOURED + HARMLESS).split():
            raise ModelError(f"{path}: {of_base}; unknown field {shown(name)[1:-1]}={shown(value)}; merge it first")
    return LoraConfig(
        base=base,
        revision=fields.get("revision"),
        alpha=_alpha(path, "lora_alpha", fields.get("lora_alpha", 8)),
        alphas={key: _alpha(path, key, value) for key, value in _patterns(path, fields.get("alpha_pattern", {}))},
        is_rank_stabilised=bool(fields.get("use_rslora")),
    )


def _alpha(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise ModelError(f"{path}: {shown(name)[1:-1]}={shown(value)} must be a positive number")
    return float(value)


def _patterns(path: Path, patterns: object) -> list[tuple[str, object]]:
    """Names of modules as they end; PEFT would take regular expressions too."""
    if not isinstance(patterns, Mapping) or not all(re.fullmatch(r"[\w.]+", key) for key in patterns):
        raise ModelError(f"{path}: alpha_pattern={shown(patterns)} is not alphas by plain module names; merge it first")
    return list(patterns.items())


def base_of(directory: Path) -> Path:
    """The directory with config.json and the base's weights: this one, or the base's of an adapter if it is at hand."""
    if not is_adapter(directory):
        return directory
    config = read_lora_config(directory)
    for path in (directory / config.base, Path(config.base).expanduser()):
        if (path / "config.json").is_file():
            return path
    cached = _cached_base(config)
    if cached is not None:
        return cached
    raise ModelError(
        f"{directory}: a LoRA adapter of {shown(config.base)[1:-1]}, which is not on this machine; write its directory "
        f"as base_model_name_or_path into {CONFIG}, or merge the adapter (merge_and_unload of peft) and pass the result"
    )


def _cached_base(config: LoraConfig) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(config.base, revision=config.revision, local_files_only=True))
    except Exception:  # no such id, no cache, a name that is no id: there is no usable copy
        return None
    return path if (path / "config.json").is_file() else None


def tokenizer_dir(directory: Path) -> Path:
    """An adapter's own tokenizer where it has one (with the chat template it was trained with), else the base's."""
    if is_adapter(directory) and not any((directory / name).is_file() for name in TOKENIZERS):
        return base_of(directory)
    return directory
