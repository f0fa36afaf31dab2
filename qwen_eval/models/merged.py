"""The weights of a directory, those of a LoRA adapter merged into its base's while they are read.

W + scale * B @ A, computed in fp32; scale is lora_alpha / rank, or lora_alpha / sqrt(rank) with use_rslora.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwen_eval.core import ModelError
from qwen_eval.models.checkpoint import HOST, TensorFiles
from qwen_eval.models.config import shown
from qwen_eval.models.lora import base_of, is_adapter, read_lora_config
from qwen_eval.models.weight_files import Tensors, open_weights

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
FACTORS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}  # is embedding


def open_tensors(directory: Path) -> TensorFiles:
    """The weights of a checkpoint directory, an adapter's merged into its base's."""
    return MergedFiles(directory) if is_adapter(directory) else TensorFiles(directory)


class MergedFiles(TensorFiles):
    """The base's tensors with the adapter's changes; they read as a merged checkpoint would."""

    def __init__(self, directory: Path) -> None:
        super().__init__(base_of(directory))
        self.config = read_lora_config(directory)
        self.file = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
        if self.file is None:
            raise ModelError(f"{directory}: an adapter without {' or '.join(WEIGHTS)}; copy its weights there")
        self.adapter: Tensors = open_weights(self.file)
        self.stored = {_plain_name(name): name for name in self.adapter.keys()}  # noqa: SIM118
        self.changed = {_weight_of(name): name for name in self.stored}
        strange = [name for weight, name in self.changed.items() if weight not in self.files and name != weight]
        if strange:
            raise ModelError(f"{self.file}: {shown(strange[0])} changes a weight that the base has not, or has packed")
        self.files |= {name: self.file for name in self.stored if name == _weight_of(name)}

    def read(self, name: str, shape: Sequence[int] | None = None, device: torch.device = HOST) -> Tensor:
        if name not in self.changed:
            return super().read(name, shape, device)
        if name in self.stored:  # trained whole (modules_to_save)
            self._used.add(name)
            return self._checked(self.adapter.get_tensor(self.stored[name]), name, shape, device)
        weight = super().read(name, shape)
        delta = self._delta(name.removesuffix(".weight"))
        if delta.shape != weight.shape:
            raise ModelError(f"{self.file}: changes {name} by {list(delta.shape)}, the base has {list(weight.shape)}")
        return (weight.float() + delta).to(device)

    def _delta(self, module: str) -> Tensor:
        """[out, in] fp32."""
        is_embedding = f"{module}.lora_embedding_A" in self.stored
        a, b = (self._factor(f"{module}.{name}") for name in FACTORS[is_embedding])
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ModelError(f"{self.file}: {module} has factors {list(b.shape)} x {list(a.shape)}, which do not fit")
        delta = (b @ a) * self.config.scale(module, a.shape[0])
        return delta.T if is_embedding else delta

    def _factor(self, name: str) -> Tensor:
        if name not in self.stored:
            raise ModelError(f"{self.file}: {name} is missing")
        return self._checked(self.adapter.get_tensor(self.stored[name]), name).float()


def _plain_name(stored: str) -> str:
    name = stored.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    return name.replace(".default.", ".")


def _weight_of(name: str) -> str:
    """The weight that a tensor of the adapter changes or replaces."""
    for suffix in (*FACTORS[False], *FACTORS[True]):
        if name.endswith(f".{suffix}"):
            return f"{name.removesuffix(suffix)}weight"
    return name
