"""What torch measures of a device: bandwidth, FLOP/s, memory, energy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from qwen_eval.models.cpu import cpu_model
from qwen_eval.models.machine import KNOWN, Device, host_memory_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPEATS = 5
CPU_BUFFER_BYTES, CUDA_BUFFER_BYTES = 512 * 2**20, 2 * 2**30
CPU_GEMM, CUDA_GEMM = 1536, 8192


def probe(device: torch.device, dtype: str, *, measure: bool = True) -> Device:
    """What this device is and, with `measure`, what it can do in `dtype` (half a second on a CPU)."""
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else cpu_model()
    free, total = memory_bytes(device)
    bandwidth, tflops, _ = KNOWN.get(name, (None, None, None))
    return Device(
        kind=device.type,
        name=name,
        dtype=dtype,
        num_threads=None if is_cuda else torch.get_num_threads(),
        total_bytes=total,
        free_bytes=free,
        bandwidth=measured_bandwidth(str(device)) if measure else None,
        flops=measured_flops(str(device), dtype) if measure else None,
        known_bandwidth=None if bandwidth is None else bandwidth * 1e9,
        known_flops=None if tflops is None or dtype == "fp32" else tflops * 1e12,
    )


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(free, total)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    return host_memory_bytes()


@functools.cache
def measured_bandwidth(device: str) -> float:
    """Bytes/s of reading a large buffer: the better of a sum and a matrix-vector product, the best of some repeats."""
    where = torch.device(device)
    free, _ = memory_bytes(where)
    size = min(CUDA_BUFFER_BYTES if where.type == "cuda" else CPU_BUFFER_BYTES, free // 4)
    matrix = torch.ones(max(1, size // 4 // 4096), 4096, device=where)
    vector = torch.ones(4096, device=where)
    best = min(_best_s(matrix.sum, where), _best_s(lambda: matrix @ vector, where))
    return matrix.nbytes / best


@functools.cache
def measured_flops(device: str, dtype: str) -> float:
    """FLOP/s of a large square product in `dtype`, the best of some repeats."""
    where = torch.device(device)
    size = CUDA_GEMM if where.type == "cuda" else CPU_GEMM
    a = torch.ones(size, size, device=where, dtype=DTYPES[dtype])
    return 2.0 * size**3 / _best_s(lambda: a @ a, where)


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    synchronise = synchroniser(device)
    times = []
    for _ in range(REPEATS + 1):  # the first is the warm-up
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchroniser(device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


class EnergyMeter:
    """Joules of one GPU since it was made, by NVML; `joules()` is None where NVML or its counter is not there."""

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], float] | None = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._read = lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
            self._start = self._read()
        except Exception:  # no package, no library, an old card: each has an error class of its own
            self._read = None

    def joules(self) -> float | None:
        return None if self._read is None else self._read() - self._start
