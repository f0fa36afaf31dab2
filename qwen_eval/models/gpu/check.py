"""Each kernel against its plain twin on the device that is to run it: one that is off, or does not run, is not used."""

# N tokens, H query heads, K key-value heads, D head channels, S keys

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwen_eval.models import fused
from qwen_eval.models.attention import partial
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.gpu import block
from qwen_eval.models.gpu.attention import Keys, attend
from qwen_eval.models.gpu.vector import BLOCKS, vector_product
from qwen_eval.models.kv_quant import dequantize, quantize_per_token

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of values of about 1
NUM_KEYS = 300

Draw = Callable[..., Tensor]
Pair = tuple[str, Tensor, Tensor]  # a kernel, what it gives, what its twin gives


@torch.inference_mode()
def flaw(device: torch.device, dtype: torch.dtype, config: ModelConfig, *, is_int8: bool) -> str | None:
    """Why Triton's kernels are not used for a model and cache like this, in a line; None where all are right."""
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    try:
        for name, found, wanted in _pairs(draw, config, is_int8):
            difference = float((found.float() - wanted.float()).abs().max())
            if not difference <= TOLERANCE[dtype] * max(1.0, float(wanted.float().abs().max())):
                return f"{name} is off by {difference:.2g}"
    except Exception as error:  # a compiler's, a driver's: each has classes of its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None


def _pairs(draw: Draw, config: ModelConfig, is_int8: bool) -> Iterator[Pair]:
    x, delta, weight = draw(3, config.hidden_size), draw(3, config.hidden_size), draw(config.hidden_size)
    yield "rms_norm", block.rms_norm(x, weight, 1e-6), _twin(fused.rms_norm)(x, weight, 1e-6)
    pairs = zip(block.add_rms_norm(x, delta, weight, 1e-6), _twin(fused.add_rms_norm)(x, delta, weight, 1e-6))
    yield from (("add_rms_norm", found, wanted) for found, wanted in pairs)
    yield "silu_product", block.silu_product(x.clone(), delta), _twin(fused.silu_product)(x.clone(), delta)
    parts = draw(3, 2, 24), draw(3, 2).float(), draw(3, 2, 24), draw(3, 2).float()
    yield "joined", block.joined(*parts), _twin(fused.joined)(*parts)
    wide = draw(7, config.hidden_size)
    for size in BLOCKS:
        yield "vector_product", vector_product(x[:1], wide, None, size), x[:1] @ wide.T
    yield from _kept(draw, config, is_int8)
    for is_shared in (False, True):
        yield _attended(draw, config, is_int8, is_shared)


def _kept(draw: Draw, config: ModelConfig, is_int8: bool) -> Iterator[Pair]:
    """What two tokens write to a cache, as values, and their queries."""
    heads, kv_heads, dim, half = config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim // 2
    cos, sin, logn = draw(2, half).float(), draw(2, half).float(), draw(2, 1)[:, 0].float()
    qkv = draw(2, heads + 2 * kv_heads, dim)
    q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
    turn = _twin(fused.turn)
    at = torch.tensor([1, 3], device=qkv.device)
    yield "turn", block.turn(q, cos, sin, logn), turn(q, cos, sin, logn)
    caches = [_stored(draw(2, kv_heads, 5, dim), is_int8) for _ in range(2)]
    yield "turn_and_keep", block.turn_and_keep(qkv, cos, sin, logn, None, at, *caches), turn(q, cos, sin, logn)
    rows = torch.arange(2, device=qkv.device)
    for cache, x in zip(caches, (turn(k, cos, sin), v)):
        yield "turn_and_keep", _read(cache)[rows, :, at], _read(_stored(x.unsqueeze(2), is_int8))[:, :, 0]


def _attended(draw: Draw, config: ModelConfig, is_int8: bool, is_shared: bool) -> Pair:
    """Two rows, one of them with a single key."""
    q, (k, v) = draw(2, config.num_heads, config.head_dim), (
        _stored(draw(2, config.num_kv_heads, NUM_KEYS, config.head_dim), is_int8) for _ in range(2)
    )  # fmt: skip
    place = torch.tensor([1, 1] if is_shared else [1, 0], device=q.device)
    first, end = torch.tensor([0, 2], device=q.device), torch.tensor([NUM_KEYS, 3], device=q.device)
    keys = Keys(k=k, v=v, place_B=place, first_B=first, end_B=end, num_keys=NUM_KEYS, is_shared=is_shared)
    steps = torch.arange(NUM_KEYS, device=q.device)
    mask = ((steps >= first[:, None]) & (steps < end[:, None]))[:, None, None]
    wanted, _ = partial(q.unsqueeze(2), _read(k)[place], _read(v)[place], mask=mask, kernel="eager")
    return "attend", attend(q, [keys])[0], wanted[:, :, 0]


def _stored(x: Tensor, is_int8: bool) -> tuple[Tensor, ...]:
    return quantize_per_token(x) if is_int8 else (x,)


def _read(stored: tuple[Tensor, ...]) -> Tensor:
    return dequantize(*stored) if len(stored) == 3 else stored[0]


def _twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """The plain code of a function that has a kernel."""
    twin: Callable[..., Any] = function.__wrapped__  # type: ignore[attr-defined]
    return twin
