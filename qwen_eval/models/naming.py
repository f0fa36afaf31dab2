"""The name and chat form of a checkpoint given by its path or hub id. No torch: part of parsing a command.

A directory given without `model=` is not the default model: its name comes from the directory, chat or base from its
files. Under the name of a published model it must have that model's shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_eval.config import ModelSpec
from qwen_eval.core import JSON, ModelError
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.hub import texts_dir

# The shape of a model. Fine-tunes may resize the vocabulary, tie the embeddings or extend the context.
SHAPE = ("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "mlp_size")
OF_A_NAMED_MODEL = ("asset", "arch", "chat", "quant")  # what `conf/model/NAME.yaml` says of one model alone
MAX_JSON_BYTES = 32 << 20
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def settle(model: ModelSpec, given: frozenset[str]) -> ModelSpec:
    """The spec, completed from the checkpoint's files. `given` are the user's keys: "model", "model.name" ...

    `model.path=Qwen/Qwen3-0.6B` where no such directory is becomes the hub's model. ModelError for a directory of
    another shape than the named model's.
    """
    if model.path is not None and is_hub_id(model.path):
        hub_model = replace(model, hub_id=model.path, modelscope_id=model.path, path=None, asset=None)
        try:
            return settle(hub_model, given | {"model.hub_id"})
        except ModelError as error:
            raise ModelError(f"model.path={model.path}: no such directory is here; as a hub id, {error}") from error
    has_place = model.path is not None or "model.hub_id" in given or ("model" not in given and model.hub_id is not None)
    if not has_place:
        return model
    is_fetched = model.path is not None or model.weights != "random"  # random weights need no file of a hub
    if "model" not in given:
        model = anonymous(model, model.path or str(model.hub_id), given)
        is_said = "model.chat" in given or not is_fetched
        return model if is_said else replace(model, chat=is_chat(texts_dir(model)))
    if model.weights == "random":
        return model
    if "model.name" in given:
        return replace(model, arch={})  # the user knows that it is another one
    check_shape(model, texts_dir(model))
    return model


def is_hub_id(path: str) -> bool:
    """Whether a path is OWNER/NAME and neither it nor a folder OWNER is here."""
    owner = Path(path).parent
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists() and not owner.exists()


def check_shape(model: ModelSpec, directory: Path) -> None:
    """ModelError for a checkpoint of another shape than `model.arch` says, which is that of the named model."""
    found = shape_difference(model.arch, checkpoint_fields(directory)) if model.arch else None
    if found is not None:
        raise ModelError(
            f"{directory}: is no {model.name}: {found}; pass model.name=NAME, or leave model={model.name} out"
        )


def anonymous(model: ModelSpec, place: str, given: frozenset[str]) -> ModelSpec:
    """A model given by its path or hub id alone: named after it, with no setting of the default model."""
    defaults = ModelSpec()
    cleared = {key: getattr(defaults, key) for key in OF_A_NAMED_MODEL if f"model.{key}" not in given}
    name = model.name if "model.name" in given else checkpoint_name(place)
    return replace(model, **cleared, name=name)


def checkpoint_name(place: str) -> str:
    """`"models/my-tune/"` -> `"my-tune"`, `"Qwen/Qwen2.5-7B"` -> `"Qwen2.5-7B"`; snapshots by their repository."""
    path = Path(place).expanduser().absolute()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rpartition("--")[2]
    name = path.resolve().name if path.name in ("", "..") else path.name
    return re.sub(r"[^\w.+=-]+", "-", name).lstrip(".") or "model"


def checkpoint_fields(directory: Path) -> dict[str, Any]:
    """config.json; ModelError in one line where it cannot be read."""
    found = _json(directory / "config.json")
    if found is None:
        raise ModelError(f"{directory / 'config.json'}: not readable as a JSON object")
    return found


def shape_difference(arch: Mapping[str, JSON], found: Mapping[str, JSON]) -> str | None:
    """`"num_layers is 2, not 80"`; None for the same shape, or where a shape is not one of ours to read."""
    try:
        wanted, real = ModelConfig.from_hf(arch), ModelConfig.from_hf(found)
    except (ModelError, ValueError, TypeError, AttributeError):
        one, other = arch.get("model_type"), found.get("model_type")
        return None if one == other else f"model_type is {str(other)[:40]}, not {one}"
    name = next((name for name in SHAPE if getattr(wanted, name) != getattr(real, name)), None)
    return None if name is None else f"{name} is {getattr(real, name)}, not {getattr(wanted, name)}"


def is_chat(directory: Path) -> bool:
    """Whether a checkpoint is a chat model. Base models have the same templates, but other end tokens.

    Qwen v1 says it in its generation config; in later ones the end token of texts is the one that ends a turn.
    """
    generation = _json(directory / "generation_config.json") or {}
    if "chat_format" in generation:
        return bool(generation["chat_format"] == "chatml")
    tokenizer = _json(directory / "tokenizer_config.json") or {}
    template = _template(directory, tokenizer)
    ends = _end_tokens(directory, generation, tokenizer)
    return any(end in template for end in ends) or (bool(template) and "eos_token" in template)


def _template(directory: Path, tokenizer: Mapping[str, JSON]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file() and file.stat().st_size <= MAX_JSON_BYTES:
        return file.read_text(encoding="utf-8", errors="replace")
    found = tokenizer.get("chat_template")
    if isinstance(found, list):  # named templates
        return "\n".join(str(item.get("template")) for item in found if isinstance(item, dict))
    return found if isinstance(found, str) else ""


def _end_tokens(directory: Path, generation: Mapping[str, JSON], tokenizer: Mapping[str, JSON]) -> set[str]:
    """The texts of the tokens that end a completion."""
    config = _json(directory / "config.json") or {}
    ids: set[int] = set()
    for found in (generation.get("eos_token_id"), config.get("eos_token_id")):
        ids |= set(found) if isinstance(found, list) else {found} if isinstance(found, int) else set()
    added = tokenizer.get("added_tokens_decoder")
    rows = [added.get(str(number)) for number in ids] if isinstance(added, dict) else []
    named = [row.get("content") if isinstance(row, dict) else row for row in (*rows, tokenizer.get("eos_token"))]
    return {text for text in named if isinstance(text, str) and text}


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None for anything else."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            return None
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
