"""The Triton decode kernel against its plain twin, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the triton package is not installed")

from test_native_engine import CONFIG, TOKENIZER, TRICKS, answers, generations, model_of

from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.models.attention import partial
from qwen_eval.models.kv_cache import Int8Codec, KvCodec, PlainCodec
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.triton_decode import attend_own, attend_rows, why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_equals_its_twin(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, is_int8: bool, window: int | None
) -> None:
    draw, keys = torch.Generator().manual_seed(heads), 1100
    own = torch.tensor([0, 63, 64, 700, keys - 1], device=DEVICE)
    codec: KvCodec = Int8Codec(upstream=False) if is_int8 else PlainCodec(dtype)
    q = torch.randn(len(own), heads, dim, generator=draw).to(DEVICE, dtype)
    whole = torch.randn(2, 8, kv_heads, keys, dim, generator=draw).to(DEVICE, dtype)
    stored = [tuple(t[: len(own)] for t in codec.encode(part)) for part in whole]
    steps = torch.arange(keys, device=DEVICE)
    mask = steps <= own[:, None]
    if window is not None:
        mask &= steps > own[:, None] - window
    k, v = (codec.decode(part, dtype) for part in stored)
    wanted, wanted_lse = partial(q.unsqueeze(2), k, v, mask=mask[:, None, None, :], kernel="eager")
    found, lse = attend_own(q, stored[0], stored[1], own, keys, window)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found.float() - wanted[:, :, 0].float()).abs().max() <= tolerance
    assert (lse - wanted_lse[:, :, 0]).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
def test_rows_read_the_place_that_they_name(is_int8: bool) -> None:
    """Several rows of one place, a place that no row reads, and a row that sees no key at all."""
    draw, keys, heads, dim = torch.Generator().manual_seed(3), 600, 4, 16
    codec: KvCodec = Int8Codec(upstream=False) if is_int8 else PlainCodec(torch.float32)
    place, first, end = (torch.tensor(x, device=DEVICE) for x in ([2, 0, 2, 1], [0, 5, 550, 0], [600, 70, 600, 0]))
    q = torch.randn(4, heads, dim, generator=draw).to(DEVICE)
    k, v = (codec.encode(part.to(DEVICE)) for part in torch.randn(2, 3, 2, keys, dim, generator=draw))
    steps = torch.arange(keys, device=DEVICE)
    mask = (steps >= first[:, None]) & (steps < end[:, None])
    plain = (codec.decode(tuple(t[place] for t in part), torch.float32) for part in (k, v))
    wanted, wanted_lse = partial(q.unsqueeze(2), *plain, mask=mask[:, None, None, :], kernel="eager")
    found, lse = attend_rows(q, k, v, place, first, end, keys)
    assert (found - wanted[:, :, 0]).abs().max() <= 1e-5
    assert torch.allclose(lse, wanted_lse[:, :, 0], atol=1e-5)
    assert found[3].abs().max() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this model is on the CPU: for the interpreter")
@pytest.mark.parametrize("trick", ["all", "windows"])
def test_texts_decoded_by_the_kernel_are_those_of_its_twin(trick: str) -> None:
    model = model_of(replace(CONFIG, **TRICKS[trick]))
    requests = [replace(g, max_new_tokens=5) for g in generations(5)]
    plain = answers(NativeEngine(ModelRunner(model), TOKENIZER), requests)
    for is_pooled in (False, True):
        runner = ModelRunner(model, decode_kernel="triton")
        runner.decoding = functools.partial(runner.decoding, is_pooled=is_pooled)  # type: ignore[method-assign]
        assert answers(NativeEngine(runner, TOKENIZER), requests) == plain


def test_the_kernel_is_tried_before_it_is_used() -> None:
    assert why_not(DEVICE, torch.float32, heads=4, kv_heads=2, dim=16) is None
    assert "float64" in str(why_not(DEVICE, torch.float64, heads=4, kv_heads=2, dim=16))
