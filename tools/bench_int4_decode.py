"""Decode speed of quantized linears against bf16, batch 1: one pass over all linears of a Qwen shape, random weights.

    python tools/bench_int4_decode.py                       # Qwen 1.8B's shape
    python tools/bench_int4_decode.py --shape 0.5b --rows 1 4 16 64 65 256

Formats take turns within each round, so that a busy machine slows all of them; the ratio is the median over rounds.
bf16 and fp32 are multiplied by the kernel that measures fastest here, as in a model. With one thread on a CPU, seconds
are those of the thread's own clock: other processes slow it less.
Every layer has weights of its own: none stays in a cache, as in decoding. No attention, no head: linears only.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_eval.models import dense
from qwen_eval.models.quant import kernels

GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden: int
    mlp: int
    layers: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of qkv, o, up, gate and down."""
        h, m = self.hidden, self.mlp
        return (h, 3 * h), (h, h), (h, m), (h, m), (m, h)


SHAPES = {
    "0.5b": Shape(hidden=1024, mlp=2816, layers=24),  # Qwen1.5-0.5B
    "1.8b": Shape(hidden=2048, mlp=5504, layers=24),  # Qwen-1.8B
    "7b": Shape(hidden=4096, mlp=11008, layers=32),  # Qwen-7B
}
Layer = list[nn.Module]


def dense_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> Layer:
    weights = (torch.randn(n, k, device=device).mul_(0.02).to(dtype) for k, n in shape.linears)
    layer: Layer = []
    for weight in weights:
        linear = dense.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layer.append(linear)
    return layer


def packed_layer(shape: Shape, bits: int, device: torch.device) -> Layer:
    layer: Layer = []
    for k, n in shape.linears:
        codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
        zeros = torch.full((k // GROUP, n), 1 << (bits - 1))
        scales = torch.rand(k // GROUP, n) * 0.002 + 0.001
        layer.append(kernels.pack(codes, zeros, scales, kernels.Groups(GROUP, None), bits, None, device=device))
    return layer


def run(layers: list[Layer], inputs: dict[int, Tensor]) -> float:
    """Seconds of one pass."""
    is_cuda = next(iter(inputs.values())).is_cuda
    clock = time.thread_time if torch.get_num_threads() == 1 and not is_cuda else time.perf_counter
    start = clock()
    for layer in layers:
        for linear in layer:
            linear(inputs[int(linear.in_features)])  # type: ignore[arg-type]
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def size(linear: nn.Module) -> int:
    return int(linear.in_features) * int(linear.out_features)  # type: ignore[arg-type]


def weight_bytes(linear: nn.Module) -> int:
    """Of a quantized Linear as it says; a plain one may hold its weight packed only."""
    if isinstance(linear, kernels.QuantizedLinear):
        return linear.weight_bytes
    assert isinstance(linear, dense.Linear)
    return size(linear) * (linear.weight.element_size() if linear.packed is None else 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to save memory and time")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="+", default=["bf16", "int4", "int8"], help="of bf16 fp32 int4 int8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    shape, device = SHAPES[options.shape], torch.device(options.device)
    count = options.layers or shape.layers
    make: dict[str, Callable[[], Layer]] = {
        "bf16": lambda: dense_layer(shape, torch.bfloat16, device),
        "fp32": lambda: dense_layer(shape, torch.float32, device),
        "int4": lambda: packed_layer(shape, 4, device),
        "int8": lambda: packed_layer(shape, 8, device),
    }
    models = {}
    for name in options.formats:
        first = make[name]()
        models[name] = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        dense.prepare(linear for layer in models[name] for linear in layer)
    name = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    print(f"{options.shape}: {count} layers, {device} ({name}), {threads} threads, torch {torch.__version__}")
    for rows in options.rows:
        measure(models, shape, rows, options.rounds, device)


def measure(models: dict[str, list[Layer]], shape: Shape, rows: int, rounds: int, device: torch.device) -> None:
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name, layers in models.items():
            dtype = torch.float32 if name == "fp32" else torch.bfloat16
            inputs = {k: torch.randn(rows, k, dtype=dtype, device=device) for k in (shape.hidden, shape.mlp)}
            took = run(layers, inputs)
            if i:  # the first round warms up
                times[name].append(took)
    base = next(iter(models))
    for name, layers in models.items():
        linears = [linear for layer in layers for linear in layer]
        held, as_bf16 = sum(map(weight_bytes, linears)), sum(2 * size(linear) for linear in linears)
        ratios = sorted(b / t for b, t in zip(times[base], times[name]))
        median = statistics.median(times[name])
        print(
            f"rows {rows:4d}  {name}: {median * 1e3:8.2f} ms (n={rounds}, {min(times[name]) * 1e3:.2f} to "
            f"{max(times[name]) * 1e3:.2f}), {held / median / 1e9:5.1f} GB/s, bytes "
            f"{held / as_bf16:.3f} of bf16, speed {statistics.median(ratios):.2f} x {base} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})  [{', '.join(sorted({str(linear.kernel) for linear in linears}))}]"
        )


if __name__ == "__main__":
    main()
