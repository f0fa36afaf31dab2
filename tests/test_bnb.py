"""NF4 and LLM.int8 on the CPU: error, size, outliers and dtype."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoint import write_tiny_qwen2
from torch import Tensor

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ChoiceLogprobs, Choose, EngineError, Prompt
from qwen_eval.engines.hf.engine import open_engine as open_hf
from qwen_eval.models.quant import bnb, kernels
from qwen_eval.models.quant.formats import quant_format

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("bitsandbytes")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


def layer() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(128, 256) * 0.02, torch.randn(128) * 0.02, torch.randn(2, 5, 256)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("quant", "least", "most", "size"), [("nf4", 0.05, 0.12, 0.29), ("int8", 1e-3, 0.02, 0.52)])
def test_error_and_size_are_those_of_the_format(
    quant: bnb.Quant, least: float, most: float, size: float, dtype: torch.dtype, device: str
) -> None:
    weight, bias, x = layer()
    linear = bnb.build_linear(weight, bias, quant, dtype=dtype, device=device)
    y = linear(x.to(device, dtype))
    assert y.dtype == dtype
    assert least < relative(y, F.linear(x, weight, bias)) < most, "less than the least means: not quantized at all"
    report = kernels.report(torch.nn.Sequential(linear).modules())
    assert 0 < report.weight_bytes <= size * report.bf16_bytes
    assert report.fallback is None
    assert next(iter(report.kernels)).startswith("bitsandbytes ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_no_rows_give_no_rows(quant: bnb.Quant, dtype: torch.dtype, device: str) -> None:
    """A prefill whose hidden states nobody wants ends in a product of no rows; NF4's fused kernel dies of it."""
    weight, bias, _ = layer()
    y = bnb.build_linear(weight, bias, quant, dtype=dtype, device=device)(torch.empty(0, 256, dtype=dtype).to(device))
    assert (y.shape, y.dtype) == ((0, 128), dtype)


@pytest.mark.parametrize("outputs", [128, 100])
def test_nf4_in_fp32_computes_in_fp32(outputs: int, device: str) -> None:
    """The library's fused kernel of AVX512-BF16 CPUs would round inputs and scales to bf16: 0.3 % off."""
    weight, _, x = layer()
    linear = bnb.build_linear(weight[:outputs], None, "nf4", dtype=torch.float32, device=device)
    stored = linear.inner.weight
    exact = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(stored.data, stored.quant_state)
    assert relative(linear(x.to(device)), F.linear(x, exact.float().cpu())) < 1e-5


def test_nf4_in_fp32_computes_in_fp32_in_models_of_transformers_too(tmp_path: Path) -> None:
    """The same kernel would be taken there at the first forward."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    folder = write_tiny_qwen2(tmp_path / "checkpoint")
    spec = ModelSpec(name="m", path=str(folder), dtype="fp32", device="cpu", quant="nf4")
    engine = open_hf(EngineSpec(), spec)
    asked = Choose(prompt=Prompt.raw("Question: 1 + 1\nAnswer:"), choices=("A", "B", "C", "D"))
    [(_, answer)] = engine.run([asked])
    assert isinstance(answer, ChoiceLogprobs)
    settings = transformers.BitsAndBytesConfig(**quant_format("nf4").transformers)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    ).dequantize()
    ids, letters = engine.render(asked.prompt).ids, [engine.tokenizer.encode(letter)[0] for letter in asked.choices]
    with torch.inference_mode():
        logits = plain.float()(torch.tensor([ids])).logits[0, -1, letters]
    assert answer.logits == pytest.approx(logits.tolist(), abs=1e-4)  # in bf16: 0.02 and more


def test_int8_keeps_outlying_input_columns_in_full(device: str) -> None:
    weight, _, x = layer()
    x[..., 7] = 80.0
    y = bnb.build_linear(weight, None, "int8", dtype=torch.float32, device=device)(x.to(device))
    assert relative(y, F.linear(x, weight)) < 0.02  # with the outlier in the int8 range: 0.1


def test_the_given_weight_is_left_as_it_is(device: str) -> None:
    weight, bias, _ = layer()
    before = weight.clone()
    bnb.build_linear(weight, bias, "int8", dtype=torch.float32, device=device)
    assert torch.equal(weight, before)


def test_without_bitsandbytes_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    weight, bias, _ = layer()
    with pytest.raises(EngineError, match=r"pip install qwen_eval\[bnb\]"):
        bnb.build_linear(weight, bias, "nf4", dtype=torch.float32, device="cpu")
