"""The ceilings of a device: bandwidth and FLOP/s, measured here or known from its maker; the memory of this machine.

An unknown device has no known ceiling: None, never a guess. No torch: what needs it is in `device.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from qwen_eval.core import JSON, ConfigError
from qwen_eval.models.cpu import cpu_flags, cpu_model

NUMPY_BUFFER_BYTES = 128 * 2**20
NUMPY_GEMM = 1024
NUMPY_REPEATS = 3
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


def host_memory_bytes() -> tuple[int, int]:
    """(free, total) of this machine: what is available without swapping, within a container's limit."""
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


def numpy_device(dtype: str) -> Device:
    """This CPU as numpy measures it, once, in a fifth of a second and without torch. bf16 is taken for twice as fast
    as the fp32 that is measured: so many more products has an instruction of AVX512-BF16."""
    free, total = host_memory_bytes()
    gain = 2.0 if dtype == "bf16" and "avx512_bf16" in cpu_flags() else 1.0
    return Device(
        kind="cpu", name=cpu_model(), dtype=dtype, num_threads=None, total_bytes=total, free_bytes=free,
        bandwidth=_numpy_bandwidth(), flops=gain * _numpy_flops(),
    )  # fmt: skip


@cache
def _numpy_bandwidth() -> float:
    import numpy as np

    free, _ = host_memory_bytes()
    buffer = np.ones(max(1, min(NUMPY_BUFFER_BYTES, free // 4) // 4), np.float32)
    return float(buffer.nbytes / _best_s(buffer.sum))


@cache
def _numpy_flops() -> float:
    import numpy as np

    a = np.ones((NUMPY_GEMM, NUMPY_GEMM), np.float32)
    return 2.0 * NUMPY_GEMM**3 / _best_s(lambda: a @ a)


def _best_s(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(NUMPY_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
