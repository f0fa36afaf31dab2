"""Whether the product of one row is faster in Triton than in cuBLAS, measured once a shape at load."""

# N outputs, K inputs

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_eval.models.dense import MARGIN, Linear
from qwen_eval.models.gpu.vector import BLOCKS, vector_product

MIN_BYTES = 1 << 20  # smaller weights take the same kernel everywhere, as on a CPU
SAMPLE = 4  # layers of one shape in turn, so that a weight does not wait in the cache
REPEATS = 5

Product = Callable[[Tensor, Tensor], Tensor]
Seconds = Callable[[Product, Sequence[Tensor]], float]  # of the product of one row with each of these weights


def choose_vector_kernels(modules: Iterable[nn.Module], seconds: Seconds | None = None) -> dict[str, int]:
    """Let each unquantized Linear on a GPU take its fastest kernel for one row; returns the layers per kernel."""
    by_shape: dict[tuple[int, int, torch.device], list[Linear]] = defaultdict(list)
    for module in modules:
        if isinstance(module, Linear) and (seconds is not None or _has_choice(module.weight)):
            by_shape[module.out_features, module.in_features, module.weight.device].append(module)
    for linears in by_shape.values():
        block = fastest_block([linear.weight for linear in linears[:SAMPLE]], seconds or cuda_seconds)
        for linear in linears:
            linear.block = block
    return dict(Counter(linear.kernel_name for linears in by_shape.values() for linear in linears))


def fastest_block(weights_NK: Sequence[Tensor], seconds: Seconds) -> tuple[int, int] | None:
    """The block of the Triton kernel where it beats `linear` by more than noise; None where it does not."""
    plain = seconds(F.linear, weights_NK)
    times = {block: seconds(functools.partial(_product, block=block), weights_NK) for block in BLOCKS}
    best = min(times, key=lambda block: times[block])
    return best if times[best] < MARGIN * plain else None


def _product(x_1K: Tensor, weight_NK: Tensor, block: tuple[int, int]) -> Tensor:
    return vector_product(x_1K, weight_NK, None, block)


def _has_choice(weight_NK: Tensor) -> bool:
    is_half = weight_NK.dtype in (torch.bfloat16, torch.float16)
    return weight_NK.is_cuda and is_half and weight_NK.nbytes >= MIN_BYTES and weight_NK.is_contiguous()


@torch.inference_mode()
def cuda_seconds(product: Product, weights_NK: Sequence[Tensor]) -> float:
    """The least of several replays of a graph of all products: Python's launches would take longer than the kernels."""
    x_1K = torch.ones(1, weights_NK[0].shape[1], dtype=weights_NK[0].dtype, device=weights_NK[0].device)
    with torch.cuda.device(x_1K.device):
        for weight_NK in weights_NK:  # the first call sets the kernel up
            product(x_1K, weight_NK)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(x_1K.device)  # type: ignore[no-untyped-call]
        with torch.cuda.graph(graph, stream=stream):
            for weight_NK in list(weights_NK) * REPEATS:
                product(x_1K, weight_NK)
        return min(_replayed(graph) for _ in range(REPEATS))


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
