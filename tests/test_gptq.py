"""GPTQ checkpoints are read exactly, multiplied within tolerance, and refused when they cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counted_bytes import CountedBytes
from safetensors import safe_open
from torch import Tensor

from qwen_eval.core import ModelError
from qwen_eval.models.quant import gptq, kernels

CPU = torch.device("cpu")
HAS_PACKED = kernels.has_packed(torch.bfloat16, CPU)
needs_packed = pytest.mark.skipif(not HAS_PACKED, reason="this CPU has no int4 kernel (AVX2 or AVX-512)")


def read_layer(path: Path) -> tuple[dict[str, Tensor], gptq.GptqConfig]:
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = gptq.GptqConfig(
        bits=int(meta["bits"]),
        group_size=int(meta["group_size"]),
        desc_act=meta["desc_act"] == "True",
        sym=meta["sym"] == "True",
    )
    return tensors, config


def golden_layers(golden: Path) -> list[Path]:
    paths = sorted((golden / "gptq" / "layers").glob("*.safetensors"))
    if not paths:
        pytest.skip(f"no recorded GPTQ layers under {golden}")
    return paths


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def made(
    *, bits: int = 4, group_size: int = 64, in_features: int = 256, out_features: int = 96, act_order: bool = False
) -> tuple[dict[str, Tensor], gptq.GptqConfig, Tensor]:
    """A Linear with random codes, and the weight they mean, built without the reader."""
    torch.manual_seed(0)
    config = gptq.GptqConfig(bits=bits, group_size=group_size, desc_act=act_order, sym=False)
    groups = config.num_groups(in_features)
    group = torch.arange(in_features) // (in_features if group_size == -1 else group_size)
    if act_order:
        group = group[torch.randperm(in_features)]
    q = torch.randint(0, config.levels, (in_features, out_features))
    zero = torch.randint(1, config.levels, (groups, out_features))
    scale = (torch.rand(groups, out_features) * 0.01 + 0.001).half()
    tensors = {
        "qweight": gptq.pack_rows(q, bits),
        "qzeros": gptq.pack_rows((zero - 1).t(), bits).t().contiguous(),
        "scales": scale,
        "g_idx": group.int(),
        "bias": torch.randn(out_features).half(),
    }
    return tensors, config, (scale.float()[group] * (q - zero[group])).t().contiguous()


# --- recorded layers -----------------------------------------------------------------------------------------------


def test_recorded_weights_are_read_bit_for_bit(golden: Path) -> None:
    for path in golden_layers(golden):
        tensors, config = read_layer(path)
        assert torch.equal(gptq.dequantize(tensors, config), tensors["weight_fp32"]), path.stem


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_recorded_outputs_are_met_by_the_dequantized_linear(golden: Path, dtype: torch.dtype, tolerance: float) -> None:
    for path in golden_layers(golden):
        tensors, config = read_layer(path)
        linear = gptq.build_linear(tensors, config, dtype=dtype, device="cpu", name=path.stem)
        y = linear(tensors["x"].to(dtype)).float()
        assert (y - tensors["y_fp32"]).abs().max() <= tolerance, path.stem
        assert isinstance(linear, kernels.DequantizedLinear)


@needs_packed
def test_recorded_outputs_are_met_by_the_packed_linear_as_closely_as_by_a_bf16_weight(golden: Path) -> None:
    for path in golden_layers(golden):
        tensors, config = read_layer(path)
        linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device="cpu", name=path.stem)
        assert isinstance(linear, kernels.PackedLinear), path.stem
        x = tensors["x"].bfloat16()
        plain = F.linear(x, tensors["weight_fp32"].bfloat16(), tensors["bias"].bfloat16())
        # scales are rounded to bf16 once more than a bf16 weight is: about 1.2 times its error
        assert relative(linear(x), tensors["y_fp32"]) <= 1.6 * relative(plain, tensors["y_fp32"]), path.stem


def test_recorded_models_name_their_settings_in_both_places(golden: Path) -> None:
    directories = sorted((golden / "gptq").glob("tiny_*"))
    if not directories:
        pytest.skip(f"no recorded GPTQ models under {golden}")
    for directory in directories:
        config_json = json.loads((directory / "config.json").read_text())
        inside = gptq.read_config(config_json, directory)
        del config_json["quantization_config"]
        assert inside is not None
        assert inside == gptq.read_config(config_json, directory)


# --- layouts the recorded files do not have ------------------------------------------------------------------------

LAYOUTS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 256, "in_features": 512},
    {"bits": 4, "group_size": -1, "in_features": 384},
    {"bits": 4, "group_size": 512, "in_features": 1024},  # wider than the kernel's groups: split
    {"bits": 4, "group_size": 64, "out_features": 8},  # fewer outputs than the kernel's block
    {"bits": 8, "group_size": 32},
    {"bits": 8, "group_size": -1},
    {"bits": 8, "group_size": 64, "act_order": True},
    {"bits": 4, "group_size": 64, "act_order": True},
    {"bits": 4, "group_size": 48, "in_features": 96},  # no kernel has such groups
    {"bits": 4, "group_size": 64, "in_features": 160},  # the last group is shorter
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_dequantizes_exactly_and_multiplies_in_bf16(layout: dict[str, Any]) -> None:
    tensors, config, weight = made(**layout)
    assert torch.equal(gptq.dequantize(tensors, config), weight)
    linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device="cpu")
    x = torch.randn(3, weight.shape[1]).bfloat16()
    assert relative(linear(x), F.linear(x.float(), weight, tensors["bias"].float())) < 6e-3


@needs_packed
@pytest.mark.parametrize("layout", LAYOUTS[:9], ids=str)
def test_many_rows_meet_few_rows(layout: dict[str, Any]) -> None:
    """The dense product of many rows multiplies with the very weights of the packed kernel."""
    tensors, config, _ = made(**layout)
    linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device="cpu")
    assert isinstance(linear, kernels.PackedLinear)
    assert kernels.can_unpack("cpu"), "this torch packs int4 another way: unpack_cpu needs a look"
    x = torch.randn(kernels.MAX_PACKED_ROWS + 1, linear.in_features).bfloat16()
    assert relative(linear(x), torch.cat([linear(few) for few in x.split(5)])) < 4e-3


@needs_packed
@pytest.mark.parametrize(("bits", "most"), [(4, 0.30), (8, 0.56)])
def test_packed_weights_are_small_and_say_so(bits: int, most: float) -> None:
    tensors, config, weight = made(bits=bits, group_size=128, in_features=512, out_features=256)
    linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device="cpu")
    report = kernels.report([linear, torch.nn.Linear(2, 2)])
    assert report.bf16_bytes == 2 * weight.numel()
    held = sum(buffer.nbytes for name, buffer in linear.named_buffers() if name != "bias")
    assert report.weight_bytes == held <= most * report.bf16_bytes
    assert report.fallback is None
    assert list(report.kernels) == [linear.kernel]


def test_a_dequantized_fallback_is_said_with_its_memory() -> None:
    tensors, config, _ = made()
    report = kernels.report([gptq.build_linear(tensors, config, dtype=torch.float32, device="cpu")])
    assert report.fallback is not None
    assert "1 layers dequantized float32" in report.fallback
    assert "2.00 of bf16" in report.fallback


def test_the_second_format_stores_the_zero_point_itself() -> None:
    tensors, config, weight = made()
    words = gptq.unpack_rows(tensors["qzeros"].t(), config.bits)
    tensors["qzeros"] = gptq.pack_rows(words + 1, config.bits).t()
    second = gptq.GptqConfig(bits=4, group_size=64, desc_act=False, sym=False, checkpoint_format=gptq.V2)
    assert torch.equal(gptq.dequantize(tensors, second), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_uses_all_bits_of_a_word(bits: int) -> None:
    values = torch.arange(1 << bits).repeat(2)[:, None].int()
    assert torch.equal(gptq.unpack_rows(gptq.pack_rows(values, bits), bits), values)


def test_words_are_filled_from_the_lowest_bits() -> None:
    nibbles = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]])
    assert gptq.pack_rows(nibbles, 4).item() == 0x87654321 - (1 << 32)


def test_inputs_without_g_idx_are_grouped_in_order() -> None:
    tensors, config, weight = made()
    del tensors["g_idx"], tensors["bias"]
    assert torch.equal(gptq.dequantize(tensors, config), weight)


# --- what is refused -----------------------------------------------------------------------------------------------


def without(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def changed(key: str, change: Any) -> Any:
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("scales"), "layers.0.attn.qkv.scales: missing"),
        (without("qzeros"), "layers.0.attn.qkv.qzeros: missing"),
        (without("g_idx"), "layers.0.attn.qkv.g_idx: missing; desc_act=true"),
        (changed("qweight", lambda t: t[:-8]), "qzeros: shape [4, 12], expected [3, 12]"),
        (changed("qzeros", lambda t: t[:, :-1]), "qzeros: shape [4, 11], expected [4, 12]"),
        (changed("scales", lambda t: t.t()), "scales: shape [96, 4], expected [4, 96]"),
        (changed("scales", lambda t: t * torch.nan), "scales: not finite"),
        (changed("scales", lambda t: t.int()), "scales: torch.int32, expected floating"),
        (changed("qweight", lambda t: t.float()), "qweight: torch.float32 of 2 dimensions, expected packed int32"),
        (changed("bias", lambda t: t[:5]), "bias: shape [5], expected [96]"),
        (changed("g_idx", lambda t: t + 1), "g_idx: groups 1..4, expected 0..3"),
        (changed("g_idx", lambda t: t[:9]), "g_idx: shape [9], expected [256]"),
    ],
)
def test_damaged_tensors_are_named_in_one_line(damage: Any, says: str) -> None:
    tensors, config, _ = made(act_order=True)
    damage(tensors)
    with pytest.raises(ModelError) as error:
        gptq.build_linear(tensors, config, dtype=torch.float32, device="cpu", name="layers.0.attn.qkv")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 3}, "bits=3 is not supported"),
        ({}, "bits=None is not supported"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 4, "group_size": "128"}, "group_size='128'"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format=marlin"),
        ({"quant_method": "awq", "bits": 4}, "quant_method=awq is not read"),
        ({"bits": 4, "dynamic": {"-:.*mlp.*": {}}}, "`dynamic`"),
        (["bits"], "expected an object"),
    ],
)
def test_unknown_settings_are_refused(settings: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        gptq.read_config({"quantization_config": settings}, tmp_path)
    assert says in str(error.value)


def test_a_plain_checkpoint_has_no_settings(tmp_path: Path) -> None:
    assert gptq.read_config({}, tmp_path) is None


def test_a_damaged_settings_file_is_not_taken_for_a_plain_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 4,')
    with pytest.raises(ModelError, match="not readable as JSON"):
        gptq.read_config({}, tmp_path)


# --- CUDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS[:9], ids=str)
def test_cuda_multiplies_like_the_exact_weight(layout: Mapping[str, Any]) -> None:
    tensors, config, weight = made(**layout)
    linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device="cuda")
    for rows in (1, 200):
        x = torch.randn(rows, weight.shape[1]).bfloat16()
        exact = F.linear(x.float(), weight, tensors["bias"].float())
        assert relative(linear(x.cuda()).cpu(), exact) < 6e-3


def secret_pack(q_NK: Tensor, tiles: int, order: Tensor) -> Tensor:
    """A layout like tinygemm's on CUDA: tiles of 8 outputs, their codes in an order that only the packer knows."""
    num, inputs = q_NK.shape
    blocks = q_NK.view(num // 8, 8, inputs // (16 * tiles), 16 * tiles).transpose(1, 2).flatten(2)
    nibbles = blocks[:, :, order].long().view(num // 8, inputs // (16 * tiles), 32, tiles // 2, 8)
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_the_layout_of_packed_tiles_is_found_out(tiles: int) -> None:
    draw = torch.Generator().manual_seed(tiles)
    order = torch.randperm(8 * 16 * tiles, generator=draw)
    learnt = kernels.learn_order(lambda q: secret_pack(q, tiles, order), 16 * tiles)
    q_NK = torch.randint(0, 16, (40, 48 * tiles), generator=draw)
    assert torch.equal(kernels.unpack_tiles(secret_pack(q_NK, tiles, order), learnt).t(), q_NK.to(torch.uint8))


@pytest.mark.parametrize(("dense_s", "limit"), [(0.0, 8), (1.6e-3, 16), (64e-4, 64), (1.0, None)])
def test_the_rows_of_the_packed_kernel_follow_the_measurement(dense_s: float, limit: int | None) -> None:
    found = kernels.crossover(lambda is_dense, rows: dense_s if is_dense else rows * 1e-4)
    assert found == limit


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_read_as_bytes_are_those_read_as_words(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (96, 40), generator=torch.Generator().manual_seed(bits))
    packed = gptq.pack_rows(values, bits)
    assert torch.equal(gptq.unpack_bytes(packed, bits), values.t().to(torch.uint8))
    assert torch.equal(gptq.unpack_bytes(packed[:, 8:24], bits), values[:, 8:24].t().to(torch.uint8))  # a view


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_packing_takes_little_more_memory_than_the_codes(bits: int, desc_act: bool) -> None:
    """As bytes: int32 of each code, and copies of that, were 12 and 28 times as large."""
    config = gptq.GptqConfig(bits=bits, desc_act=desc_act)
    tensors = gptq.random_tensors((2048, 2048), config, has_bias=False, generator=torch.Generator().manual_seed(0))
    gptq.build_linear(tensors, config, dtype=torch.bfloat16, device="cpu")  # what is made once
    with CountedBytes("cpu") as counted:
        linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device="cpu")
    if not isinstance(linear, kernels.PackedLinear):
        pytest.skip("this CPU has no packed kernel")
    held = linear.packed.nbytes + linear.scale_zero.nbytes
    assert counted.peak < held + (1 + 5 * bits // 4) * 2048 * 2048


def test_large_random_codes_are_drawn_in_a_moment_and_no_two_rows_are_alike() -> None:
    config = gptq.GptqConfig(bits=4)
    tensors = gptq.random_tensors((4096, 4096), config, has_bias=False, generator=torch.Generator().manual_seed(0))
    words = tensors["qweight"]
    assert words.shape == (512, 4096)
    assert len(words.unique(dim=0)) == 512
    assert len(words.t()[:512].unique(dim=0)) == 512
