"""A damaged or foreign checkpoint is refused in one line that names what is wrong; a sharded one is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_eval.core import ModelError
from qwen_eval.models.checkpoint import Placement, load
from qwen_eval.models.config import ModelConfig

SOURCE = Path(__file__).parent / "golden" / "model" / "D"
PLACEMENT = Placement(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small Qwen v1 checkpoint that a test may break."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SOURCE / name, tmp_path / name)
    return tmp_path


def open_it(folder: Path) -> Any:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return load(folder, config, PLACEMENT)[0]


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shard(folder: Path, kind: str) -> list[Path]:
    """Split the checkpoint into two files with an index, as large ones are published."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map, files = sorted(tensors), {}, []
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = folder / f"{stem}-{i:05}-of-00002{suffix}"
        content = {name: tensors[name] for name in part}
        save_file(content, file) if kind == "safetensors" else torch.save(content, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_give_the_same_weights_as_one_file(folder: Path, kind: str) -> None:
    whole = {name: tensor.clone() for name, tensor in open_it(folder).state_dict().items()}
    shard(folder, kind)
    parts = open_it(folder).state_dict()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_shard_is_named(folder: Path, kind: str) -> None:
    gone = shard(folder, kind)[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        open_it(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 7, 10_000])
def test_a_truncated_shard_is_named(folder: Path, kind: str, keep: int) -> None:
    cut = shard(folder, kind)[0]
    os.truncate(cut, keep)
    with pytest.raises(ModelError, match=cut.name):
        open_it(folder)


def test_a_pickle_that_runs_code_is_refused_and_not_run(folder: Path) -> None:
    trace = folder / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Hostile()}))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        open_it(folder)
    assert not trace.exists()


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors or \*\.bin"):
        open_it(folder)


NAME = "transformer.h.1.mlp.w2.weight"
BREAKAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(NAME), f"{NAME} is missing"),
    "wrong shape": (lambda t: t.update({NAME: t[NAME][:-1].clone()}), f"{NAME}: shape .* by config.json"),
    "NaN": (lambda t: t[NAME].view(-1)[5].fill_(float("nan")), f"{NAME}: holds NaN or infinity"),
    "infinity": (lambda t: t[NAME].view(-1)[5].fill_(float("inf")), f"{NAME}: holds NaN or infinity"),
    "no place": (lambda t: t.update({"transformer.h.9.ln_1.weight": torch.ones(80)}), "h.9.ln_1.weight has no place"),
    "a bias the config denies": (
        lambda t: t.update({"transformer.h.0.attn.c_proj.bias": torch.ones(80)}),
        "c_proj.bias: the checkpoint has this bias",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_damaged_tensor_is_named(folder: Path, breakage: str) -> None:
    edit, message = BREAKAGES[breakage]
    edit_tensors(folder, edit)
    with pytest.raises(ModelError, match=message):
        open_it(folder)


def test_zero_biases_of_converters_and_old_buffers_are_no_mistake(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda t: t.update(
            {"transformer.h.0.mlp.w1.bias": torch.zeros(104), "transformer.h.0.attn.masked_bias": torch.ones(1)}
        ),
    )
    open_it(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_multiplier": 2.0}, "unknown field attention_multiplier=2.0"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
        ({"model_type": "llama"}, "model_type='llama' is not a dense Qwen model"),
        ({"model_type": "qwen2_moe"}, "use engine=hf"),
        ({"hidden_size": -1}, "hidden_size=-1 must be a positive number"),
        ({"hidden_size": True}, "hidden_size=True must be a positive number"),
        ({"kv_channels": 20}, "kv_channels 20 x num_attention_heads 5 != hidden_size 80"),
    ],
)
def test_a_config_of_another_model_is_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(folder, **fields)
    with pytest.raises(ModelError, match=message):
        open_it(folder)


def test_a_missing_training_length_is_refused_since_ntk_and_logn_hang_on_it(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    del fields["seq_length"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="seq_length is missing"):
        open_it(folder)


def test_another_rope_scaling_than_yarn_is_refused() -> None:
    fields = {
        "model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
        "intermediate_size": 64, "vocab_size": 64, "rope_scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    with pytest.raises(ModelError, match="rope_scaling type 'linear'"):
        ModelConfig.from_hf(fields)


def test_the_old_field_names_of_august_2023_mean_the_same() -> None:
    new = json.loads((SOURCE / "config.json").read_text())
    renamed = {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size",
        "attn_dropout_prob": "attn_pdrop",
    }  # fmt: skip
    old = {renamed.get(name, name): value for name, value in new.items()}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
