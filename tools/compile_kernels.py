"""Compile every Triton kernel for real GPUs on a machine that has none, with the shapes of Qwen models.

Needs the triton package, whose wheel brings the assembler. Prints registers, spilled bytes and shared memory of each
kernel; a kernel that does not compile, or spills, ends it with 1. What kernels compute is tested in the interpreter of
Triton (tests/test_gpu_kernels.py); this shows that the same code is one for the device.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from qwen_eval.models.fused import Norm
from qwen_eval.models.gpu import block
from qwen_eval.models.gpu.attention import Keys, attend
from qwen_eval.models.gpu.vector import BLOCKS, vector_product

MAX_SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a program may ask for
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model: E, H, K, D."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    has_norms: bool = False


SHAPES = {
    "qwen-7b": Shape(hidden=4096, heads=32, kv_heads=32, dim=128),
    "qwen-72b": Shape(hidden=8192, heads=64, kv_heads=64, dim=128),
    "qwen2.5-7b": Shape(hidden=3584, heads=28, kv_heads=4, dim=128),
    "qwen2.5-0.5b": Shape(hidden=896, heads=14, kv_heads=2, dim=64),
    "qwen3-8b": Shape(hidden=4096, heads=32, kv_heads=8, dim=128, has_norms=True),
}


@dataclass
class NoDevice:
    """What Triton asks of a driver before it launches anything."""

    target: GPUTarget
    compiled: list[tuple[str, Any]] = field(default_factory=list)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def launch(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        """In place of a launch: compile for these arguments."""

        def compile_only(*args: Any, **kwargs: Any) -> None:
            made = kernel.warmup(*args, grid=grid, **kwargs)
            if all(made is not known for _, known in self.compiled):
                self.compiled.append((kernel.fn.__name__, made))

        return compile_only


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def launches(shape: Shape, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Every kernel as the engine calls it."""
    x, weight = draw(2, shape.hidden, dtype=dtype), draw(shape.hidden, dtype=dtype)
    yield lambda: block.rms_norm(x, weight, 1e-6)
    yield lambda: block.add_rms_norm(x, x, weight, 1e-6)
    yield lambda: block.silu_product(x, x)
    part, lse = draw(2, shape.heads, shape.dim, dtype=dtype), draw(2, shape.heads, dtype=torch.float32)
    yield lambda: block.joined(part, lse, part, lse)
    wide = draw(64, shape.hidden, dtype=dtype)
    for size in BLOCKS:
        for bias in (None, wide[:, 0].contiguous()):
            yield lambda size=size, bias=bias: vector_product(x[:1], wide, bias, size)  # type: ignore[misc]
    norm = Norm(draw(shape.dim, dtype=dtype), 1e-6) if shape.has_norms else None
    cos = draw(2, shape.dim // 2, dtype=torch.float32)
    rows = torch.zeros(2, dtype=torch.long)
    for logn in (None, draw(2, dtype=torch.float32)):
        qkv = draw(2, shape.heads + 2 * shape.kv_heads, shape.dim, dtype=dtype)
        yield lambda qkv=qkv, logn=logn: block.turn(qkv, cos, cos, logn, norm)  # type: ignore[misc]
        for cache in caches(shape, dtype):
            given = (qkv, cos, cos, logn, norm and (norm, norm), rows, cache, cache)
            yield lambda given=given: block.turn_and_keep(*given)  # type: ignore[misc]
    yield lambda: block.quantize(draw(1, shape.kv_heads, 4, shape.dim, dtype=dtype))
    for batch in (1, 7, 64):
        place, q = torch.zeros(batch, dtype=torch.long), draw(batch, shape.heads, shape.dim, dtype=dtype)
        for cache in caches(shape, dtype):
            for is_shared in (False, True):
                spans = {"place_B": place, "first_B": place, "end_B": place}
                keys = Keys(k=cache, v=cache, **spans, num_keys=64 * batch, is_shared=is_shared)
                yield lambda q=q, keys=keys: attend(q, [keys])  # type: ignore[misc]


def caches(shape: Shape, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    size = (2, shape.kv_heads, 8)
    codes = torch.zeros((*size, shape.dim), dtype=torch.uint8)
    return [(draw(*size, shape.dim, dtype=dtype),), (codes, draw(*size, 1, dtype=dtype), draw(*size, 1, dtype=dtype))]


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED ... as the assembler counted them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}


def compile_all(target: int, names: list[str], dtypes: list[torch.dtype]) -> bool:
    driver = NoDevice(GPUTarget("cuda", target, 32))
    triton.runtime.driver.set_active(driver)
    JITFunction.__getitem__ = lambda self, grid: driver.launch(self, grid)  # type: ignore[method-assign]
    is_good = True
    for name in names:
        for dtype in dtypes:
            driver.compiled.clear()
            for launch in launches(SHAPES[name], dtype):
                launch()
            for kernel, made in driver.compiled:
                used = usage(made.asm["cubin"])
                fits = used["STACK"] == 0 and made.metadata.shared <= MAX_SHARED[target]
                is_good &= fits
                print(
                    f"sm_{target}  {name:13} {str(dtype)[6:]:9} {kernel:16} {used['REG']:4} registers "
                    f"{used['STACK']:5} bytes spilled {made.metadata.shared:7} bytes shared{'' if fits else '  <-- '}"
                )
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default="80,90", help="compute capabilities: 80 is A100, 86 A10 and 3090, 90 H100")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    given = parser.parse_args()
    dtypes = [getattr(torch, name) for name in given.dtypes.split(",")]
    targets = [int(target) for target in given.targets.split(",")]
    good = [compile_all(target, given.models.split(","), dtypes) for target in targets]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
