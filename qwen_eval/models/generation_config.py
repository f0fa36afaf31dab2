"""A checkpoint's generation_config.json: the tokens that end a reply, and its sampling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_eval.core import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def end_ids_of(folder: Path) -> frozenset[int]:
    """The end tokens of generation_config.json, or of config.json if it has none, as in transformers."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ModelError(f"{folder / name}: eos_token_id={str(found)[:80]} is no list of token ids")
        return frozenset(ids)
    return frozenset()


def sampling_of(generation: Mapping[str, Any]) -> dict[str, float] | None:
    """The sampling of a generation_config.json; None if it is empty."""
    if not generation:
        return None
    found: dict[str, float] = {
        "temperature": generation.get("temperature", 1.0) if generation.get("do_sample") else 0.0
    }
    for key, neutral in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)):
        value = generation.get(key)
        found[key] = neutral if value is None or (key == "top_k" and value == -1) else value  # -1: vLLM's word for all
    for key, value in found.items():
        if type(value) not in (int, float) or not 0 <= value < 1e9:
            raise ModelError(f"generation_config.json: {key}={str(value)[:80]} is no number; get the file again")
    return found
