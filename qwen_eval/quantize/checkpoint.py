"""Quantizing a whole checkpoint with GPTQ, one block in memory at a time, into the published file layout."""

# N packed tokens, E hidden size

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_eval.core import ModelError
from qwen_eval.models.attend import PackedAttend
from qwen_eval.models.attention import choose_kernel
from qwen_eval.models.block import checkpoint_names, gptq_steps
from qwen_eval.models.checkpoint import TensorFiles
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.kv_cache import PlainCodec
from qwen_eval.models.rope import Rope
from qwen_eval.models.transformer import Block, Residual, dense_linear
from qwen_eval.quantize import gptq as gptq_quantize
from qwen_eval.quantize.gptq import Hessian, Recipe

BATCH_TOKENS = 4096
SHARD_BYTES = 2 * 2**30
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class ModuleError:
    """Relative output error of one Linear on the calibration text: |x (Q - W)| / |x W|."""

    name: str
    error: float


Progress = Callable[[int, int, list[ModuleError]], None]  # (layer, number of layers, its errors)


class Writer:
    """Tensors into shards of a directory, named and indexed at the end as the hub wants them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pending: dict[str, Tensor] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Floating tensors are stored in fp16, as AutoGPTQ stores them."""
        kept = tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype, copy=True)
        if kept.is_floating_point() and not torch.isfinite(kept).all():
            raise ModelError(f"{name}: does not fit fp16, the dtype of GPTQ checkpoints")
        self._pending[name] = kept.contiguous()
        if sum(t.nbytes for t in self._pending.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            path = self.directory / f"shard-{len(self._shards)}.safetensors"
            save_file(self._pending, path, metadata={"format": "pt"})
            self._shards.append((path, list(self._pending)))
            self._total_bytes += sum(t.nbytes for t in self._pending.values())
            self._pending = {}

    def close(self) -> int:
        """Name the shards; returns the bytes written."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, (path, names) in enumerate(self._shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self.directory / "model.safetensors.index.json", index)
        return self._total_bytes


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class Calibration:
    """Hidden states of the calibration sequences before the current block, in batches of packed sequences."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    lengths: list[list[int]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def start(self, sequences: Sequence[Sequence[int]], embed_VE: Tensor) -> None:
        self.rope, self.kernel = Rope(self.config, self.device), choose_kernel("auto", self.device)
        for batch in batches(sequences):
            ids = torch.tensor([token for ids in batch for token in ids])
            self.lengths.append([len(ids) for ids in batch])
            self.hidden.append(embed_VE[ids].to(self.device, self.dtype))

    def run(self, block: nn.Module, layer: int) -> Iterator[Tensor]:
        """The block's outputs, batch by batch."""
        for lengths, hidden in zip(self.lengths, self.hidden):
            codec = PlainCodec(self.dtype)
            attend = PackedAttend(self.config, codec, lengths, kernel=self.kernel, device=self.device)
            totals = [length for length in lengths for _ in range(length)]
            rotations = self.rope.rotations(attend.positions_N, totals, attend.end)
            residual: Residual = block(Residual(hidden), layer, rotations[layer], attend, None)
            yield residual.whole_NE


def batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Sequences in order, as many at a time as fit BATCH_TOKENS when padded to the longest."""
    batch: list[Sequence[int]] = []
    for ids in sequences:
        if batch and (len(batch) + 1) * max(len(ids), *map(len, batch)) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


@torch.inference_mode()
def quantize_checkpoint(
    source: Path,
    out: Path,
    fields: Mapping[str, Any],
    sequences: Sequence[Sequence[int]],
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> tuple[int, list[ModuleError]]:
    """Write a GPTQ checkpoint of `source` into the empty directory `out`; (weight bytes, error of every Linear).

    `fields` is the source's config.json; the output's other files are copies. Blocks are quantized in order, each on
    the outputs of the quantized blocks before it.
    """
    config, files, writer = ModelConfig.from_hf(fields), TensorFiles(source), Writer(out)
    check_shape(config, recipe)
    calibration = Calibration(config, device, dtype)
    calibration.start(sequences, files.read(f"{checkpoint_names(config, 'embed')[0]}.weight"))
    errors: list[ModuleError] = []
    quantized: set[str] = set()
    for layer in range(config.num_layers):
        block = load_block(files, config, layer, dtype, device)
        found = [e for group in gptq_steps() for e in _quantize_group(block, layer, group, calibration, recipe, writer)]
        quantized.update(error.name for error in found)
        calibration.hidden = list(calibration.run(block, layer))
        errors += found
        progress(layer, config.num_layers, found)
    for name in files.files:
        if name.rpartition(".")[0] not in quantized:
            writer.add(name, files.read(name))
    _copy_files(source, out)
    _write_configs(out, fields, recipe)
    return writer.close(), errors


def check_shape(config: ModelConfig, recipe: Recipe) -> None:
    """ModelError where a Linear does not divide into groups, or its outputs into words."""
    widths = {config.hidden_size, config.num_heads * config.head_dim, config.mlp_size}
    if recipe.group_size != -1 and any(width % recipe.group_size for width in widths):
        divisor = math.gcd(*widths)
        raise ModelError(
            f"group_size={recipe.group_size} does not divide the widths {sorted(widths)} of this model; "
            f"a divisor of {divisor} does, or -1 (one group)"
        )
    per_word = recipe.config.per_word
    outputs = {config.num_kv_heads * config.head_dim, *widths}
    if any(width % per_word for width in outputs):
        raise ModelError(f"bits={recipe.bits} packs {per_word} outputs a word; the widths are {sorted(outputs)}")


def load_block(files: TensorFiles, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
    with torch.device("meta"):
        block = Block(config, f"layers.{layer}", dense_linear)
    for name, module in block.named_modules():
        if list(module.children()):
            continue
        sources = checkpoint_names(config, f"layers.{layer}.{name}")
        for part in ("weight", "bias"):
            if getattr(module, part, None) is not None:
                tensor = torch.cat([files.read(f"{source}.{part}") for source in sources])
                if tensor.shape != getattr(module, part).shape:
                    expected = list(getattr(module, part).shape)
                    raise ModelError(f"{sources[0]}.{part}: shape {list(tensor.shape)}, expected {expected}")
                setattr(module, part, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    return block


def _quantize_group(
    block: Block, layer: int, group: Sequence[str], calibration: Calibration, recipe: Recipe, writer: Writer
) -> Iterator[ModuleError]:
    """Quantize Linears that read the same inputs, in place: what follows is calibrated on what will be read."""
    first = block.get_submodule(group[0])
    assert isinstance(first, nn.Linear)
    hessian = Hessian(first.in_features)
    hook = first.register_forward_pre_hook(lambda _, args: hessian.add(args[0]))
    for _ in calibration.run(block, layer):
        pass
    hook.remove()
    for name in group:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield from _quantize_linear(linear, f"layers.{layer}.{name}", hessian.value, calibration.config, recipe, writer)


def _quantize_linear(
    linear: nn.Linear, module: str, hessian: Tensor, config: ModelConfig, recipe: Recipe, writer: Writer
) -> Iterator[ModuleError]:
    """One Linear of ours is one or three (q, k, v) of the checkpoint's: rows are independent, so they are split."""
    sources = checkpoint_names(config, module)
    result = gptq_quantize.quantize(linear.weight, hessian, recipe, name=sources[0])
    sizes = [linear.out_features]
    if len(sources) > 1:
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    error = gptq_quantize.output_error(linear.weight, result.weight_NK, hessian)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    start = 0
    for source, size in zip(sources, sizes):
        for suffix, tensor in result.rows(start, size, recipe).items():
            writer.add(f"{source}.{suffix}", tensor)
        writer.add(f"{source}.bias", bias[start : start + size])  # AutoGPTQ writes one for every Linear
        start += size
        yield ModuleError(source, error)
    linear.weight = nn.Parameter(result.weight_NK.to(linear.weight.dtype), requires_grad=False)


def _copy_files(source: Path, out: Path) -> None:
    """Tokenizer, generation settings and the like; not weights, their indexes or configs written anew."""
    for path in source.iterdir():
        is_ours = path.name in ("config.json", "quantize_config.json", "SHA256SUMS") or path.name.endswith(
            ".index.json"
        )
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and not is_ours:
            shutil.copy(path, out / path.name)


def _write_configs(out: Path, fields: Mapping[str, Any], recipe: Recipe) -> None:
    settings = {
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "damp_percent": recipe.damp,
        "desc_act": recipe.desc_act,
        "static_groups": False,
        "sym": recipe.sym,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    config = {key: value for key, value in fields.items() if key not in ("torch_dtype", "dtype")}
    if "fp16" in fields or fields.get("model_type") == "qwen":
        config |= {"bf16": False, "fp16": True, "fp32": False}
    write_json(out / "config.json", {**config, "torch_dtype": "float16", "quantization_config": settings})
    write_json(out / "quantize_config.json", settings)
