"""Unquantized Linears, multiplied by the kernel that measures best on this machine.

On a CPU a bf16 product has four ways: `linear`, a matrix-vector product for one row, oneDNN's prepacked weight, and the
same with one to three rows padded to four (its kernel for one row is slower than that for four on some processors).
Which is fastest depends on the processor and the shape, by up to a factor of 3.5, and no list of CPU features says it:
`prepare` measures each shape once, at load. Layers below `MEASURED_BYTES` are left alone, so small models always take
the same kernel and give the same numbers. On a GPU one row may go through a kernel of ours: gpu/measure.py chooses.
"""

# R rows, N outputs, K inputs

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_eval.models.cost import MEASURED_BYTES

Kernel: TypeAlias = Literal["linear", "linear, mv for one row", "oneDNN prepacked", "oneDNN prepacked, at least 4 rows"]
PLAIN: Kernel = "linear"
VECTOR: Kernel = "linear, mv for one row"
PREPACKED: Kernel = "oneDNN prepacked"
PADDED: Kernel = "oneDNN prepacked, at least 4 rows"
IS_PACKED = (PREPACKED, PADDED)

MIN_ROWS = 4  # of a padded product
ROWS = (1, 32)  # what is measured: decoding one sequence, and a small batch
MARGIN = 0.95  # another kernel than `linear` must be this much faster: noise must not choose
PASSES = 3
SAMPLE = 4  # layers of one shape measured in turn, so that a weight does not wait in the cache

# by outputs, inputs, threads, and whether there was room to pack
_measured: dict[tuple[int, int, int, bool], dict[Kernel, list[float]]] = {}


class Linear(nn.Linear):
    """[R,K] -> [R,N]. Once prepacked, the weight exists in oneDNN's layout only, unless it is kept for others."""

    kernel: Kernel = PLAIN
    packed: Tensor | None = None
    block: tuple[int, int] | None = None  # of Triton's kernel for one row, on a GPU where it is faster

    def forward(self, x_RK: Tensor) -> Tensor:
        if self.block is not None and len(x_RK) == 1:
            from qwen_eval.models.gpu.vector import vector_product

            return vector_product(x_RK, self.weight, self.bias, self.block)
        if self.packed is not None:
            product = _padded if self.kernel == PADDED else _prepacked
            return product(x_RK, self.packed, self.bias, self.out_features)
        if self.kernel == VECTOR and len(x_RK) == 1:
            return _vector(x_RK, self.weight, self.bias)
        return F.linear(x_RK, self.weight, self.bias)

    @property
    def kernel_name(self) -> str:
        """For the result."""
        return self.kernel if self.block is None else f"linear, Triton for one row in blocks of {list(self.block)}"

    def use(self, kernel: Kernel, *, keep_weight: bool = False) -> None:
        """Multiply by `kernel` from now on. A weight that is kept beside its packed copy takes its memory twice."""
        if kernel in IS_PACKED:
            self.packed = _pack(self.weight)
            if not keep_weight:
                del self.weight
        self.kernel = kernel


def prepare(
    modules: Iterable[nn.Module], *, keep_weight: Sequence[Linear] = (), spare_bytes: int = 0
) -> dict[str, int]:
    """Choose a kernel for every bf16 Linear on the CPU; returns the number of layers per kernel.

    `keep_weight`: Linears whose plain weight is read elsewhere too; a packed copy must fit into `spare_bytes`.
    """
    by_shape: dict[tuple[int, int, bool], list[Linear]] = defaultdict(list)
    for module in modules:
        if isinstance(module, Linear) and _has_choice(module.weight):
            is_kept = any(module is kept for kept in keep_weight)
            by_shape[module.out_features, module.in_features, is_kept].append(module)
    counts: dict[str, int] = defaultdict(int)
    for (*_, is_kept), linears in by_shape.items():
        for linear in linears:
            can_pack = not is_kept or linear.weight.nbytes <= spare_bytes
            linear.use(fastest(_times(linears, can_pack=can_pack)), keep_weight=is_kept)
            counts[linear.kernel] += 1
            if is_kept and linear.packed is not None:
                spare_bytes -= linear.weight.nbytes
    return dict(counts)


def fastest(times: Mapping[Kernel, Sequence[float]]) -> Kernel:
    """The kernel whose time relative to `linear`, as the geometric mean over `ROWS`, is least and below `MARGIN`."""
    relative = {
        kernel: math.prod(own / plain for own, plain in zip(seconds, times[PLAIN])) ** (1 / len(ROWS))
        for kernel, seconds in times.items()
    }
    best = min(relative, key=lambda kernel: relative[kernel])
    return best if relative[best] < MARGIN else PLAIN


def _has_choice(weight_NK: Tensor) -> bool:
    return weight_NK.device.type == "cpu" and weight_NK.dtype == torch.bfloat16 and weight_NK.nbytes >= MEASURED_BYTES


def _times(linears: Sequence[Linear], *, can_pack: bool) -> dict[Kernel, list[float]]:
    key = (linears[0].out_features, linears[0].in_features, torch.get_num_threads(), can_pack)
    if key not in _measured:  # not yet, so no weight of them is gone
        _measured[key] = measure([linear.weight for linear in linears[:SAMPLE]], can_pack=can_pack)
    return _measured[key]


@torch.inference_mode()
def measure(weights_NK: Sequence[Tensor], *, can_pack: bool = True) -> dict[Kernel, list[float]]:
    """Seconds of each kernel at each number of rows of `ROWS`, for weights of one shape. Packs them for a while."""
    num_outputs = len(weights_NK[0])
    plain = [_seconds(F.linear, weights_NK, weights_NK[0], rows) for rows in ROWS]
    vector = _seconds(lambda x, weight: _vector(x, weight, None), weights_NK, weights_NK[0], 1)
    times: dict[Kernel, list[float]] = {PLAIN: plain, VECTOR: [vector, *plain[1:]]}
    if can_pack and can_prepack():
        packed = [_pack(weight) for weight in weights_NK]
        product = functools.partial(_prepacked, bias_N=None, num_outputs=num_outputs)
        times[PREPACKED] = [_seconds(product, packed, weights_NK[0], rows) for rows in ROWS]
        padded = functools.partial(_padded, bias_N=None, num_outputs=num_outputs)
        times[PADDED] = [_seconds(padded, packed, weights_NK[0], 1), *times[PREPACKED][1:]]
    return times


def _seconds(
    product: Callable[[Tensor, Tensor], Tensor], weights: Sequence[Tensor], like_NK: Tensor, rows: int
) -> float:
    """The least of all single products: of a longer span, a busy machine would take a part."""
    x_RK = torch.ones(rows, like_NK.shape[1], dtype=like_NK.dtype)
    product(x_RK, weights[0])  # the first call sets the kernel up
    best = float("inf")
    for _ in range(PASSES):
        for weight in weights:
            start = time.perf_counter()
            product(x_RK, weight)
            best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def can_prepack() -> bool:
    """Whether this torch and this CPU have the prepacked bf16 product. Its operators are private: tried once."""
    try:
        weight = torch.eye(32, dtype=torch.bfloat16)
        found = _prepacked(weight[:2], _pack(weight), None, 32)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found, weight[:2])


def _pack(weight_NK: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), ROWS[-1])
    return packed


def _prepacked(x_RK: Tensor, packed: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
    if x_RK.numel() == 0:
        return x_RK.new_empty(*x_RK.shape[:-1], num_outputs)
    y_RN: Tensor = torch.ops.mkldnn._linear_pointwise(x_RK, packed, bias_N, "none", [], "")
    return y_RN


def _padded(x_RK: Tensor, packed: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
    rows = len(x_RK)
    if not 0 < rows < MIN_ROWS:
        return _prepacked(x_RK, packed, bias_N, num_outputs)
    return _prepacked(F.pad(x_RK, (0, 0, 0, MIN_ROWS - rows)), packed, bias_N, num_outputs)[:rows]


def _vector(x_1K: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    row_K = x_1K[0]
    y_N = weight_NK.mv(row_K) if bias_N is None else torch.addmv(bias_N, weight_NK, row_K)
    return y_N[None]
