"""Our transformer against outputs of the original Qwen v1 code (tests/golden/model, or QWEN_EVAL_GOLDEN)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_eval.models.checkpoint import Placement, load
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.decode import RunningRow
from qwen_eval.models.runner import ModelRunner

GOLDEN = Path(os.environ.get("QWEN_EVAL_GOLDEN", Path(__file__).parent / "golden")) / "model"
MODELS = sorted(p.name for p in GOLDEN.glob("*") if (p / "model.safetensors").exists())
MODES = {"plain": (False, False), "ntk": (True, False), "logn": (False, True), "ntk_logn": (True, True)}
FP32, BF16_MEAN, BF16_MAX, FP16_MEAN, FP16_MAX = 5e-4, 0.06, 0.6, 0.01, 0.1


def forward_of(folder: Path, mode: str, dtype: torch.dtype = torch.float32, **options: object) -> ModelRunner:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    ntk, logn = MODES[mode]
    config = replace(config, dynamic_ntk=ntk, logn=logn)
    model, _ = load(folder, config, Placement(device=torch.device("cpu"), dtype=dtype))
    return ModelRunner(model, **options)  # type: ignore[arg-type]


def whole(forward: ModelRunner, ids: list[int]) -> Tensor:
    """Logits [T,V] of one full pass without a cache, fp32."""
    return forward.model.logits(forward.packed([ids], [len(ids)])).float()


def teacher_forced(forward: ModelRunner, rows: list[list[int]], tokens: Tensor) -> Tensor:
    """Prefill `rows`, then feed tokens [B,n]; logits [B,n+1,V] of every step."""
    room, lengths = max(map(len, rows)) + tokens.shape[1] + 1, [len(r) for r in rows]
    slots = forward.slots(len(rows), room)
    hidden = forward.packed(rows, lengths, last_only=True, sink=(slots, range(len(rows))))
    decoding = forward.decoding(slots, prefill_lengths=lengths, num_positions=room)
    steps = [forward.model.logits(hidden)]
    for i in range(tokens.shape[1]):
        running = [RunningRow(prefill_tokens=length, own_tokens=length + i) for length in lengths]
        decoding.arrange(running, tokens[:, i].tolist())
        hidden, _ = decoding.step()
        steps.append(forward.model.logits(hidden))
    return torch.stack(steps, dim=1).float()


def cases(file: str, suffix: str) -> Iterator[tuple[str, str]]:
    """(model, "mode.case") of every tensor `mode.case.suffix` in a golden file."""
    for name in MODELS:
        path = GOLDEN / name / file
        if path.exists():
            for key in sorted(load_file(path)):
                if key.endswith(suffix) and "kvq" not in key:
                    yield name, key.removesuffix(suffix)


@pytest.mark.parametrize("chunk", [None, 50], ids=["whole", "chunked"])
@pytest.mark.parametrize(("name", "case"), list(cases("full_logits.safetensors", ".logits")))
def test_full_forward_equals_the_original(name: str, case: str, chunk: int | None) -> None:
    folder, (mode, length) = GOLDEN / name, case.split(".")
    golden = load_file(folder / "full_logits.safetensors")
    ids = load_file(folder / "inputs_full.safetensors")[f"{length}.ids"][0].tolist()
    forward = forward_of(folder, mode, prefill_chunk=chunk or 2048)
    if chunk is None:
        logits = whole(forward, ids)
    else:
        hidden = torch.cat(list(forward.extend(forward.empty_prefix(), ids, len(ids), want_hidden=True)))
        logits = forward.model.logits(hidden)
    difference = (logits[golden[f"{length}.positions"].long()] - golden[f"{case}.logits"]).abs().max()
    assert difference <= FP32


@pytest.mark.parametrize(("name", "case"), list(cases("decode.safetensors", ".token_ids")))
def test_greedy_decode_equals_the_original(name: str, case: str) -> None:
    folder, mode = GOLDEN / name, case.split(".")[0]
    golden = load_file(folder / "decode.safetensors")
    tokens = golden[f"{case}.token_ids"]
    logits = teacher_forced(forward_of(folder, mode), [golden[f"{case}.prompt_ids"].tolist()], tokens[None])[0]
    assert (logits - golden[f"{case}.step_logits"]).abs().max() <= FP32
    assert torch.equal(logits[:-1].argmax(-1), tokens.long())


@pytest.mark.parametrize(
    ("name", "case"),
    [c for c in cases("batch.safetensors", ".token_ids") if c[1].split(".")[0] in ("plain", "ntk")],
)
def test_a_batch_of_unequal_lengths_equals_the_original_padded_one(name: str, case: str) -> None:
    folder, mode = GOLDEN / name, case.split(".")[0]
    golden = load_file(folder / "batch.safetensors")
    ids, mask = golden[f"{case}.input_ids"], golden[f"{case}.attention_mask"].bool()
    rows = [row[keep].tolist() for row, keep in zip(ids, mask)]
    forward = forward_of(folder, mode)
    positions = golden[f"{case}.prefill_positions"].long()
    for i, row in enumerate(rows):
        kept = mask[i][positions]
        index = (mask[i].cumsum(0) - 1)[positions][kept]
        ours = whole(forward, row)[index]
        assert (ours - golden[f"{case}.prefill_logits"][i][kept]).abs().max() <= FP32
    logits = teacher_forced(forward, rows, golden[f"{case}.token_ids"])
    assert (logits - golden[f"{case}.step_logits"]).abs().max() <= FP32
    assert torch.equal(logits[:, :-1].argmax(-1), golden[f"{case}.token_ids"].long())


@pytest.mark.parametrize(
    ("file", "dtype", "mean", "most"),
    [("bf16", torch.bfloat16, BF16_MEAN, BF16_MAX), ("fp16", torch.float16, FP16_MEAN, FP16_MAX)],
)
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_stays_within_rounding_of_the_original(
    name: str, file: str, dtype: torch.dtype, mean: float, most: float
) -> None:
    folder = GOLDEN / name
    if not (folder / f"{file}.safetensors").exists():
        pytest.skip(f"no {file} goldens for model {name}")
    golden, inputs = load_file(folder / f"{file}.safetensors"), load_file(folder / "inputs_full.safetensors")
    full = load_file(folder / "full_logits.safetensors")
    for key in sorted(golden):
        if not key.endswith(".logits"):
            continue
        mode, length, _ = key.split(".")
        logits = whole(forward_of(folder, mode, dtype), inputs[f"{length}.ids"][0].tolist())
        difference = (logits[full[f"{length}.positions"].long()] - golden[key].float()).abs()
        assert difference.mean() <= mean
        assert difference.max() <= most
