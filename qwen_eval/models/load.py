"""From a `ModelSpec` to a model that runs: checkpoint, overrides, dtype, device, quantization, cache, tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen_eval.config import ModelSpec
from qwen_eval.core import JSON, ConfigError, ModelError
from qwen_eval.models import dense
from qwen_eval.models.checkpoint import Placement, load, num_parameters, random_model
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import HEAD_COPY_SHARE, unit_bytes
from qwen_eval.models.device import memory_bytes
from qwen_eval.models.fingerprint import model_fingerprint
from qwen_eval.models.generation_config import read_json, sampling_of
from qwen_eval.models.hub import checkpoint_dir
from qwen_eval.models.kv_cache import Int8Codec, KvCodec, PlainCodec
from qwen_eval.models.lora import base_of, tokenizer_dir
from qwen_eval.models.merged import open_tensors
from qwen_eval.models.naming import check_shape
from qwen_eval.models.overrides import read_config, with_overrides
from qwen_eval.models.quant import kernels
from qwen_eval.models.quant.formats import StoredQuant, quant_format, random_stored, read_stored
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.spread import Room, layer_map
from qwen_eval.models.tokenizer import ChatTokenizer, load_tokenizer
from qwen_eval.models.transformer import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Opened:
    forward: ModelRunner
    tokenizer: ChatTokenizer
    facts: Mapping[str, JSON]  # what was really used: goes into the result


def open_forward(spec: ModelSpec, *, protocol: str = "robust", prefill_chunk: int = 1024) -> Opened:
    """Load `spec`; ModelError or ConfigError names what is wrong. Quantized layers name the kernel they got."""
    torch.set_float32_matmul_precision("highest")  # some containers switch TF32 on: fp32 would be 10 bits
    directory = checkpoint_dir(spec)
    base = base_of(directory)
    fields = read_config(base, spec)
    if spec.weights != "random":
        check_shape(spec, base)
    config = with_overrides(ModelConfig.from_hf(fields), spec)
    placement = spread_placement(spec, config, fields, base)
    tokenizer = load_tokenizer(tokenizer_dir(directory), system=spec.system, thinking=spec.thinking)
    check_vocabulary(tokenizer, config, directory)
    fingerprint = model_fingerprint(spec, directory)  # before the weights: a file replaced meanwhile is not these
    model = _weights(spec, directory, config, placement)
    kernels.choose_rows(model.modules())
    is_int8 = spec.kv_cache == "int8"
    codec: KvCodec = Int8Codec(upstream=protocol == "upstream") if is_int8 else PlainCodec(placement.dtype)
    forward = ModelRunner(model, codec=codec, attention=spec.attention, prefill_chunk=prefill_chunk)
    facts = {**_facts(spec, model, fingerprint), "quant": placement.quant}
    facts |= tokenizer.template.facts if tokenizer.template else {}
    facts["sampling"] = sampling_of(read_json(base / "generation_config.json"))
    spare = int(HEAD_COPY_SHARE * memory_bytes(torch.device("cpu"))[0])
    # choices read rows of the head, and a tied one is the embedding
    facts["dense_kernels"] = dense.prepare(model.modules(), keep_weight=[model.head], spare_bytes=spare)
    if isinstance(model.head, dense.Linear) and model.head.packed is not None:
        facts["head_copy_bytes"] = model.head.weight.nbytes
    if forward.decode_kernel == "triton":
        from qwen_eval.models.gpu.measure import choose_vector_kernels

        facts["dense_kernels"] = choose_vector_kernels(model.modules())
    return Opened(forward=forward, tokenizer=tokenizer, facts=facts)


def spread_placement(spec: ModelSpec, config: ModelConfig, fields: Mapping[str, Any], directory: Path) -> Placement:
    """`placement_of`, and where `model.device` leaves a choice of devices, each layer's own."""
    devices, first = choose_devices(spec.device), placement_of(spec, fields, directory)
    if len(devices) == 1:
        return _made_current(first)
    dtype = next(name for name, known in DTYPES.items() if known == first.dtype)
    is_packed = kernels.has_packed(first.dtype, first.device)
    units = unit_bytes(config, first.quant, dtype, is_packed=is_packed)
    rooms = rooms_of(devices)
    places = layer_map(units, rooms, is_tied=config.tie_embeddings, is_all=spec.device != "auto")
    same = replace(spec, dtype=dtype)
    of = {device: placement_of(same, fields, directory, device) for device in dict.fromkeys(places.values())}
    elsewhere = {unit: of[device] for unit, device in places.items()} if len(of) > 1 else {}
    return _made_current(replace(of[places["embed"]], elsewhere=elsewhere))


def _made_current(placement: Placement) -> Placement:
    """Captured steps and Triton's kernels are of the current device, which may be another GPU than the first."""
    if placement.device.index is not None and placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)
    return placement


def rooms_of(devices: Sequence[torch.device]) -> list[Room]:
    """The free memory of each; the host is asked once, since its answer changes from moment to moment."""
    host = memory_bytes(torch.device("cpu"))[0]
    return [Room(device=d, free_bytes=memory_bytes(d)[0] if d.type == "cuda" else host) for d in devices]


def placement_of(
    spec: ModelSpec, fields: Mapping[str, Any], directory: Path, device: torch.device | None = None
) -> Placement:
    """Device, dtype and packing of the weights. `directory` is that of config.json."""
    device = device or choose_devices(spec.device)[0]
    packed = read_quant(spec, fields, directory)
    dtype = choose_dtype(spec.dtype, fields, device, is_packed=packed is not None)
    check_quant(spec, packed)
    found = packed.format if packed else quant_format(spec.quant)
    check_cache(spec, fields)
    return Placement(
        device=device,
        dtype=dtype,
        quant=found.name,
        packed=found.builder(packed.settings, dtype=dtype, device=device) if packed else None,
        from_dense=found.builder(found.name, dtype=dtype, device=device) if found.is_made_here else None,
    )


def check_vocabulary(tokenizer: ChatTokenizer, config: ModelConfig, directory: Path) -> None:
    """ModelError where the tokenizer has ids that the embedding has no rows for: prompts would end in a traceback."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only {config.vocab_size} rows "
            "(vocab_size in config.json); use the tokenizer that belongs to these weights"
        )


def check_cache(spec: ModelSpec, fields: Mapping[str, Any]) -> None:
    """Qwen v1's own switch for the int8 cache changes numbers: it must be asked for here too."""
    if fields.get("use_cache_quantization") and spec.kv_cache != "int8":
        raise ModelError(
            f"config.json: use_cache_quantization=true, but model.kv_cache={spec.kv_cache}; pass model.kv_cache=int8, "
            "or set it to false there"
        )


def choose_devices(device: str) -> tuple[torch.device, ...]:
    """`model.device`: all GPUs for auto where there are several, those named in "cuda:0+cuda:1", else one."""
    if device == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(torch.device("cuda", i) for i in range(count)) if count > 1 else (choose_device(device),)
    chosen = tuple(choose_device(name) for name in device.split("+"))
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"model.device={device}: names a device twice")
    return chosen


def choose_device(device: str) -> torch.device:
    """`model.device` of what runs on one device; the first GPU for auto."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "+" in device:
        raise ConfigError(f"model.device={device}: only the native engine spreads a model; name one device here")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"model.device={device}: auto, cpu, cuda, cuda:N, or several as cuda:0+cuda:1") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={device}: no CUDA device here; use model.device=cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device={device}: the GPUs here are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return chosen


def choose_dtype(
    dtype: str, fields: Mapping[str, Any], device: torch.device, *, is_packed: bool = False
) -> torch.dtype:
    """auto: on CUDA the checkpoint's own, bf16 where it names none (fp16 where the GPU has no bf16); on CPU bf16 if
    native there, else fp32.

    A GPTQ checkpoint is bf16 wherever that keeps it packed: the kernels take nothing else, and in fp32 or the fp16
    that its config names every layer would be dequantized, to four or eight times its size.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"model.dtype={dtype}: one of auto, {', '.join(DTYPES)}")
        if dtype == "bf16" and not _has_bf16(device):
            raise ConfigError(f"model.dtype={dtype}: this GPU has no kernels for bf16; use fp16 or fp32")
        return DTYPES[dtype]
    if is_packed and kernels.has_packed(torch.bfloat16, device):
        return torch.bfloat16
    if device.type == "cpu":
        return kernels.dense_dtype()
    named = str(fields.get("dtype") or fields.get("torch_dtype") or ("float16" if fields.get("fp16") else "bfloat16"))
    return torch.float16 if named == "float16" or not _has_bf16(device) else torch.bfloat16


def _has_bf16(device: torch.device) -> bool:
    """GPUs before Ampere (T4, V100) have not. A plan may be for a GPU that is not here."""
    is_here = device.type == "cuda" and torch.cuda.is_available()
    return not is_here or torch.cuda.get_device_capability(device)[0] >= 8


def read_quant(spec: ModelSpec, fields: Mapping[str, Any], directory: Path) -> StoredQuant | None:
    """How the linears are packed, as the checkpoint says; random weights are packed as `model.quant` asks."""
    if spec.weights != "random":
        return read_stored(fields, directory)
    wanted = random_stored(spec.quant)
    named = read_stored(fields, directory) if wanted and "quantization_config" in fields else None
    return named if named and wanted and named.format is wanted.format else wanted


def check_quant(spec: ModelSpec, packed: StoredQuant | None) -> None:
    """A checkpoint is packed or it is not: what `model.quant` says must be what the files are."""
    wanted = quant_format(spec.quant)
    if spec.weights == "random":
        return
    if packed is None and wanted.is_stored:
        raise ModelError(f"model.quant={spec.quant}: the checkpoint is not packed so; see python -m qwen_eval.quantize")
    if packed is not None and wanted.name not in ("none", packed.format.name):
        raise ModelError(f"model.quant={spec.quant}: the checkpoint is packed in another format, {packed.format.name}")


def device_names(devices: Iterable[torch.device]) -> str:
    """`"2 x NVIDIA A100-SXM4-80GB"`, each device once."""
    names = (torch.cuda.get_device_name(d) if d.type == "cuda" else "cpu" for d in dict.fromkeys(devices))
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in Counter(names).items())


def _weights(spec: ModelSpec, directory: Path, config: ModelConfig, placement: Placement) -> Transformer:
    if spec.weights == "random":
        return random_model(config, placement, spec.seed)
    return load(open_tensors(directory), config, placement)[0]


def _facts(spec: ModelSpec, model: Transformer, fingerprint: str) -> dict[str, JSON]:
    report = kernels.report(model.modules())
    config, layers = model.config, Counter(map(str, model.layer_devices))
    return {
        "weights": fingerprint,
        "num_parameters": num_parameters(config),
        "weight_bytes": sum(p.nbytes for p in model.parameters() if p.is_floating_point()) + report.weight_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_names(model.layer_devices),
        **({"layers_on": dict(layers)} if len(layers) > 1 else {}),
        "kernels": report.kernels,
        "quant_fallback": report.fallback,
        "dynamic_ntk": config.dynamic_ntk,
        "logn": config.logn,
        "windows": list(config.windows) or None,
        "train_length": config.train_length,
        "max_length": config.max_length,
        "is_random": spec.weights == "random",
    }
