"""Whole models through GPTQ weights and the int8 cache, against outputs of the original code."""

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

from qwen_eval.core import ModelError
from qwen_eval.models.checkpoint import Placement, load
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.decode import RunningRow
from qwen_eval.models.kv_cache import Int8Codec
from qwen_eval.models.quant import gptq, kernels
from qwen_eval.models.runner import ModelRunner

GOLDEN = Path(os.environ.get("QWEN_EVAL_GOLDEN") or Path(__file__).parent / "golden")
GPTQ_MODELS = sorted(GOLDEN.glob("gptq/tiny_*"))
KVQ_MODELS = sorted(path.parent for path in GOLDEN.glob("model/*/kvq.safetensors"))
MODES = {"plain": (False, False), "ntk": (True, False), "logn": (False, True), "ntk_logn": (True, True)}
CPU = torch.device("cpu")


def open_gptq(folder: Path, dtype: torch.dtype) -> ModelRunner:
    fields = json.loads((folder / "config.json").read_text())
    settings = gptq.read_config(fields, folder)
    assert settings is not None
    placement = Placement(device=CPU, dtype=dtype, packed=gptq.builder(settings, dtype=dtype, device=CPU))
    model, _ = load(folder, ModelConfig.from_hf(fields), placement)
    return ModelRunner(model)


def whole(forward: ModelRunner, ids: list[int]) -> Tensor:
    return forward.model.logits(forward.packed([ids], [len(ids)])).float()


def teacher_forced(forward: ModelRunner, ids: list[int], tokens: Tensor) -> Tensor:
    """Logits [n + 1, V]: after the prompt, then after each of the n tokens; they attend to the cache."""
    room = len(ids) + len(tokens) + 1
    slots = forward.slots(1, room)
    decoding = forward.decoding(slots, prefill_lengths=[len(ids)], num_positions=room)
    hidden = forward.packed([ids], [len(ids)], last_only=True, sink=(slots, [0]))
    steps = [forward.model.logits(hidden)]
    for i, token in enumerate(tokens):
        decoding.arrange([RunningRow(prefill_tokens=len(ids), own_tokens=len(ids) + i)], [int(token)])
        hidden, _ = decoding.step()
        steps.append(forward.model.logits(hidden))
    return torch.cat(steps).float()


# --- GPTQ ----------------------------------------------------------------------------------------------------------


def prompts(golden: dict[str, Tensor]) -> Iterator[tuple[str, list[int], Tensor]]:
    for key in sorted(golden):
        if key.endswith(".ids"):
            name = key.removesuffix(".ids")
            yield name, golden[key].flatten().tolist(), golden[f"{name}.positions"].long()


@pytest.mark.parametrize("folder", GPTQ_MODELS, ids=lambda p: p.name)
def test_a_gptq_checkpoint_in_fp32_equals_the_original_model_with_its_exact_weights(folder: Path) -> None:
    golden, forward = load_file(folder / "golden.safetensors"), open_gptq(folder, torch.float32)
    for name, ids, positions in prompts(golden):
        assert (whole(forward, ids)[positions] - golden[f"{name}.logits_fp32"]).abs().max() <= 5e-4, name
    tokens = golden["decode.token_ids"]
    steps = teacher_forced(forward, golden["decode.prompt_ids"].flatten().tolist(), tokens)
    assert (steps - golden["decode.step_logits_fp32"]).abs().max() <= 5e-4
    assert torch.equal(steps[:-1].argmax(-1), tokens.long())


@pytest.mark.parametrize(
    ("dtype", "mean", "most"), [(torch.float16, 0.01, 0.1), (torch.bfloat16, 0.06, 0.6)], ids=["fp16", "bf16"]
)
@pytest.mark.parametrize("folder", GPTQ_MODELS, ids=lambda p: p.name)
def test_a_gptq_checkpoint_in_half_precision_stays_within_rounding(
    folder: Path, dtype: torch.dtype, mean: float, most: float
) -> None:
    golden, forward = load_file(folder / "golden.safetensors"), open_gptq(folder, dtype)
    for name, ids, positions in prompts(golden):
        difference = (whole(forward, ids)[positions] - golden[f"{name}.logits_fp32"]).abs()
        assert difference.mean() <= mean, name
        assert difference.max() <= most, name


@pytest.mark.parametrize("folder", GPTQ_MODELS, ids=lambda p: p.name)
def test_all_linears_of_the_blocks_are_quantized_and_counted(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = open_gptq(folder, dtype).model
        report = kernels.report(model.modules())
        assert sum(report.kernels.values()) == 5 * model.config.num_layers
        is_packed = dtype == torch.bfloat16 and kernels.has_packed(dtype, CPU)
        assert (report.fallback is None) == is_packed


def test_a_damaged_checkpoint_names_the_module(tmp_path: Path) -> None:
    if not GPTQ_MODELS:
        pytest.skip("no recorded GPTQ models")
    from safetensors.torch import save_file

    source = GPTQ_MODELS[0]
    tensors = load_file(source / "model.safetensors")
    del tensors["transformer.h.1.mlp.w1.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ModelError, match=r"transformer\.h\.1\.mlp\.w1\.scales: missing"):
        open_gptq(tmp_path, torch.float32)


# --- the int8 cache ------------------------------------------------------------------------------------------------


def open_kvq(folder: Path, mode: str, *, upstream: bool = True) -> ModelRunner:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    ntk, logn = MODES[mode]
    config = replace(config, dynamic_ntk=ntk, logn=logn)
    model, _ = load(folder, config, Placement(device=CPU, dtype=torch.float32))
    return ModelRunner(model, codec=Int8Codec(upstream=upstream))


def kvq_cases() -> list[tuple[Path, str]]:
    return [
        (folder, key.removesuffix(".prompt_ids"))
        for folder in KVQ_MODELS
        for key in sorted(load_file(folder / "kvq.safetensors"))
        if key.endswith(".prompt_ids")
    ]


@pytest.mark.parametrize(("folder", "case"), kvq_cases(), ids=lambda p: getattr(p, "name", p))
def test_the_upstream_cache_holds_the_recorded_codes_and_gives_the_recorded_logits(folder: Path, case: str) -> None:
    golden = load_file(folder / "kvq.safetensors")
    forward = open_kvq(folder, case.split(".")[0])
    ids, tokens = golden[f"{case}.prompt_ids"].flatten().tolist(), golden[f"{case}.token_ids"]
    prefix = forward.grown(None, ids, len(ids))
    kept = prefix._layers[0]
    assert kept is not None
    for half, stored in (("k", kept.k), ("v", kept.v)):
        codes, scale, _ = stored
        expected = golden[f"{case}.layer0.prefill.{half}_q"]
        off = (codes.int() - expected.int()).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() <= 0.005
        assert torch.allclose(scale, golden[f"{case}.layer0.prefill.{half}_scale"], rtol=1e-4, atol=0)
    steps = teacher_forced(forward, ids, tokens)
    assert (steps - golden[f"{case}.step_logits"]).abs().mean() <= 0.03


@pytest.mark.parametrize("folder", KVQ_MODELS, ids=lambda p: p.name)
def test_our_int8_cache_disturbs_the_logits_less_than_upstreams(folder: Path) -> None:
    golden, errors = load_file(folder / "kvq.safetensors"), {True: 0.0, False: 0.0}
    for _, case in [pair for pair in kvq_cases() if pair[0] == folder]:
        ids, tokens = golden[f"{case}.prompt_ids"].flatten().tolist(), golden[f"{case}.token_ids"]
        plain = open_kvq(folder, case.split(".")[0])
        exact = teacher_forced(ModelRunner(plain.model), ids, tokens)
        for upstream in errors:
            got = teacher_forced(ModelRunner(plain.model, codec=Int8Codec(upstream=upstream)), ids, tokens)
            errors[upstream] += float((got - exact).abs().mean())
    assert errors[False] < 0.7 * errors[True], errors


@pytest.mark.parametrize("folder", KVQ_MODELS[:1], ids=lambda p: p.name)
def test_our_int8_cache_gives_the_same_logits_however_the_prompt_is_cut(folder: Path) -> None:
    forward = open_kvq(folder, "plain", upstream=False)
    ids = load_file(folder / "inputs_full.safetensors")
    prompt = max((value.flatten().tolist() for value in ids.values()), key=len)
    logits = []
    for chunk in (7, len(prompt)):
        cut = ModelRunner(forward.model, codec=forward.codec, prefill_chunk=chunk)
        hidden = torch.cat(list(cut.extend(cut.empty_prefix(), prompt, len(prompt), want_hidden=True)))
        logits.append(cut.model.logits(hidden))
    # a rounding difference may tip a code now and then, by one step
    assert (logits[0] - logits[1]).abs().mean() < 0.01
