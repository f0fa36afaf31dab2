"""The int8 cache quantizer: upstream's bit for bit, and ours better by numbers and free of the chunking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_eval.models import kv_quant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def keys_with_outliers(dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys as a Qwen prompt has them: some channels with a large offset, and a first token that is far out."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 64, 32)
    x[..., 5] += 20
    x[:, :, 0] *= 30
    return x.to(dtype)


def rms_error(quantized: kv_quant.Quantized, x: Tensor) -> float:
    return float((kv_quant.dequantize(*quantized).float() - x.float()).square().mean().sqrt())


def test_upstreams_quantizer_is_met_bit_for_bit(golden: Path) -> None:
    path = golden / "model" / "kvq_unit.safetensors"
    if not path.is_file():
        pytest.skip(f"{path}: not recorded")
    recorded = load_file(path)
    cases = sorted(key.removesuffix(".x") for key in recorded if key.endswith(".x"))
    assert cases
    for case in cases:
        got = kv_quant.quantize_upstream(recorded[f"{case}.x"])
        assert torch.equal(got.codes, recorded[f"{case}.q"]), case
        assert torch.equal(got.scale, recorded[f"{case}.scale"]), case
        assert torch.equal(got.zero, recorded[f"{case}.zero"]), case
        assert torch.equal(kv_quant.dequantize(*got), recorded[f"{case}.dequant"]), case


def test_upstreams_codes_depend_on_the_chunk_and_ours_do_not() -> None:
    x = keys_with_outliers()
    for quantize, is_same in ((kv_quant.quantize_upstream, False), (kv_quant.quantize_per_token, True)):
        whole, parts = quantize(x).codes, [quantize(part).codes for part in x.split([1, 40, 23], dim=2)]
        assert torch.equal(whole, torch.cat(parts, 2)) == is_same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_no_value_of_ours_is_off_by_more_than_half_a_step(dtype: torch.dtype, offset: float) -> None:
    x = (keys_with_outliers() + offset).to(dtype)
    got = kv_quant.quantize_per_token(x)
    values = got.scale.double() * (got.codes.double() - got.zero.double())
    assert ((values - x.double()).abs() <= 0.5001 * got.scale.double()).all()
    assert got.zero.float().frac().eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_chunk_is_nan_upstream_and_close_in_ours(dtype: torch.dtype) -> None:
    for constant in (0.0, 3.25, -1e-3):
        x = torch.full((1, 1, 2, 8), constant, dtype=dtype)
        assert kv_quant.dequantize(*kv_quant.quantize_upstream(x)).isnan().all()
        ours = kv_quant.dequantize(*kv_quant.quantize_per_token(x))
        assert torch.allclose(ours.float(), x.float(), rtol=2.0**-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ours_is_several_times_closer_on_a_prompt_and_never_further(dtype: torch.dtype) -> None:
    outliers, plain = keys_with_outliers(dtype), torch.randn(2, 4, 64, 32).to(dtype)
    for x, factor in ((outliers, 2.0), (plain, 1.3)):
        ours, theirs = rms_error(kv_quant.quantize_per_token(x), x), rms_error(kv_quant.quantize_upstream(x), x)
        assert ours * factor < theirs, f"{ours} against {theirs}"


def test_truncation_biases_upstreams_values_and_rounding_does_not_ours() -> None:
    x = torch.rand(1, 1, 1, 4096) - 0.5
    bias = {
        q: float((kv_quant.dequantize(*q(x)) - x).mean() * 255)
        for q in (kv_quant.quantize_upstream, kv_quant.quantize_per_token)
    }
    assert bias[kv_quant.quantize_upstream] == pytest.approx(-0.5, abs=0.05)
    assert bias[kv_quant.quantize_per_token] == pytest.approx(0.0, abs=0.05)


def test_a_token_takes_half_of_bf16_plus_its_scales() -> None:
    x = torch.randn(1, 2, 3, 128).bfloat16()
    for quantize in (kv_quant.quantize_upstream, kv_quant.quantize_per_token):
        assert sum(part.nbytes for part in quantize(x)) == x.nbytes // 2 + 2 * 2 * (2 * 3)
