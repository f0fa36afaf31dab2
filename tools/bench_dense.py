"""The kernels of an unquantized bf16 Linear, in turns: what `models/dense.py` chooses from, and a ceiling beside it.

    python tools/bench_dense.py                                  # the layers and the head of the 1.8B's width
    python tools/bench_dense.py --shapes 1408x512 --rows 1 8 64 --threads 1

Each turn runs every kernel once over several weights of a shape, 128 MB in all, so that none waits in a cache, and
reads a buffer of 512 MB. Printed: GB/s of weights (median over turns), and the median of the ratios to the reading of
the same turn. With one thread the clock is that of the thread: other processes slow it less. "fp16 packed" is FBGEMM's
product of fp16 weights; it is not used (docs/profile.md says why).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qwen_eval.models.dense import PADDED, PLAIN, PREPACKED, VECTOR, Kernel, Linear, can_prepack

SHAPES = ("6144x2048", "2048x2048", "5504x2048", "2048x5504", "151936x2048")
TURN_BYTES = 128 * 10**6
READ = "read"
HALF = "fp16 packed (FBGEMM)"


def linears_of(weights_NK: list[Tensor], kernel: Kernel) -> list[Linear]:
    made = []
    for weight in weights_NK:
        linear = Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
        linear.weight.data = weight
        linear.use(kernel)
        made.append(linear)
    return made


def num_weights(outputs: int, inputs: int) -> int:
    return max(1, TURN_BYTES // (2 * outputs * inputs))


def contenders(outputs: int, inputs: int) -> dict[str, Callable[[Tensor], object]]:
    weights = [torch.randn(outputs, inputs).mul_(0.02).bfloat16() for _ in range(num_weights(outputs, inputs))]
    kernels: list[Kernel] = [PLAIN, VECTOR, *((PREPACKED, PADDED) if can_prepack() else ())]
    runs: dict[str, Callable[[Tensor], object]] = {}
    for kernel in kernels:
        runs[kernel] = partial(_each, linears_of(weights, kernel))
    pack = getattr(torch.ops.quantized, "linear_prepack_fp16", None)
    if pack is not None and "fbgemm" in torch.backends.quantized.supported_engines:
        runs[HALF] = partial(_each_half, [pack(weight.float(), None) for weight in weights])
    return runs


def _each(linears: list[Linear], x_RK: Tensor) -> None:
    for linear in linears:
        linear(x_RK)


def _each_half(packed: list[object], x_RK: Tensor) -> None:
    for weight in packed:
        torch.ops.quantized.linear_dynamic_fp16(x_RK.float(), weight).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the old operators
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    block = torch.ones(2**27)
    with torch.inference_mode():
        for shape in options.shapes:
            outputs, inputs = map(int, shape.split("x"))
            runs = contenders(outputs, inputs)
            for rows in options.rows:
                x_RK = torch.randn(rows, inputs).bfloat16()
                seconds = in_turns({READ: lambda _: block.sum(), **runs}, x_RK, options.turns, clock)
                num_bytes = num_weights(outputs, inputs) * 2 * outputs * inputs
                report(f"{shape}, {rows} rows", seconds, {READ: block.nbytes}, num_bytes)


def in_turns(
    runs: dict[str, Callable[[Tensor], object]], x_RK: Tensor, turns: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each, by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = clock()
            run(x_RK)
            if turn:  # the first warms up
                seconds[name].append(clock() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], bytes_of: dict[str, int], num_bytes: int) -> None:
    print(title)
    rates = {name: [bytes_of.get(name, num_bytes) / s for s in values] for name, values in seconds.items()}
    for name, values in rates.items():
        ratio = statistics.median(own / read for own, read in zip(values, rates[READ]))
        print(f"  {name:34} {statistics.median(values) / 1e9:6.1f} GB/s  {ratio:4.2f} of reading", flush=True)


if __name__ == "__main__":
    main()
