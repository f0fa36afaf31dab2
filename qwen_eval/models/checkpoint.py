"""Weights from a published checkpoint directory into a `Transformer`. The only place that knows tensor names.

Sharded safetensors and .bin files (read with `weights_only`, so nothing is executed), dense or GPTQ-packed; or random
weights of the shape. Every tensor is checked for name, shape and finiteness; what is missing is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from qwen_eval.activity import stage
from qwen_eval.core import ModelError
from qwen_eval.models.block import block_linears, checkpoint_names
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.quant import kernels
from qwen_eval.models.quant.formats import packed_by
from qwen_eval.models.transformer import SplitLinear, Transformer, dense_linear
from qwen_eval.models.weight_files import Tensors, open_weights, weight_files

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HOST = torch.device("cpu")
# Buffers that old checkpoints carry and nobody reads.
IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "logn_tensor")


class TensorFiles:
    """Random access to the tensors of a checkpoint directory by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}  # tensor name -> file
        self.num_bytes = 0
        self.on_read: Callable[[int], None] = lambda num_bytes: None  # told of every tensor as it is read
        self._opened: dict[Path, Tensors] = {}
        self._used: set[str] = set()
        for file in weight_files(directory):
            self.num_bytes += file.stat().st_size
            for name in self._open(file).keys():  # noqa: SIM118  (safe_open is not a mapping)
                if name in self.files:
                    raise ModelError(f"{directory}: {name} is in both {self.files[name].name} and {file.name}")
                self.files[name] = file

    def _open(self, file: Path) -> Tensors:
        if file not in self._opened:
            self._opened[file] = open_weights(file)
        return self._opened[file]

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def read(self, name: str, shape: Sequence[int] | None = None, device: torch.device = HOST) -> Tensor:
        """The tensor, checked for shape (where one is expected), and on `device` for NaN and infinities."""
        if name not in self.files:
            raise ModelError(f"{self.directory}: tensor {name} is missing")
        self._used.add(name)
        tensor = self._checked(self._open(self.files[name]).get_tensor(name), name, shape, device)
        self.on_read(tensor.nbytes)
        return tensor

    def _checked(
        self, tensor: Tensor, name: str, shape: Sequence[int] | None = None, device: torch.device = HOST
    ) -> Tensor:
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ModelError(f"{name}: shape {list(tensor.shape)} in the checkpoint, {list(shape)} by config.json")
        if tensor.dtype not in (*FLOATS, torch.int32) or (shape is not None and tensor.dtype not in FLOATS):
            raise ModelError(f"{name}: {tensor.dtype} is not read natively; only fp32, fp16, bf16 and GPTQ are")
        tensor = tensor.to(device)  # a GPU looks through it in passing, one core at less than a gigabyte a second
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ModelError(f"{name}: holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def unused(self) -> list[str]:
        return sorted(n for n in self.files if n not in self._used and not n.endswith(IGNORED))


def _is_finite(tensor: Tensor) -> bool:
    # the sum is cheap and almost always settles it; it may overflow where no element does
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


class BuildQuantized(Protocol):
    """From the packed tensors of a linear: a module that computes with them, or its dense weight."""

    def __call__(self, name: str, tensors: Mapping[str, Tensor], /) -> nn.Module: ...

    def dense(self, name: str, tensors: Mapping[str, Tensor], /) -> Tensor: ...

    def random_tensors(
        self, shape: Sequence[int], *, has_bias: bool, generator: torch.Generator
    ) -> Mapping[str, Tensor]: ...


BuildFromDense = Callable[[str, Tensor, Tensor | None], nn.Module]  # (name, weight, bias) -> module


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where weights go and how the linears of the blocks are stored. At most one of the two builders is given."""

    device: torch.device
    dtype: torch.dtype
    quant: str = "none"  # the format's name
    packed: BuildQuantized | None = None  # of a stored format
    from_dense: BuildFromDense | None = None  # of one that is made while loading
    elsewhere: Mapping[str, Placement] = field(default_factory=dict)  # units ("layers.3") on other devices

    def of(self, module: str) -> Placement:
        """That of one module, by its name: "layers.3.attn.qkv" goes where "layers.3" goes."""
        unit = ".".join(module.split(".")[:2]) if module.startswith("layers.") else module
        return self.elsewhere.get(unit, self)


@contextmanager
def _meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


def load(source: Path | TensorFiles, config: ModelConfig, placement: Placement) -> tuple[Transformer, TensorFiles]:
    """A ready `Transformer` in inference mode; ModelError names what is wrong with the checkpoint."""
    files = TensorFiles(source) if isinstance(source, Path) else source
    with stage("reading the weights", total=files.num_bytes, unit="bytes") as reading:
        files.on_read = reading.advance
        return _load(files, config, placement), files


def _load(files: TensorFiles, config: ModelConfig, placement: Placement) -> Transformer:
    config = as_stored(config, files)
    with _meta():
        model = Transformer(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("layers."):
            _load_linear(model, name, module, files, config, placement.of(name))
        elif isinstance(module, nn.Embedding) or (not list(module.children()) and name != "head"):
            _load_weight(model, name, module, files, config, placement.of(name))
    _load_head(model, files, config, placement.of("head"))
    leftover = files.unused()
    if leftover and not (config.tie_embeddings and leftover == ["lm_head.weight"]):
        raise ModelError(f"{files.directory}: tensor {leftover[0]} has no place in this model ({len(leftover)} such)")
    return model.settled()


def as_stored(config: ModelConfig, files: TensorFiles) -> ModelConfig:
    """transformers' rule: a stored head that differs from the embeddings is used, whatever tie_word_embeddings says."""
    embed, head = (f"{checkpoint_names(config, name)[0]}" for name in ("embed", "head"))
    if not config.tie_embeddings or not (f"{head}.weight" in files or packed_by(files, head)):
        return config
    if f"{head}.weight" in files and f"{embed}.weight" not in files:
        return config
    is_same = f"{head}.weight" in files and torch.equal(files.read(f"{embed}.weight"), files.read(f"{head}.weight"))
    return config if is_same else replace(config, tie_embeddings=False)


def _load_head(model: Transformer, files: TensorFiles, config: ModelConfig, placement: Placement) -> None:
    (source,) = checkpoint_names(config, "head")
    _refuse_nonzero_bias(files, [source])
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    elif packed_by(files, source):
        weight = _place(read_head(files, config, placement), placement)
        model.set_submodule("head", kernels.DequantizedLinear(weight, None))
    else:
        _load_weight(model, "head", model.head, files, config, placement)


def read_head(files: TensorFiles, config: ModelConfig, placement: Placement) -> Tensor:
    """The output matrix [V, E] in the precision it is stored in; a GPTQ-packed one dequantized."""
    shape = (config.vocab_size, config.hidden_size)
    (source,) = checkpoint_names(config, "head")
    if as_stored(config, files).tie_embeddings and f"{source}.weight" not in files:
        (source,) = checkpoint_names(config, "embed")
    if not packed_by(files, source):
        return files.read(f"{source}.weight", shape)
    weight = _packed_builder(placement, files, source).dense(source, _packed_tensors(files, source))
    if tuple(weight.shape) != shape:
        raise ModelError(f"{source}: packed weights of {list(weight.shape)}, {list(shape)} by config.json")
    return weight


def _load_weight(
    model: Transformer, name: str, module: nn.Module, files: TensorFiles, config: ModelConfig, placement: Placement
) -> None:
    (source,) = checkpoint_names(config, name)
    if name == "embed" and config.tie_embeddings and f"{source}.weight" not in files:
        (source,) = checkpoint_names(config, "head")  # tied weights may be stored under either name
    assert isinstance(module.weight, Tensor)
    weight = files.read(f"{source}.weight", module.weight.shape, placement.device)
    module.weight = nn.Parameter(_place(weight, placement), requires_grad=False)


def _place(tensor: Tensor, placement: Placement) -> Tensor:
    # a copy: safetensors memory is a map of the file, and a file that changes under us must not change the weights
    is_map = tensor.device.type == "cpu"
    return tensor.to(device=placement.device, dtype=placement.dtype, copy=is_map).contiguous()


def _load_linear(
    model: Transformer,
    name: str,
    module: nn.Linear,
    files: TensorFiles,
    config: ModelConfig,
    placement: Placement,
) -> None:
    sources = checkpoint_names(config, name)
    if any(packed_by(files, source) for source in sources):
        shapes, has_bias = _part_shapes(config, name), module.bias is not None
        parts = [
            _load_part(files, source, shape, has_bias=has_bias, placement=placement)
            for source, shape in zip(sources, shapes)
        ]
        model.set_submodule(name, parts[0] if len(parts) == 1 else SplitLinear(parts))
        return
    shapes = _part_shapes(config, name)
    device = HOST if placement.from_dense is not None else placement.device
    weight = _joined(files, sources, "weight", shapes, device)
    bias = None
    if module.bias is not None:
        bias = _joined(files, sources, "bias", [shape[:1] for shape in shapes], device)
    else:
        _refuse_nonzero_bias(files, sources)
    if placement.from_dense is not None:
        model.set_submodule(name, placement.from_dense(name, weight, bias))
        return
    module.weight = nn.Parameter(_place(weight, placement), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(_place(bias, placement), requires_grad=False)


def _load_part(
    files: TensorFiles, source: str, shape: Sequence[int], *, has_bias: bool, placement: Placement
) -> nn.Module:
    """One linear of a checkpoint in which some are packed: its own tensors say whether it is."""
    if not has_bias:
        _refuse_nonzero_bias(files, [source])
    bias = files.read(f"{source}.bias", shape[:1]) if has_bias else None
    if packed_by(files, source):
        module = _packed_builder(placement, files, source)(source, _packed_tensors(files, source))
        assert isinstance(module, kernels.QuantizedLinear), type(module)
        packed = [module.out_features, module.in_features]
        if packed != list(shape):
            raise ModelError(f"{source}: packed weights of {packed}, {list(shape)} by config.json")
        return module
    linear = dense_linear(source, shape[1], shape[0], has_bias)
    linear.weight = nn.Parameter(
        _place(files.read(f"{source}.weight", shape, placement.device), placement), requires_grad=False
    )
    if bias is not None:
        linear.bias = nn.Parameter(_place(bias, placement), requires_grad=False)
    return linear


def _packed_builder(placement: Placement, files: TensorFiles, source: str) -> BuildQuantized:
    found = packed_by(files, source)
    if placement.packed is None:
        shown = found.tensors[0] if found else "weight"
        raise ModelError(f"{source}.{shown}: packed, but neither config.json nor quantize_config.json says how")
    return placement.packed


def _packed_tensors(files: TensorFiles, source: str) -> dict[str, Tensor]:
    found = packed_by(files, source)
    suffixes = found.tensors if found else ()
    return {suffix: files.read(f"{source}.{suffix}") for suffix in suffixes if f"{source}.{suffix}" in files}


def _part_shapes(config: ModelConfig, name: str) -> list[tuple[int, int]]:
    """[out, in] of a block's Linear ("layers.3.attn.qkv") as the checkpoint stores it, or of its parts."""
    linear = block_linears(config)[name.split(".", 2)[2]]
    return [(shape.outputs, shape.inputs) for shape in linear.stored_shapes]


def _joined(
    files: TensorFiles, sources: Sequence[str], suffix: str, shapes: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    parts = [files.read(f"{source}.{suffix}", shape, device) for source, shape in zip(sources, shapes)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _refuse_nonzero_bias(files: TensorFiles, sources: Sequence[str]) -> None:
    """Converters write zero biases for every linear; a bias that is not zero means that config.json is wrong."""
    for source in sources:
        if f"{source}.bias" in files and bool(files.read(f"{source}.bias").any()):
            raise ModelError(f"{source}.bias: the checkpoint has this bias, a model of this config.json has none")


def num_parameters(config: ModelConfig) -> int:
    """Weights of this shape, tied ones once; quantization does not change it."""
    with _meta():
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


class _Normal:
    """Normal weights, std 0.02. Drawing billions takes minutes: beyond the first `FRESH` they come from one tile."""

    FRESH = 1 << 26
    TILE = (1 << 24) - 3  # a prime: rows of any usual width never begin at the same place of the tile twice

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.num_drawn = self.offset = 0
        self.tile: Tensor | None = None

    def draw(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        weight = torch.empty(tuple(shape), dtype=dtype)
        self.num_drawn += weight.numel()
        if self.num_drawn <= self.FRESH:
            return weight.normal_(0, 0.02, generator=self.generator)
        if self.tile is None:
            self.tile = torch.empty(self.TILE, dtype=dtype).normal_(0, 0.02, generator=self.generator)
        flat, start = weight.view(-1), 0
        while start < len(flat):
            part = self.tile[self.offset : self.offset + len(flat) - start]
            flat[start : start + len(part)] = part
            start, self.offset = start + len(part), (self.offset + len(part)) % self.TILE
        return weight


def random_model(config: ModelConfig, placement: Placement, seed: int) -> Transformer:
    """Random weights of this shape (normal, std 0.02; norms 1), the same for a seed on any device.

    With `placement.packed` the linears of the blocks hold random codes, so that their speed and memory can be measured.
    """
    with _meta():
        model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    normal = _Normal(generator)
    for name, module in list(model.named_modules()):
        there = placement.of(name)
        if isinstance(module, nn.Linear) and name.startswith("layers.") and there.packed:
            sources = checkpoint_names(config, name)
            shapes = _part_shapes(config, name)
            has_bias = module.bias is not None
            parts = [
                there.packed(source, there.packed.random_tensors(shape, has_bias=has_bias, generator=generator))
                for source, shape in zip(sources, shapes)
            ]
            model.set_submodule(name, parts[0] if len(parts) == 1 else SplitLinear(parts))
            continue
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = normal.draw(module.weight.shape, there.dtype)
            bias = getattr(module, "bias", None)
            bias = None if bias is None else torch.zeros(bias.shape, dtype=there.dtype)
            if isinstance(module, nn.Linear) and name.startswith("layers.") and there.from_dense is not None:
                model.set_submodule(name, there.from_dense(name, weight, bias))
                continue
            module.weight = nn.Parameter(weight.to(there.device), requires_grad=False)
            if isinstance(module, nn.Linear) and bias is not None:
                module.bias = nn.Parameter(bias.to(there.device), requires_grad=False)
        elif not list(module.children()):
            ones = torch.ones(module.weight.shape, dtype=there.dtype, device=there.device)
            module.weight = nn.Parameter(ones, requires_grad=False)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.settled()
