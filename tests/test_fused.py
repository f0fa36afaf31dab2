"""The small functions of the block give the same numbers compiled and as written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_eval.core import ConfigError
from qwen_eval.models import fused

DTYPES = [torch.float32, torch.bfloat16]


def inputs(name: str, dtype: torch.dtype, rows: int) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(rows)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(kind)

    angles = normal(rows, 8, kind=torch.float32)
    return {
        "rms_norm": (normal(rows, 48), normal(48), 1e-6),
        "rotate": (normal(rows, 3, 24), angles.cos(), angles.sin()),
        "stretch": (normal(rows, 3, 24), normal(rows, kind=torch.float32).abs()),
        "silu_product": (normal(rows, 40), normal(rows, 40)),
    }[name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "rotate", "stretch", "silu_product"])
def test_the_whole_function_is_one_graph_with_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    written: Callable[..., Tensor] = getattr(fused, name).__wrapped__
    compiled = torch.compile(written, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (1, 5, 9):
        wanted = written(*(x.clone() if isinstance(x, Tensor) else x for x in inputs(name, dtype, rows)))
        assert torch.equal(compiled(*inputs(name, dtype, rows)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm", "silu_product"])
def test_the_compiler_keeps_the_rounding_of_bf16(name: str) -> None:
    written = getattr(fused, name).__wrapped__
    compiled = torch.compile(written, dynamic=True, fullgraph=True, options=fused.OPTIONS)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        found, wanted = (f(*inputs(name, dtype, 33)).float() for f in (compiled, written))
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
        assert dtype == torch.float32 or (found == wanted).float().mean() > 0.99


def test_a_cpu_runs_them_as_written_and_says_so() -> None:
    assert fused.name(torch.device("cpu")) == "plain"
    if not fused.can_compile():
        with pytest.raises(ConfigError, match=r"engine.kernels=triton needs CUDA"):
            fused.choose("triton")
