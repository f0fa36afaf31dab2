"""One quantized checkpoint: read the original and the calibration text, quantize, write. Imports torch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_eval.activity import stage
from qwen_eval.config import ModelSpec
from qwen_eval.core import ConfigError, ModelError
from qwen_eval.models.config import ModelConfig, read_fields
from qwen_eval.models.hub import checkpoint_dir
from qwen_eval.models.load import choose_device
from qwen_eval.models.lora import is_adapter
from qwen_eval.models.quant.gptq import read_config
from qwen_eval.models.quant.kernels import dense_dtype
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.quantize.calibration import calibration_sequences
from qwen_eval.quantize.checkpoint import ModuleError, quantize_checkpoint, write_json
from qwen_eval.quantize.config import QuantizeSpec
from qwen_eval.quantize.gptq import Recipe


def quantize(spec: QuantizeSpec) -> None:
    """Quantize by a checked spec and write; the directory appears under its name only when it is complete."""
    out = Path(spec.out or f"checkpoints/{spec.model.name}-gptq-int{spec.bits}")
    if out.exists() and not spec.overwrite:
        raise ConfigError(f"out={out}: exists; name another directory or pass overwrite=true")
    source = checkpoint_dir(spec.model)
    if out.resolve() == source.resolve():
        raise ConfigError(f"out={out}: is the checkpoint itself")
    fields = _plain_config(source)
    with stage("reading the calibration text"):
        sequences = calibration_sequences(spec, load_tokenizer(source))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _quantize(spec, source, partial, fields, sequences)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    # a name of its own, else its scores would be looked for among those of the original
    print(f"written to {out}: python -m qwen_eval model.name={spec.model.name}-int{spec.bits} model.path={out}")


def _plain_config(source: Path) -> dict[str, Any]:
    if is_adapter(source):
        raise ModelError(f"{source}: a LoRA adapter; merge it into its base (merge_and_unload of peft) and pass that")
    fields = read_fields(source / "config.json")
    if read_config(fields, source) is not None:
        raise ModelError(f"{source}: is quantized already; quantize its BF16 original")
    return fields


def _quantize(
    spec: QuantizeSpec, source: Path, partial: Path, fields: dict[str, Any], sequences: Sequence[Sequence[int]]
) -> None:
    recipe = Recipe(bits=spec.bits, group_size=spec.group_size, sym=spec.sym, desc_act=spec.desc_act, damp=spec.damp)
    device, dtype = _compute(spec.model)
    start = time.perf_counter()

    with stage("quantizing", total=ModelConfig.from_hf(fields).num_layers, unit="layers") as quantizing:

        def progress(layer: int, num_layers: int, errors: Sequence[ModuleError]) -> None:
            worst = max(errors, key=lambda error: error.error)
            quantizing.advance(note=f"worst output error of layer {layer + 1}: {worst.error:.2%} ({worst.name})")

        written, errors = quantize_checkpoint(
            source, partial, fields, sequences, recipe, dtype=dtype, device=device, progress=progress
        )
    result = {
        "calibration": str(spec.calibration or "bundled"),
        "num_sequences": len(sequences),
        "num_tokens": sum(map(len, sequences)),
        "weight_bytes": written,
        "wall_s": time.perf_counter() - start,
        "output_errors": {error.name: error.error for error in errors},
    }
    write_json(partial / "quantize_result.json", result)
    mean = sum(error.error for error in errors) / len(errors)
    size = f"{written / 2**20:.1f} MiB"
    print(
        f"{len(errors)} linears in {spec.bits} bits, {size}, mean output error {mean:.2%} on {len(sequences)} sequences"
    )


def _compute(model: ModelSpec) -> tuple[torch.device, torch.dtype]:
    """Where and in what to run the blocks. Hessians are summed in fp32 in any case."""
    device = choose_device(model.device)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = dtypes.get(model.dtype) or (torch.bfloat16 if device.type == "cuda" else dense_dtype())
    return device, dtype
