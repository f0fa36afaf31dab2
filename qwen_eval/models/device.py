"""The ceilings of this device: bandwidth and FLOP/s, measured here or known from its maker; memory; energy.

An unknown device has no known ceiling: None, never a guess.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from qwen_eval.core import JSON, ConfigError
from qwen_eval.models.cpu import cpu_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPEATS = 5
CPU_BUFFER_BYTES, CUDA_BUFFER_BYTES = 512 * 2**20, 2 * 2**30
CPU_GEMM, CUDA_GEMM = 1536, 8192
# Exact torch.cuda.get_device_name -> (GB/s, dense TFLOP/s in 16 bit, GiB), from the makers' data sheets.
KNOWN = {
    "NVIDIA A100-SXM4-80GB": (2039.0, 312.0, 80),
    "NVIDIA A100 80GB PCIe": (1935.0, 312.0, 80),
    "NVIDIA A100-SXM4-40GB": (1555.0, 312.0, 40),
    "NVIDIA A100-PCIE-40GB": (1555.0, 312.0, 40),
    "NVIDIA H100 80GB HBM3": (3350.0, 989.0, 80),
    "NVIDIA H200": (4800.0, 989.0, 141),
    "NVIDIA A10": (600.0, 125.0, 24),
    "NVIDIA L4": (300.0, 121.0, 24),
    "NVIDIA L40S": (864.0, 362.0, 48),
    "NVIDIA GeForce RTX 3090": (936.0, 71.0, 24),
    "NVIDIA GeForce RTX 4090": (1008.0, 165.0, 24),
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """`bandwidth` bytes/s and `flops` 1/s measured in `dtype` with `num_threads`; `known_*` by the data sheet."""

    kind: str  # cpu | cuda
    name: str
    dtype: str
    num_threads: int | None
    total_bytes: int
    free_bytes: int
    bandwidth: float | None = None
    flops: float | None = None
    known_bandwidth: float | None = None
    known_flops: float | None = None

    @property
    def best_bandwidth(self) -> float | None:
        """The measured bandwidth where there is one, else that of the data sheet."""
        return self.bandwidth or self.known_bandwidth

    @property
    def best_flops(self) -> float | None:
        return self.flops or self.known_flops

    def to_json(self) -> dict[str, JSON]:
        return asdict(self)


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


def known(wanted: str, dtype: str) -> Device:
    """A device of the table, for a plan, by its name or a unique part of it; else ConfigError."""
    found = [name for name in KNOWN if wanted == name] or [name for name in KNOWN if _plain(wanted) in _plain(name)]
    if len(found) != 1:
        raise ConfigError(f"on={wanted}: {len(found) or 'none'} of the known devices; one of {', '.join(KNOWN)}")
    bandwidth, tflops, gib = KNOWN[found[0]]
    return Device(
        kind="cuda",
        name=found[0],
        dtype=dtype,
        num_threads=None,
        total_bytes=gib * 2**30,
        free_bytes=gib * 2**30,
        known_bandwidth=bandwidth * 1e9,
        known_flops=None if dtype == "fp32" else tflops * 1e12,
    )


def _plain(name: str) -> str:
    """`"RTX-4090"` and `"rtx 4090"` are the same device."""
    return " ".join(re.split(r"[\s_-]+", name.lower()))


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(free, total). On a CPU, free memory is what is available without swapping, within a container's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and limit < total:
        free, total = min(free, limit - (used or 0)), limit
    return free, total


def _cgroup_bytes(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file; "max"
        return None


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
