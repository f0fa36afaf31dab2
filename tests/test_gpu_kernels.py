"""Triton's kernels against their plain twins: in its interpreter where there is no GPU.

The interpreter cuts off what bf16 cannot hold instead of rounding, and has no bf16 products. FP16 is rounded there as
on a GPU: it shows that a kernel rounds where its twin does. tools/compile_kernels.py shows that they compile for GPUs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the triton package is not installed")

from test_native_engine import CONFIG, TOKENIZER, TRICKS, answers, model_of

from qwen_eval.core import Choose, Generate, Prompt
from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.models import fused
from qwen_eval.models.attention import partial
from qwen_eval.models.checkpoint import Placement, random_model
from qwen_eval.models.decode import COARSE, RunningRow
from qwen_eval.models.dense import Linear
from qwen_eval.models.fused import Norm
from qwen_eval.models.gpu import block
from qwen_eval.models.gpu.attention import Keys, _join, attend
from qwen_eval.models.gpu.check import flaw
from qwen_eval.models.gpu.measure import choose_vector_kernels, fastest_block
from qwen_eval.models.gpu.vector import BLOCKS, vector_product
from qwen_eval.models.heads import Heads
from qwen_eval.models.kv_cache import Int8Codec, KvCodec, PlainCodec
from qwen_eval.models.kv_quant import dequantize
from qwen_eval.models.rope import Rotation
from qwen_eval.models.runner import ModelRunner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
# FP32: what another order of a sum changes. Below: half a step of values of about 4, which a sum may round across
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Draw:
    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype or self.dtype)


def twin(function: Any) -> Any:
    return function.__wrapped__


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.allclose(found.float(), wanted.float(), rtol=CLOSE[found.dtype], atol=CLOSE[found.dtype])


@pytest.fixture
def kernels() -> Iterator[None]:
    fused.choose("triton")
    yield
    fused.choose("auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (5, 130), (0, 48), (3, 4, 24)], ids=str)
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw, size = Draw(dtype), shape[-1]
    x, weight = draw(*shape), draw(size)
    assert_close(block.rms_norm(x, weight, 1e-6), twin(fused.rms_norm)(x, weight, 1e-6))
    if len(shape) == 2:
        delta = draw(*shape)
        total, normed = block.add_rms_norm(x, delta, weight, 1e-6)
        assert torch.equal(total, x + delta)
        assert_close(normed, twin(fused.rms_norm)(x + delta, weight, 1e-6))
    else:  # heads, as a part of a wider tensor
        wide = draw(shape[0], 9, size)
        assert_close(block.rms_norm(wide[:, 2:6], weight, 1e-5), twin(fused.rms_norm)(wide[:, 2:6], weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (7, 1000), (0, 8)], ids=str)
def test_silu_product(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw = Draw(dtype)
    gate, up = draw(*shape) * 4, draw(*shape)
    assert_close(block.silu_product(gate.clone(), up), twin(fused.silu_product)(gate.clone(), up))


def heads_of(draw: Draw, size: tuple[int, int, int], half: int, tokens: int = 4, *, extras: str = "") -> Heads:
    heads, kv_heads, dim = size
    angles = draw(tokens, half, dtype=torch.float32)
    logn = draw(tokens, dtype=torch.float32).abs() + 0.5 if "logn" in extras else None
    norms = (Norm(draw(dim), 1e-6), Norm(draw(dim), 1e-6)) if "norms" in extras else None
    return Heads(
        qkv_NHD=draw(tokens, heads + 2 * kv_heads, dim),
        num_queries=heads,
        num_keys=kv_heads,
        rotation=Rotation(cos=angles.cos(), sin=angles.sin(), logn=logn),
        norms=norms,
    )


SIZES = [((4, 4, 16), 8), ((6, 2, 24), 8), ((6, 2, 24), 12)]  # heads, and half of the channels that turn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "half"), SIZES, ids=str)
@pytest.mark.parametrize("extras", ["", "logn", "norms", "logn norms"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
def test_heads_are_turned_and_kept(
    dtype: torch.dtype, size: tuple[int, int, int], half: int, extras: str, is_int8: bool
) -> None:
    """In places that are part of a longer cache; what lies beside them stays as it was."""
    draw = Draw(dtype)
    heads = heads_of(draw, size, half, extras=extras)
    q, k, v = heads.turned()
    codec: KvCodec = Int8Codec(upstream=False) if is_int8 else PlainCodec(dtype)
    at = torch.tensor([5, 0, 8, 2], device=DEVICE)
    caches = [codec.encode(draw(6, size[1], 9, size[2])) for _ in range(2)]
    before = [tuple(t.clone() for t in cache) for cache in caches]
    turns = heads.rotation
    found = block.turn_and_keep(heads.qkv_NHD, turns.cos, turns.sin, turns.logn, heads.norms, at, *caches)
    assert_close(found, q)
    places = torch.arange(4, device=DEVICE), slice(None), at
    for cache, old, x in zip(caches, before, (k, v)):
        wanted = codec.encode(x.unsqueeze(2))
        for mine, other, was in zip(cache, wanted, old):
            changed = mine.clone()
            changed[places] = was[places]
            assert torch.equal(changed, was)
            if mine.dtype == torch.uint8:  # another order of a norm's sum may move a value over the edge of a code
                assert (mine[places].int() - other[:, :, 0].int()).abs().max() <= (1 if "norms" in extras else 0)
            else:
                assert_close(mine[places], other[:, :, 0])
    assert_close(block.turn(heads.qkv_NHD[:, : size[0]], *rotation_of(heads)), q)


def rotation_of(heads: Heads) -> tuple[Any, ...]:
    rotation = heads.rotation
    return rotation.cos, rotation.sin, rotation.logn, heads.norms[0] if heads.norms else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_parts_are_joined(dtype: torch.dtype) -> None:
    """As they come from a padded batch, and where one of them saw no key."""
    draw = Draw(dtype)
    a, b = draw(2, 5, 24).transpose(0, 1), draw(5, 2, 24)
    lse_a, lse_b = draw(2, 5, dtype=torch.float32).T * 3, draw(5, 2, dtype=torch.float32) * 3
    lse_a[0, 0], lse_b[1, 1] = -torch.inf, -torch.inf
    assert_close(block.joined(a, lse_a, b, lse_b), twin(fused.joined)(a, lse_a, b, lse_b))
    assert torch.equal(block.joined(a, lse_a, b, lse_b)[0, 0], b[0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_the_int8_cache_are_those_of_its_twin(dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    for x in (draw(1, 3, 50, 24), draw(50, 3, 24).transpose(0, 1)[None], draw(2, 1, 3, 16) * 1e-3):
        x[0, 0, 0], x[0, 0, 1] = 0, 3  # a constant has codes too
        for mine, wanted in zip(block.quantize(x), twin(fused.quantize)(x)):
            assert torch.equal(mine, wanted)
    assert block.quantize(draw(1, 3, 0, 24)).codes.shape == (1, 3, 0, 24)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("size", [(4, 4, 16), (6, 2, 24), (2, 2, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_over_own_keys(
    dtype: torch.dtype, size: tuple[int, int, int], is_int8: bool, window: int | None
) -> None:
    (heads, kv_heads, dim), keys = size, 330
    draw = Draw(dtype, seed=heads)
    end = torch.tensor([1, 64, 65, 201, keys], device=DEVICE)
    first = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
    codec: KvCodec = Int8Codec(upstream=False) if is_int8 else PlainCodec(dtype)
    q, place = draw(5, heads, dim), torch.arange(5, device=DEVICE)
    k, v = (tuple(t[:5] for t in codec.encode(draw(8, kv_heads, keys, dim))) for _ in range(2))
    source = Keys(k=k, v=v, place_B=place, first_B=first, end_B=end, num_keys=keys)
    assert_attends(q, [source], codec)


@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("size", [(4, 4, 16), (6, 2, 24)], ids=str)
@pytest.mark.parametrize("is_shared", [False, True], ids=["many prefixes", "one prefix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_over_a_prefix_and_own_keys(
    dtype: torch.dtype, is_shared: bool, size: tuple[int, int, int], is_int8: bool
) -> None:
    """Rows of one place, a place that no row reads, a row that sees nothing of the prefix, one that sees nothing."""
    (heads, kv_heads, dim), draw, batch, keys = size, Draw(dtype), 9, 200
    codec: KvCodec = Int8Codec(upstream=False) if is_int8 else PlainCodec(dtype)
    pool, slots = ([codec.encode(draw(n, kv_heads, keys, dim)) for _ in range(2)] for n in (3, batch))
    rows = torch.arange(batch, device=DEVICE)
    place = torch.zeros_like(rows) if is_shared else rows % 2 * 2
    first, end = rows * 20, torch.full_like(rows, keys)
    first[3], end[3], end[4] = 0, 0, 5
    own = torch.where(rows == 4, 0, rows * 3 + 1)
    first[4] = 5
    sources = [
        Keys(k=pool[0], v=pool[1], place_B=place, first_B=first, end_B=end, num_keys=keys, is_shared=is_shared),
        Keys(k=slots[0], v=slots[1], place_B=rows, first_B=torch.zeros_like(rows), end_B=own, num_keys=64),
    ]
    found = assert_attends(draw(batch, heads, dim), sources, codec)
    assert found[4].abs().max() == 0


def assert_attends(q: Tensor, sources: list[Keys], codec: KvCodec) -> Tensor:
    """As one dense attention over all keys together."""
    keys, values, seen = [], [], []
    for source in sources:
        keys.append(codec.decode(tuple(t[source.place_B] for t in source.k), q.dtype))
        values.append(codec.decode(tuple(t[source.place_B] for t in source.v), q.dtype))
        steps = torch.arange(keys[-1].shape[2], device=DEVICE)
        seen.append((steps >= source.first_B[:, None]) & (steps < source.end_B[:, None]))
    mask = torch.cat(seen, 1)[:, None, None, :]
    wanted, wanted_lse = partial(q.unsqueeze(2), torch.cat(keys, 2), torch.cat(values, 2), mask=mask, kernel="eager")
    found, lse = attend(q, sources)
    assert_close(found, wanted[:, :, 0])
    assert torch.allclose(lse, wanted_lse[:, :, 0], atol=CLOSE[q.dtype])
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", BLOCKS, ids=str)
def test_the_product_of_one_row(dtype: torch.dtype, size: tuple[int, int]) -> None:
    draw = Draw(dtype)
    for num_outputs, num_inputs in ((37, 1100), (64, 48)):
        x, weight, bias = draw(1, num_inputs), draw(num_outputs, num_inputs) * num_inputs**-0.5, draw(num_outputs)
        for given in (None, bias):
            assert_close(vector_product(x, weight, given, size), F.linear(x, weight, given))


def test_one_row_takes_the_kernel_that_measured_faster() -> None:
    def seconds(product: Any, weights: Any) -> float:
        block = getattr(product, "keywords", {}).get("block")
        is_wide = weights[0].shape[0] == 64
        return {None: 1.0, BLOCKS[2]: 0.5 if is_wide else 0.99}.get(block, 2.0)

    wide, narrow = (Linear(48, n, bias=True).requires_grad_(False).to(DEVICE) for n in (64, 32))
    assert fastest_block([narrow.weight], seconds) is None  # not by more than noise
    counts = choose_vector_kernels([wide, narrow], seconds)
    assert counts == {"linear": 1, "linear, Triton for one row in blocks of [8, 512]": 1}
    for rows in (1, 3):
        x = Draw(torch.float32)(rows, 48)
        assert_close(wide(x), F.linear(x, wide.weight, wide.bias))


MODELS: dict[str, tuple[dict[str, Any], KvCodec | None, bool]] = {
    "tricks, prefix pooled": (TRICKS["all"], None, True),
    "windows, int8, prefix in place": (TRICKS["windows"], Int8Codec(upstream=False), False),
    "qk-norm, int8, prefix pooled": ({"qk_norm": True}, Int8Codec(upstream=False), True),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this model is on the CPU: for the interpreter")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("kernels")
def test_answers_of_a_model_in_kernels_are_those_of_its_twin(name: str) -> None:
    options, codec, is_pooled = MODELS[name]
    model = model_of(replace(CONFIG, **options))
    prompts = [Prompt.raw("a shared beginning of forty-odd tokens: " + tail) for tail in ("ab", "some more")]
    texts = [Generate(prompt=prompt, max_new_tokens=4) for prompt in prompts]
    letters = [Choose(prompt=prompt, choices=("A", "B", "C")) for prompt in prompts]
    fused.choose("plain")
    plain = NativeEngine(ModelRunner(model, codec=codec), TOKENIZER)
    wanted = answers(plain, texts), answers(plain, letters)
    fused.choose("triton")
    runner = ModelRunner(model, codec=codec)
    assert runner.decode_kernel == "triton"
    runner.decoding = functools.partial(runner.decoding, is_pooled=is_pooled)  # type: ignore[method-assign]
    engine = NativeEngine(runner, TOKENIZER)
    assert engine.info["small_kernels"] == "triton"
    assert answers(engine, texts) == wanted[0]
    for found, other in zip(answers(engine, letters), wanted[1]):
        assert found.logprobs == pytest.approx(other.logprobs, rel=1e-5, abs=1e-5)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that a GPU would launch a kernel for: all but views and memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def kernel(self, *_: Any, **__: Any) -> None:
        """In place of a launch of one of ours."""
        self.count += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not (is_view or func.__name__.startswith(("empty", "new_empty", "_unsafe_view", "detach")))
        return func(*args, **(kwargs or {}))


def _instead(kernel: Any, *_: Any) -> Any:
    return kernel


@pytest.mark.parametrize(("is_pooled", "most"), [(False, 11), (True, 12)], ids=["own keys", "prefix and own keys"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.usefixtures("kernels")
def test_a_layer_of_a_step_is_few_launches(
    is_pooled: bool, most: int, is_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norm, q k v, cache write, attention, o, norm, gate, up, SiLU, down; with split keys or a prefix joining."""
    counts = []
    for num_layers in (1, 2):
        fused.choose("plain")  # for what comes before the step
        runner = ModelRunner(
            model_of(replace(CONFIG, num_layers=num_layers)), codec=Int8Codec(upstream=False) if is_int8 else None
        )
        prefix = runner.grown(None, list(range(1, 30)), 40) if is_pooled else None
        slots = runner.slots(8, 300)
        runner.packed([[7, 8]] * 2, [31] * 2, prefixes=[prefix] * 2, last_only=True, sink=(slots, range(2)))
        decoding = runner.decoding(slots, prefill_lengths=[31], num_positions=300, buckets=COARSE, is_pooled=is_pooled)
        decoding.arrange([RunningRow(prefill_tokens=31, own_tokens=2, prefix=prefix)] * 2, [1, 2])
        fused.choose("triton")
        decoding.is_triton, launches = True, Launches()
        with monkeypatch.context() as patch, launches:
            patch.setattr(type(_join), "__getitem__", functools.partial(_instead, launches.kernel))
            decoding.step()
        counts.append(launches.count)
    assert counts[1] - counts[0] <= most


def test_kernels_are_tried_before_they_are_used() -> None:
    assert flaw(DEVICE, torch.float32, CONFIG, is_int8=True) is None
    assert "float64" in str(flaw(DEVICE, torch.float64, CONFIG, is_int8=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fault of the interpreter: products in bf16")
@pytest.mark.usefixtures("kernels")
def test_a_kernel_that_is_off_is_not_used_and_the_result_says_why() -> None:
    config = replace(CONFIG, num_kv_heads=2)
    placement = Placement(device=torch.device("cpu"), dtype=torch.bfloat16)
    runner = ModelRunner(random_model(config, placement, seed=0))
    assert runner.decode_kernel.startswith("plain (attend is off by ")
    assert fused.name(DEVICE, torch.bfloat16) == runner.decode_kernel


@pytest.mark.usefixtures("kernels")
def test_training_takes_no_kernel_since_none_has_gradients() -> None:
    x = Draw(torch.float32)(3, 48).requires_grad_()
    fused.rms_norm(x, torch.ones(48, device=DEVICE), 1e-6).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    with torch.inference_mode():
        assert fused.uses_triton(x)
    assert not fused.uses_triton(x)


def test_what_the_int8_cache_reads_is_what_the_kernels_wrote() -> None:
    x = Draw(torch.float32)(1, 2, 30, 16)
    assert (dequantize(*block.quantize(x)) - x).abs().max() <= float(x.max() - x.min()) / 254
