"""`python -m qwen_eval.quantize model=qwen-7b-chat bits=4`: a GPTQ checkpoint from an unquantized one."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_eval import cli
from qwen_eval.config import ModelSpec, check_values
from qwen_eval.core import ConfigError, DataError, Message, ModelError, Prompt

if TYPE_CHECKING:
    import torch

    from qwen_eval.models.tokenizer import ChatTokenizer
    from qwen_eval.quantize.checkpoint import ModuleError

BUNDLED = Path(__file__).parents[1] / "assets" / "calibration" / "text.txt"
ROLES = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT files


@dataclass(kw_only=True)
class QuantizeSpec:
    """The published recipe is the default: group 128, symmetric, damp 0.01, no act-order, true sequential."""

    model: ModelSpec = field(default_factory=ModelSpec)
    bits: int = 4
    group_size: int = 128  # -1: one group for all inputs
    sym: bool = True
    desc_act: bool = False
    damp: float = 0.01
    calibration: str | None = None  # .txt, or .jsonl of {"text"} or {"messages"}; null: the bundled text
    num_sequences: int = 128
    sequence_tokens: int = 512
    out: str | None = None  # directory to be made; null: checkpoints/<model>-gptq-int<bits>
    overwrite: bool = False
    quiet: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.run(argv, config_name="quantize", schema=QuantizeSpec, job=quantize)


def quantize(spec: QuantizeSpec) -> None:
    """Quantize and write; the directory appears under its name only when it is complete."""
    check(spec)
    out = Path(spec.out or f"checkpoints/{spec.model.name}-gptq-int{spec.bits}")
    if out.exists() and not spec.overwrite:
        raise ConfigError(f"out={out}: exists; name another directory or pass overwrite=true")
    from qwen_eval.models.hub import checkpoint_dir
    from qwen_eval.models.tokenizer import load_tokenizer

    source = checkpoint_dir(spec.model)
    if out.resolve() == source.resolve():
        raise ConfigError(f"out={out}: is the checkpoint itself")
    fields = _plain_config(source)
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


def check(spec: QuantizeSpec) -> None:
    """ConfigError for a value out of range."""
    check_values(spec)
    if spec.bits not in (4, 8):
        raise ConfigError(f"bits={spec.bits}: must be 4 or 8")
    if spec.group_size != -1 and spec.group_size < 1:
        raise ConfigError(f"group_size={spec.group_size}: must be -1 (one group) or positive, e.g. 128")
    if not 0 < spec.damp < 1:
        raise ConfigError(f"damp={spec.damp}: must be in (0, 1), e.g. 0.01")
    for key in ("num_sequences", "sequence_tokens"):
        if getattr(spec, key) < 1:
            raise ConfigError(f"{key}={getattr(spec, key)}: must be at least 1")
    if spec.model.weights == "random":
        raise ConfigError("model.weights=random: there is nothing to quantize; give model.path= or a trained model")


def _plain_config(source: Path) -> dict[str, Any]:
    from qwen_eval.models.config import read_fields
    from qwen_eval.models.lora import is_adapter
    from qwen_eval.models.quant.gptq import read_config

    if is_adapter(source):
        raise ModelError(f"{source}: a LoRA adapter; merge it into its base (merge_and_unload of peft) and pass that")
    fields = read_fields(source / "config.json")
    if read_config(fields, source) is not None:
        raise ModelError(f"{source}: is quantized already; quantize its BF16 original")
    return fields


def _quantize(
    spec: QuantizeSpec, source: Path, partial: Path, fields: dict[str, Any], sequences: Sequence[Sequence[int]]
) -> None:
    from qwen_eval.quantize.checkpoint import quantize_checkpoint, write_json
    from qwen_eval.quantize.gptq import Recipe

    recipe = Recipe(bits=spec.bits, group_size=spec.group_size, sym=spec.sym, desc_act=spec.desc_act, damp=spec.damp)
    device, dtype = _compute(spec.model)
    start = time.perf_counter()

    def progress(layer: int, num_layers: int, errors: Sequence[ModuleError]) -> None:
        if not spec.quiet:
            worst = max(errors, key=lambda error: error.error)
            passed_s = time.perf_counter() - start
            line = (
                f"layer {layer + 1}/{num_layers}: worst output error {worst.error:.2%} ({worst.name}), {passed_s:.0f} s"
            )
            print(line, file=sys.stderr, flush=True)

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
    import torch

    from qwen_eval.models.quant.kernels import dense_dtype

    name = model.device if model.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = dtypes.get(model.dtype) or (torch.bfloat16 if name.startswith("cuda") else dense_dtype())
    return torch.device(name), dtype


# --- calibration -----------------------------------------------------------------------------------------------------


def calibration_sequences(spec: QuantizeSpec, tokenizer: ChatTokenizer) -> list[list[int]]:
    """At most `num_sequences` sequences, evenly spread over the file; the same for the same file.

    Texts run together, an end-of-text token between them, and are cut every `sequence_tokens`; chats are one sequence
    each, their end cut off.
    """
    path = Path(spec.calibration) if spec.calibration else BUNDLED
    if not path.is_file():
        raise DataError(f"calibration={path}: no such file; a .txt, or a .jsonl of {{'text'}} or {{'messages'}} rows")
    chats, stream = _read(path, tokenizer)
    size = spec.sequence_tokens
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    if len(pieces) > 1 and len(pieces[-1]) < size // 2:
        pieces.pop()
    found = [ids[:size] for ids in chats] + [piece for piece in pieces if piece]
    if not found:
        raise DataError(f"calibration={path}: holds no text")
    step = max(1.0, len(found) / spec.num_sequences)
    return [found[int(i * step)] for i in range(min(spec.num_sequences, len(found)))]


def _read(path: Path, tokenizer: ChatTokenizer) -> tuple[list[list[int]], list[int]]:
    """(ids of each chat, ids of all texts)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [], tokenizer.encode(text)
    chats, stream = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "text" in row:
                stream += [*tokenizer.encode(row["text"]), tokenizer.endoftext_id]
            else:
                chats.append(tokenizer.render(Prompt(messages=_messages(row))))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{path}:{number}: neither {{'text'}} nor {{'messages'}} ({error})") from error
    return chats, stream


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    turns = row["messages"] if "messages" in row else row["conversations"]
    pairs = [(turn.get("role") or turn["from"], turn.get("content") or turn["value"]) for turn in turns]
    return tuple(Message(role=ROLES.get(role, role), content=content) for role, content in pairs)
