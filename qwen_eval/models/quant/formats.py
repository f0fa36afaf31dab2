"""The formats of quantized weights: the one table that knows them (`model.quant`). No torch here.

A stored format is one in which checkpoints are published; the others are made from plain weights while they load.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_eval.config import not_one_of
from qwen_eval.models.block import LinearShape
from qwen_eval.models.config import read_fields

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
GROUP_SIZE = 128  # of the published GPTQ checkpoints
KERNEL_GROUPS = (256, 128, 64, 32)  # of torch's int4 kernels
KERNEL_BLOCK = 64  # outputs of torch's int4 kernels come in blocks
NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256  # one scale a block in 8 bits, one fp32 scale for so many of those
NF4_TABLE_BYTES = 4 * (16 + 256)  # the two code books of one linear

HeldBytes = Callable[[LinearShape, str, bool], int]


@dataclass(frozen=True, kw_only=True)
class QuantFormat:
    """One value of `model.quant`.

    `reads` is a module with `builder(settings, dtype=, device=)`, which makes the Linears. Of a stored format it also
    has `settings(raw, origin)`, which checks a checkpoint's quantization_config and gives `settings`; of the others
    `settings` is the format's name.
    """

    name: str
    label: str  # in tables
    bits: int
    held_bytes: HeldBytes  # of one Linear as our engine holds it, by dtype and whether there is a packed kernel
    file_bytes: Callable[[LinearShape], float] | None = None  # of one Linear of a published checkpoint
    reads: str = ""
    detects: Callable[[Mapping[str, Any]], bool] = lambda raw: False  # a checkpoint's quantization_config
    tensors: tuple[str, ...] = ()  # of a stored Linear; the first one shows that it is packed
    defaults: Mapping[str, Any] = field(default_factory=dict)  # quantization_config of random weights
    transformers: Mapping[str, Any] = field(default_factory=dict)  # arguments of BitsAndBytesConfig, for engine=hf

    @property
    def is_stored(self) -> bool:
        return bool(self.tensors)

    @property
    def is_made_here(self) -> bool:
        """Quantized while loading, from our own modules, which hold q, k and v in one."""
        return bool(self.reads) and not self.is_stored

    def builder(self, settings: Any, **place: Any) -> Any:
        return importlib.import_module(self.reads).builder(settings, **place)


# --- bytes of one Linear ---------------------------------------------------------------------------------------------


def _bias_bytes(linear: LinearShape, dtype: str) -> int:
    return ELEMENT_BYTES[dtype] * linear.outputs * linear.bias


def dense_bytes(linear: LinearShape, dtype: str, is_packed: bool = False) -> int:
    return ELEMENT_BYTES[dtype] * linear.num_weights + _bias_bytes(linear, dtype)


def _gptq_bytes(bits: int) -> HeldBytes:
    """torch's int4 layout: a plane per 4 bits, and per plane a bf16 scale and zero for each group and output."""

    def held(linear: LinearShape, dtype: str, is_packed: bool) -> int:
        group = min(GROUP_SIZE, linear.inputs)
        kernel_group = next((size for size in KERNEL_GROUPS if group % size == 0), 0)
        if not (is_packed and dtype == "bf16" and kernel_group and linear.inputs % group == 0):
            return dense_bytes(linear, dtype)
        planes, outputs = bits // 4, linear.outputs + -linear.outputs % KERNEL_BLOCK
        groups = linear.inputs // kernel_group
        return planes * (outputs * linear.inputs // 2 + groups * outputs * 4) + 2 * linear.outputs * linear.bias

    return held


def _gptq_file_bytes(bits: int) -> Callable[[LinearShape], float]:
    """AutoGPTQ's layout: codes, per 128 inputs an fp16 scale and a packed zero for each output, an int32 group index
    for each input and an fp16 bias for each output, also where the model has none."""

    def stored(linear: LinearShape) -> float:
        codes = linear.num_weights * bits / 8 + linear.num_weights / GROUP_SIZE * (2 + bits / 8)
        return codes + 4 * linear.inputs + 2 * linear.outputs

    return stored


def _nf4_bytes(linear: LinearShape, dtype: str, is_packed: bool) -> int:
    blocks = math.ceil(linear.num_weights / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NF4_SECOND_BLOCK)
    return math.ceil(linear.num_weights / 2) + scales + NF4_TABLE_BYTES + _bias_bytes(linear, dtype)


def _llm_int8_bytes(linear: LinearShape, dtype: str, is_packed: bool) -> int:
    return linear.num_weights + 4 * linear.outputs + _bias_bytes(linear, dtype)  # a fp32 scale for each output


# --- the table -------------------------------------------------------------------------------------------------------


def _gptq(bits: int) -> QuantFormat:
    return QuantFormat(
        name=f"gptq-int{bits}",
        label=f"Int{bits}",
        bits=bits,
        reads="qwen_eval.models.quant.gptq",
        detects=lambda raw: raw.get("quant_method", "gptq") == "gptq" and raw.get("bits") == bits,
        tensors=("qweight", "qzeros", "scales", "g_idx", "bias"),
        held_bytes=_gptq_bytes(bits),
        file_bytes=_gptq_file_bytes(bits),
        defaults={"bits": bits, "group_size": GROUP_SIZE},
    )


_NF4 = QuantFormat(
    name="nf4", label="NF4", bits=4, reads="qwen_eval.models.quant.bnb", held_bytes=_nf4_bytes,
    transformers={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
)  # fmt: skip
_LLM_INT8 = QuantFormat(
    name="int8", label="LLM.int8", bits=8, reads="qwen_eval.models.quant.bnb", held_bytes=_llm_int8_bytes,
    transformers={"load_in_8bit": True},
)  # fmt: skip
_PLAIN = QuantFormat(
    name="none", label="", bits=16, held_bytes=dense_bytes, file_bytes=lambda linear: dense_bytes(linear, "bf16")
)  # fmt: skip
FORMATS = {each.name: each for each in (_PLAIN, _gptq(4), _gptq(8), _NF4, _LLM_INT8)}


def quant_format(name: str) -> QuantFormat:
    """The format of a value of `model.quant`; ConfigError for an unknown one."""
    if name not in FORMATS:
        raise not_one_of("model.quant", name, FORMATS)
    return FORMATS[name]


@dataclass(frozen=True, kw_only=True)
class StoredQuant:
    """How a checkpoint is packed: the format, and the settings that its module reads the tensors by."""

    format: QuantFormat
    settings: Any


def read_stored(config_json: Mapping[str, Any], directory: Path) -> StoredQuant | None:
    """What config.json, or else quantize_config.json, says; None for plain weights.

    ModelError for a format that is not read natively and for settings that its reader does not know.
    """
    raw, origin = config_json.get("quantization_config"), directory / "config.json"
    if raw is None:
        origin = directory / "quantize_config.json"
        if not origin.is_file():
            return None
        raw = read_fields(origin)
    return _stored(detected(raw) or FORMATS["gptq-int4"], raw, origin)  # the reader of GPTQ says what is wrong


def random_stored(name: str) -> StoredQuant | None:
    """How random weights are packed for `model.quant`; None where nothing is."""
    found = quant_format(name)
    return _stored(found, found.defaults, Path(f"model.quant={name}")) if found.is_stored else None


def _stored(found: QuantFormat, raw: Any, origin: Path) -> StoredQuant:
    return StoredQuant(format=found, settings=importlib.import_module(found.reads).settings(raw, origin))


def detected(raw: Any) -> QuantFormat | None:
    """The format of a quantization_config; None for one that is not read natively."""
    if not isinstance(raw, Mapping):
        return None
    return next((each for each in FORMATS.values() if each.detects(raw)), None)


def packed_by(names: Container[str], linear: str) -> QuantFormat | None:
    """The stored format whose first tensor is there for a Linear of a checkpoint; None where it is not packed."""
    stored = [each for each in FORMATS.values() if each.is_stored]
    return next((each for each in stored if f"{linear}.{each.tensors[0]}" in names), None)
