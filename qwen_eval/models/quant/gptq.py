"""GPTQ checkpoints: reading, checking and unpacking (https://arxiv.org/abs/2210.17323; file layout of AutoGPTQ).

A quantized Linear of `in` inputs and `out` outputs is stored as
`qweight` int32 [in * bits / 32, out]: rows packed along `in`, lowest bits first;
`qzeros` int32 [groups, out * bits / 32]: packed along `out`; format v1 stores the zero point minus one;
`scales` float [groups, out]; `g_idx` int32 [in], the group of each input; `bias` float [out].
The weight is `scales[g] * (q - zero[g])`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_eval.core import ModelError
from qwen_eval.models.config import shown
from qwen_eval.models.quant import formats, kernels

BITS = (4, 8)
SLAB_N = 8192  # outputs dequantized at a time
TILE = 65521  # random words: a prime, so that rows of any usual width never begin at the same place of it twice
HONOURED = "quant_method bits group_size desc_act sym checkpoint_format format dynamic"
# How the weights were found, and which kernels its authors used; which modules are packed, the tensors say.
HARMLESS = """
    damp_percent damp_auto_increment static_groups true_sequential mse uses_act_group_aware act_group_aware model_seqlen
    dataset tokenizer batch_size pad_token_id max_input_length cache_block_outputs block_name_to_quantize
    module_name_preceding_first_block modules_in_block_to_quantize modules_to_not_convert lm_head
    model_name_or_path model_file_base_name meta quantizer version backend
    use_exllama disable_exllama exllama_config use_cuda_fp16 desc_act_static hyb_act parallel_packing
"""
FIXED: dict[str, tuple[Any, ...]] = {
    "pack_dtype": ("int32", None),
    "is_marlin_format": (False, None),
    "adapter": (None, {}),
    "rotation": (None, False),
}
V1, V2 = "gptq", "gptq_v2"  # values of checkpoint_format; v2 stores the zero point itself


@dataclass(frozen=True, kw_only=True)
class GptqConfig:
    """What of a quantization config decides how the tensors are read. `group_size` -1: one group for all inputs."""

    bits: int
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str = V1

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def per_word(self) -> int:
        """Values in one int32."""
        return 32 // self.bits

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


@dataclass(frozen=True)
class Codes:
    """Unpacked integers. Legend: N outputs, K inputs, G groups."""

    q_KN: Tensor  # int32
    zero_GN: Tensor  # int32
    scale_GN: Tensor  # float, as stored
    group_K: Tensor  # int64

    @property
    def weight(self) -> Tensor:
        """fp32 [N, K]: `scale * (q - zero)` with the product in fp32."""
        offset_KN = self.q_KN - self.zero_GN[self.group_K]
        return (self.scale_GN.float()[self.group_K] * offset_KN).t().contiguous()


def read_config(config_json: Mapping[str, Any], directory: Path) -> GptqConfig | None:
    """The GPTQ settings of a checkpoint, from config.json or else quantize_config.json; None when it is not quantized.

    ModelError for any other quantization method and for settings this reader does not know: never read as if plain.
    """
    found = formats.read_stored(config_json, directory)
    assert found is None or isinstance(found.settings, GptqConfig), found
    return found.settings if found else None


def settings(raw: Any, origin: Path) -> GptqConfig:
    """What a quantization_config says; ModelError for what this reader does not know."""
    if not isinstance(raw, Mapping):
        raise ModelError(f"{origin}: quantization settings are {type(raw).__name__}, expected an object")
    method = raw.get("quant_method", "gptq")
    if method != "gptq":
        raise ModelError(
            f"{origin}: quant_method={shown(method)[1:-1]} is not read natively; only gptq is (or use engine=hf)"
        )
    _check_settings(raw, origin)
    bits, group_size = raw.get("bits"), raw.get("group_size", -1)
    if bits not in BITS:
        raise ModelError(f"{origin}: bits={shown(bits)} is not supported; GPTQ checkpoints of 4 or 8 bits are")
    if type(group_size) is not int or not (group_size == -1 or 0 < group_size < 1 << 24):
        raise ModelError(
            f"{origin}: group_size={shown(group_size)}; it is -1 (one group) or a positive number of inputs"
        )
    layout = raw.get("checkpoint_format") or raw.get("format") or V1
    if layout not in (V1, V2):
        raise ModelError(f"{origin}: checkpoint_format={shown(layout)[1:-1]} is not supported; {V1} and {V2} are")
    return GptqConfig(
        bits=int(bits),
        group_size=group_size,
        desc_act=bool(raw.get("desc_act", False)),
        sym=bool(raw.get("sym", True)),
        checkpoint_format=str(layout),
    )


def _check_settings(raw: Mapping[str, Any], origin: Path) -> None:
    """Every setting is honoured, harmless or refused, as the fields of config.json are."""
    if raw.get("dynamic"):
        raise ModelError(f"{origin}: settings per module (`dynamic`) are not supported; one setting for all modules is")
    for name, value in raw.items():
        if name in FIXED and value not in FIXED[name]:
            raise ModelError(f"{origin}: {name}={shown(value)} is not supported, only {FIXED[name][0]!r}")
        if value and name not in FIXED and name not in (HONOURED + HARMLESS).split():
            how = f"quantization setting {shown(name)[1:-1]}={shown(value)}"
            raise ModelError(f"{origin}: unknown {how} may change how weights are read; remove it if it does not")
    for name in ("desc_act", "sym"):
        if raw.get(name) not in (None, True, False):
            raise ModelError(f"{origin}: {name}={shown(raw[name])} must be true or false")


def check(tensors: Mapping[str, Tensor], config: GptqConfig, *, name: str = "linear") -> tuple[int, int]:
    """(in_features, out_features) of a well-formed Linear; ModelError that names the tensor and what is wrong."""
    for key in ("qweight", "qzeros", "scales"):
        if key not in tensors:
            raise ModelError(f"{name}.{key}: missing; a GPTQ Linear has qweight, qzeros and scales")
    _check_dtypes(tensors, name)
    words, out_features = tensors["qweight"].shape
    in_features = words * config.per_word
    groups = config.num_groups(in_features)
    expected = {
        "qzeros": (groups, -(-out_features // config.per_word)),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
        "bias": (out_features,),
    }
    for key, shape in expected.items():
        if tensors.get(key) is not None and tuple(tensors[key].shape) != shape:
            got = list(tensors[key].shape)
            how = f"bits={config.bits}, group_size={config.group_size}, qweight {[words, out_features]}"
            raise ModelError(f"{name}.{key}: shape {got}, expected {list(shape)} ({how})")
    _check_groups(tensors.get("g_idx"), config, groups, name)
    return in_features, out_features


def _check_dtypes(tensors: Mapping[str, Tensor], name: str) -> None:
    for key in ("qweight", "qzeros"):
        if tensors[key].dtype != torch.int32 or tensors[key].dim() != 2:
            got = f"{tensors[key].dtype} of {tensors[key].dim()} dimensions"
            raise ModelError(f"{name}.{key}: {got}, expected packed int32 of 2 dimensions")
    if not tensors["scales"].is_floating_point():
        raise ModelError(f"{name}.scales: {tensors['scales'].dtype}, expected floating point")
    if not torch.isfinite(tensors["scales"]).all():
        raise ModelError(f"{name}.scales: not finite; the file is damaged")


def _check_groups(g_idx: Tensor | None, config: GptqConfig, groups: int, name: str) -> None:
    if g_idx is None:
        if config.desc_act:
            raise ModelError(f"{name}.g_idx: missing; desc_act=true (act-order) cannot be read without it")
        return
    if g_idx.numel() and not (int(g_idx.min()) >= 0 and int(g_idx.max()) < groups):
        raise ModelError(f"{name}.g_idx: groups {int(g_idx.min())}..{int(g_idx.max())}, expected 0..{groups - 1}")


def unpack(tensors: Mapping[str, Tensor], config: GptqConfig, *, name: str = "linear") -> Codes:
    """The integers of a Linear, zero points as they are meant (not minus one)."""
    zero_GN, group_K = _zeros_and_groups(tensors, config, name)
    q_KN = unpack_rows(tensors["qweight"], config.bits)
    return Codes(q_KN, zero_GN, tensors["scales"], group_K.to(q_KN.device))


def _zeros_and_groups(tensors: Mapping[str, Tensor], config: GptqConfig, name: str) -> tuple[Tensor, Tensor]:
    """Of checked tensors: zero points as they are meant, int32 [G, N], and groups, int64 [K], where `g_idx` lies."""
    in_features, out_features = check(tensors, config, name=name)
    zero_GN = unpack_rows(tensors["qzeros"].t(), config.bits).t()[:, :out_features]
    if stored_format(zero_GN, config, name) == V1:
        zero_GN = (zero_GN + 1) & (config.levels - 1)
    group_K = tensors.get("g_idx")
    if group_K is None:
        group_K = torch.arange(in_features) // (in_features if config.group_size == -1 else config.group_size)
    return zero_GN, group_K.long()


def stored_format(stored_GN: Tensor, config: GptqConfig, name: str) -> str:
    """The format that the stored zero points are in, which for symmetric weights they show themselves.

    Published checkpoints exist that store 8 (v2) and say `gptq` (v1): believed, every weight would be a step off.
    """
    other = {V1: V2, V2: V1}[config.checkpoint_format]
    half = config.levels // 2
    if not bool((stored_GN == half - (other == V1)).all()):
        return config.checkpoint_format
    if not config.sym:
        raise ModelError(
            f"{name}.qzeros: every zero point is stored as {int(stored_GN[0, 0])}, which contradicts sym=false with "
            f"checkpoint_format={config.checkpoint_format}; set sym=true if the weights are symmetric"
        )
    return other


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """int32 [rows * bits / 32, columns] -> int32 [rows, columns] of values 0..2^bits - 1."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    # the mask also takes off the copies of the sign bit that >> brings in
    values = (packed.unsqueeze(1) >> shifts[None, :, None]) & ((1 << bits) - 1)
    return values.reshape(-1, packed.shape[1])


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """What `unpack_rows` gives, transposed, as uint8 [columns, rows]: a quarter of the memory, read as bytes."""
    bytes_CW = packed.t().contiguous().view(torch.uint8)  # of a word the lowest first, on every machine torch runs on
    if bits == 8:
        return bytes_CW
    return torch.stack((bytes_CW & 15, bytes_CW >> 4), -1).flatten(1)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_rows`; the number of rows is a multiple of 32 / bits."""
    per_word = 32 // bits
    assert values.shape[0] % per_word == 0, f"{values.shape[0]} rows do not fill words of {per_word}"
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=values.device)
    words = (values.long().view(-1, per_word, values.shape[1]) << shifts[None, :, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)  # the top bit is the sign


def dequantize(tensors: Mapping[str, Tensor], config: GptqConfig, *, name: str = "linear") -> Tensor:
    """The exact weight, fp32 [out, in]: `scale * (q - zero)` with the product in fp32."""
    return unpack(tensors, config, name=name).weight


def random_tensors(
    shape: Sequence[int], config: GptqConfig, *, has_bias: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of a Linear [out, in] with random codes and one scale, which gives weights of about std 0.02."""
    out_features, in_features = shape
    groups, half = config.num_groups(in_features), config.levels // 2
    zero = half - 1 if config.checkpoint_format == V1 else half
    words = (in_features * config.bits // 32, out_features)
    tensors = {
        "qweight": _random_words(math.prod(words), generator).view(words),
        "qzeros": pack_rows(
            torch.full((-(-out_features // config.per_word) * config.per_word, groups), zero), config.bits
        )
        .t()
        .contiguous(),
        "scales": torch.full((groups, out_features), 0.02 * math.sqrt(12) / config.levels, dtype=torch.float16),
    }
    if config.desc_act:
        tensors["g_idx"] = torch.arange(in_features, dtype=torch.int32) % groups
    if has_bias:
        tensors["bias"] = torch.zeros(out_features, dtype=torch.float16)
    return tensors


def _random_words(count: int, generator: torch.Generator) -> Tensor:
    """int32 [count]; drawing those of a large model would take longer than loading it, so a tile repeats."""
    tile = torch.randint(-(2**31), 2**31, (min(count, TILE),), dtype=torch.int32, generator=generator)
    return tile.repeat(-(-count // TILE))[:count]


def build_linear(
    tensors: Mapping[str, Tensor],
    config: GptqConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    name: str = "linear",
) -> nn.Module:
    """A Linear for these tensors: packed where torch has a kernel for dtype and device, else dequantized once.

    The module has `.kernel` and `.weight_bytes`. In fp32 it is always the exact dequantized weight.
    """
    device = torch.device(device)
    # unpacked there, in passing; groups on the host, which knows them without waiting
    tensors = {key: tensor if key == "g_idx" else tensor.to(device) for key, tensor in tensors.items()}
    bias = tensors.get("bias")
    if kernels.has_packed(dtype, device):
        zero_GN, group_K = _zeros_and_groups(tensors, config, name)
        groups = kernels.contiguous_groups(group_K, len(zero_GN))
        if groups is not None:
            q_NK = unpack_bytes(tensors["qweight"], config.bits)
            return kernels.pack(q_NK, zero_GN, tensors["scales"], groups, config.bits, bias, device=device)
    weight_NK = unpack(tensors, config, name=name).weight
    return kernels.DequantizedLinear(weight_NK.to(device, dtype), None if bias is None else bias.to(device, dtype))


@dataclass(frozen=True, kw_only=True)
class Builder:
    """(name, tensors) -> Linear, for loading a whole checkpoint."""

    config: GptqConfig
    dtype: torch.dtype
    device: torch.device | str

    def __call__(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        return build_linear(tensors, self.config, dtype=self.dtype, device=self.device, name=name)

    def random_tensors(self, shape: Sequence[int], *, has_bias: bool, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors of a Linear [out, in] of random codes."""
        return random_tensors(shape, self.config, has_bias=has_bias, generator=generator)

    def dense(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight [out, in] in `dtype`, a slab of outputs at a time: a head unpacks to gigabytes of int32."""
        in_features, out_features = check(tensors, self.config, name=name)
        weight_NK = torch.empty(out_features, in_features, dtype=self.dtype)
        per_word = self.config.per_word
        for start in range(0, out_features, SLAB_N):
            outputs = slice(start, min(start + SLAB_N, out_features))
            words = slice(start // per_word, -(-outputs.stop // per_word))
            slab = {**tensors, "qweight": tensors["qweight"][:, outputs], "qzeros": tensors["qzeros"][:, words]}
            slab |= {"scales": tensors["scales"][:, outputs]}
            slab.pop("bias", None)
            weight_NK[outputs] = dequantize(slab, self.config, name=name).to(self.dtype)
        return weight_NK


def builder(config: GptqConfig, *, dtype: torch.dtype, device: torch.device | str) -> Builder:
    return Builder(config=config, dtype=dtype, device=device)
