"""Our GPTQ: closer than rounding, written as published checkpoints are, read back as exactly what was fitted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_tiny_qwen2
from torch import Tensor

from qwen_eval.core import ConfigError, ModelError
from qwen_eval.models.block import checkpoint_names
from qwen_eval.models.checkpoint import Placement, load, random_model
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.quant import gptq
from qwen_eval.models.runner import ModelRunner
from qwen_eval.quantize import __main__ as quantize
from qwen_eval.quantize import checkpoint as gptq_checkpoint
from qwen_eval.quantize import gptq as gptq_quantize
from qwen_eval.quantize.calibration import calibration_sequences
from qwen_eval.quantize.config import QuantizeSpec
from qwen_eval.quantize.gptq import Hessian, Recipe

CPU = torch.device("cpu")
V1 = {
    "model_type": "qwen",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "vocab_size": 128,
    "seq_length": 64,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "bf16": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
RECIPES = [
    Recipe(),
    Recipe(bits=8),
    Recipe(sym=False, group_size=64),
    Recipe(group_size=-1),
    Recipe(desc_act=True),
    Recipe(group_size=256, desc_act=True, sym=False),
]


# --- one Linear ----------------------------------------------------------------------------------------------------


def correlated_layer() -> tuple[Tensor, Tensor]:
    """A weight [48, 512] and inputs [1500, 512] whose columns go together, as those of a language model do."""
    torch.manual_seed(0)
    mix = torch.randn(512, 512) / 512**0.5
    return torch.randn(48, 512) * 0.02, torch.randn(1500, 512) @ mix + 0.3 * torch.randn(1500, 1)


def round_to_nearest(weight: torch.Tensor, recipe: Recipe) -> gptq_quantize.GptqResult:
    """Without calibration: what GPTQ is when all inputs are independent and alike."""
    return gptq_quantize.quantize(weight, torch.eye(weight.shape[1]), recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_outputs_are_a_quarter_closer_than_after_rounding(recipe: Recipe) -> None:
    weight, x = correlated_layer()
    hessian = Hessian(512)
    for part in x.split(400):
        hessian.add(part)
    ours = gptq_quantize.quantize(weight, hessian.value, recipe).weight_NK
    rounded = round_to_nearest(weight, recipe).weight_NK
    errors = [float((x @ (q - weight).T).norm() / (x @ weight.T).norm()) for q in (ours, rounded)]
    assert errors[0] < 0.75 * errors[1]
    assert gptq_quantize.output_error(weight, ours, hessian.value) == pytest.approx(errors[0], rel=1e-3)


def nearest(weight: Tensor, recipe: Recipe) -> Tensor:
    """Symmetric rounding to nearest, written for reading; groups of consecutive inputs."""
    out, top = weight.clone(), 2**recipe.bits - 1
    size = weight.shape[1] if recipe.group_size == -1 else recipe.group_size
    for group in out.split(size, dim=1):
        scale = (2 * group.abs().amax(1, keepdim=True) / top).half().float()
        half = (top + 1) // 2
        group.copy_(scale * ((group / scale).round() + half).clamp(0, top).sub(half))
    return out


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(bits=8), Recipe(group_size=-1), Recipe(group_size=96)], ids=str)
def test_with_independent_inputs_it_is_rounding_to_nearest(recipe: Recipe) -> None:
    weight, _ = correlated_layer()
    got = gptq_quantize.quantize(weight, 3 * torch.eye(512), recipe).weight_NK
    assert torch.equal(got, nearest(weight, recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_what_is_written_is_what_was_fitted(recipe: Recipe) -> None:
    weight, x = correlated_layer()
    hessian = Hessian(512)
    hessian.add(x)
    result = gptq_quantize.quantize(weight, hessian.value, recipe)
    assert torch.equal(gptq.dequantize(result.tensors(recipe), recipe.config), result.weight_NK)
    upper, lower = result.rows(0, 16, recipe), result.rows(16, 32, recipe)
    parts = [gptq.dequantize(part, recipe.config) for part in (upper, lower)]
    assert torch.equal(torch.cat(parts), result.weight_NK)


def test_groups_of_one_sign_and_of_zeros_can_be_written() -> None:
    """Format v1 stores the zero point less one, so a zero point of 0 would spill into its neighbours."""
    weight = torch.rand(8, 64) * 0.1 + 0.01
    weight[0] = 0
    weight[1] = -weight[1]
    recipe = Recipe(sym=False, group_size=32)
    result = round_to_nearest(weight, recipe)
    assert result.codes.zero_GN.min() >= 1
    assert torch.equal(gptq.dequantize(result.tensors(recipe), recipe.config), result.weight_NK)
    assert (result.weight_NK - weight).abs().max() <= 0.0041  # half of 0.11 / 14, and the fp16 scale
    assert not result.weight_NK[0].any()


def test_inputs_that_never_fire_and_too_little_text_do_not_break_it() -> None:
    weight, x = correlated_layer()
    x[:, 7] = 0
    hessian = Hessian(512)
    hessian.add(x[:20])  # rank 20 of 512: singular without damping
    assert torch.isfinite(gptq_quantize.quantize(weight, hessian.value, Recipe()).weight_NK).all()


# --- a checkpoint --------------------------------------------------------------------------------------------------


def write_v1(directory: Path) -> Path:
    """A random Qwen v1 checkpoint."""
    directory.mkdir()
    config = ModelConfig.from_hf(V1)
    model = random_model(config, Placement(device=CPU, dtype=torch.float32), seed=0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, _, part = name.rpartition(".")
        tensors[f"{checkpoint_names(config, module)[0]}.{part}"] = (tensor * 5 if tensor.dim() == 2 else tensor).clone()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(V1))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def sequences(count: int = 12, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (length + i,), generator=generator).tolist() for i in range(count)]


def quantized(source: Path, out: Path, recipe: Recipe, ids: Sequence[Sequence[int]] | None = None) -> Path:
    out.mkdir()
    fields = json.loads((source / "config.json").read_text())
    gptq_checkpoint.quantize_checkpoint(
        source, out, fields, ids or sequences(), recipe, dtype=torch.float32, device=CPU, progress=lambda *_: None
    )
    return out


def opened(directory: Path) -> ModelRunner:
    fields = json.loads((directory / "config.json").read_text())
    settings = gptq.read_config(fields, directory)
    build = None if settings is None else gptq.builder(settings, dtype=torch.float32, device=CPU)
    placement = Placement(device=CPU, dtype=torch.float32, packed=build)
    return ModelRunner(load(directory, ModelConfig.from_hf(fields), placement)[0])


def logits(forward: ModelRunner, ids: list[int]) -> Tensor:
    return forward.model.logits(forward.packed([ids], [len(ids)]))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_v1_checkpoint_is_quantized_and_opens(bits: int, tmp_path: Path) -> None:
    source = write_v1(tmp_path / "plain")
    out = quantized(source, tmp_path / "packed", Recipe(bits=bits, group_size=32))
    ids = sequences(1)[0]
    plain, packed = logits(opened(source), ids), logits(opened(out), ids)
    error = float((plain - packed).norm() / plain.norm())
    assert 0 < error < (0.35 if bits == 4 else 0.02)
    assert (out / "tokenizer_config.json").is_file()


def test_the_files_are_those_of_a_published_checkpoint(tmp_path: Path, golden: Path) -> None:
    recorded = sorted((golden / "gptq").glob("tiny_int4*"))
    if not recorded:
        pytest.skip(f"no recorded GPTQ models under {golden}")
    out = quantized(write_v1(tmp_path / "plain"), tmp_path / "packed", Recipe(group_size=32))

    def layout(directory: Path) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in load_file(directory / "model.safetensors").items()}

    def settings(directory: Path) -> set[str]:
        return set(json.loads((directory / "config.json").read_text())["quantization_config"])

    assert layout(out) == layout(recorded[0])
    assert settings(out) >= settings(recorded[0]) - {"disable_exllama"}
    config = json.loads((out / "config.json").read_text())
    assert (config["bf16"], config["fp16"]) == (False, True)


def test_calibrated_blocks_follow_the_quantized_ones(tmp_path: Path) -> None:
    """True sequential: a Linear late in the model is fitted to inputs that carry the errors before it."""
    source = write_v1(tmp_path / "plain")
    calibration = sequences(40)
    gptq_error, rounding_error = 0.0, 0.0
    out = quantized(source, tmp_path / "packed", Recipe(group_size=32), calibration)
    rounded = opened(source)
    for name, module in rounded.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("layers."):
            module.weight.copy_(round_to_nearest(module.weight, Recipe(group_size=32)).weight_NK)
    plain, packed = opened(source), opened(out)
    for ids in calibration[:10]:
        exact = logits(plain, ids)
        gptq_error += float((logits(packed, ids) - exact).norm())
        rounding_error += float((logits(rounded, ids) - exact).norm())
    assert gptq_error < rounding_error


def test_large_checkpoints_are_sharded_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_checkpoint, "SHARD_BYTES", 20_000)
    source = write_v1(tmp_path / "plain")
    out = quantized(source, tmp_path / "packed", Recipe(group_size=32))
    monkeypatch.undo()
    whole = quantized(source, tmp_path / "whole", Recipe(group_size=32))
    assert len(list(out.glob("model-0*-of-0*.safetensors"))) > 2
    ids = sequences(1)[0]
    assert torch.equal(logits(opened(out), ids), logits(opened(whole), ids))


# --- the command, on a Qwen2 of transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


def command(qwen2: Path, out: Path, *more: str) -> int:
    given = {argument.partition("=")[0] for argument in more}
    usual = {"model.name": "tiny", "group_size": 16, "num_sequences": 8, "sequence_tokens": 64, "quiet": "true"}
    arguments = [f"{key}={value}" for key, value in usual.items() if key not in given]
    return quantize.main([f"model.path={qwen2}", f"out={out}", *arguments, *more])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_command_writes_what_transformers_and_we_read_alike(
    bits: int, qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path / "packed"
    assert command(qwen2, out, f"bits={bits}") == 0
    assert f"14 linears in {bits} bits" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.float32).eval()
    settings = gptq.read_config(json.loads((out / "config.json").read_text()), out)
    assert settings is not None
    assert AutoConfig.from_pretrained(out).quantization_config["quant_method"] == "gptq"
    tensors = load_file(out / "model.safetensors")
    for name, module in theirs.named_modules():
        if f"{name}.qweight" in tensors:
            parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            module.weight.data = gptq.dequantize(parts, settings)
        elif f"{name}.weight" in tensors:
            module.weight.data = tensors[f"{name}.weight"].float()
    ids = list(range(40, 90))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    assert (logits(opened(out), ids) - expected).abs().max() < 1e-3


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs the extra gptq (GPTQModel)")
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_loads_it_through_gptqmodel(bits: int, qwen2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "packed"
    assert command(qwen2, out, f"bits={bits}", "group_size=32") == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, device_map="cpu").eval()
    ids = list(range(40, 90))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].float()
    ours = logits(opened(out), ids)
    assert (ours - expected).abs().mean() < {4: 0.05, 8: 0.01}[bits]  # half-precision kernels; logits spread by 1.7
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["bits=3"], "bits=3: must be 4 or 8"),
        (["group_size=24"], "group_size=24 does not divide the widths [32, 64]"),
        (["group_size=0"], "group_size=0: must be -1"),
        (["damp=0"], "damp=0.0: must be in (0, 1)"),
        (["calibration=nowhere.txt"], "calibration=nowhere.txt: no such file"),
        (["model.weights=random"], "there is nothing to quantize"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_leaves_nothing(
    more: list[str], says: str, qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(qwen2, tmp_path / "packed", *more) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_and_a_quantized_checkpoint_are_refused(qwen2: Path, tmp_path: Path) -> None:
    out = quantized(qwen2, tmp_path / "packed", Recipe(group_size=32))
    spec = QuantizeSpec(out=str(out))
    spec.model.name, spec.model.path = "tiny", str(qwen2)
    with pytest.raises(ConfigError, match="exists; name another"):
        quantize.quantize(spec)
    spec.model.path, spec.out = str(out), str(tmp_path / "again")
    with pytest.raises(ModelError, match="quantized already"):
        quantize.quantize(spec)


# --- calibration text ----------------------------------------------------------------------------------------------


def calibration(qwen2: Path, **settings: Any) -> list[list[int]]:
    from qwen_eval.models.tokenizer import load_tokenizer

    return calibration_sequences(QuantizeSpec(**settings), load_tokenizer(qwen2))


def test_the_bundled_text_is_cut_evenly_from_beginning_to_end(qwen2: Path) -> None:
    few = calibration(qwen2, num_sequences=10, sequence_tokens=128)
    every = calibration(qwen2, num_sequences=10**6, sequence_tokens=128)
    assert [len(ids) for ids in few] == [128] * 10
    places = [every.index(ids) for ids in few]
    assert places[0] == 0
    assert places[-1] > 0.85 * len(every)
    assert places == sorted(set(places))


def test_chats_are_one_sequence_each_and_texts_run_together(qwen2: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"text": "abc"},
        {"text": "def"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    got = calibration(qwen2, calibration=str(path))
    from qwen_eval.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(qwen2)
    assert len(got) == 3
    assert "user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>" in tokenizer.decode(got[0])
    assert tokenizer.decode(got[2]) == "abc<|endoftext|>def<|endoftext|>"


def test_a_damaged_row_is_named_with_its_line(qwen2: Path, tmp_path: Path) -> None:
    from qwen_eval.core import DataError

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "abc"}\n{"txt": 1}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: neither"):
        calibration(qwen2, calibration=str(path))
