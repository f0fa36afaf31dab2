"""The cell of a grid (-m) that is being run: which keys are swept, and what it is called."""

from __future__ import annotations

import re
import sys

from qwen_eval.config import EvalSpec

DEFAULT_TAG = EvalSpec.tag


def cell_tag(tag: str) -> str:
    """In a grid: the tag with every swept key but task and model, so that each cell has its own run directory.

    `"dtype=bf16"`, or with a tag of the user `"mine+dtype=bf16"`: no comma, so that it can stand in `compare=`.
    """
    swept = [item.partition("=")[::2] for item in _swept() if item.partition("=")[0] not in ("task", "model")]
    ends = [key.rpartition(".")[2] for key, _ in swept]
    names = [end if ends.count(end) == 1 else key for (key, _), end in zip(swept, ends)]
    parts = [re.sub(r"[^\w.=-]+", "_", f"{name}={value}") for name, (_, value) in zip(names, swept)]
    return "+".join(parts if tag == DEFAULT_TAG and parts else [tag, *parts])


def cell_name() -> str:
    """`"task=mmlu model=qwen-7b: "` in a grid: which cell an error is of; "" outside one."""
    swept = _swept()
    return f"{' '.join(swept)}: " if swept else ""


def _swept() -> list[str]:
    """`["task=mmlu", "model.dtype=bf16"]`: what this cell of a grid has for the keys that are swept."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    given = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(given)
    keys = {item.get_key_element() for item in parsed if item.is_sweep_override()}
    cell = [item.partition("=") for item in HydraConfig.get().overrides.task]
    return [f"{key}={_unquoted(value)}" for key, _, value in cell if key in keys]


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value
