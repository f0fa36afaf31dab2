"""The peak of a process: what CUDA's allocator counted, or the resident set of a CPU process; and a limit on both."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_eval.core import JSON
from qwen_eval.models.device import memory_bytes

MARGIN = 0.97  # of the free memory: the rest of the machine must live


@dataclass(frozen=True, kw_only=True)
class Peak:
    """`allocated_bytes`: tensors on CUDA, the resident set on a CPU. `counter` says what was counted, since when."""

    allocated_bytes: int
    reserved_bytes: int | None
    counter: str


class PeakMemory:
    """Counts from its making; `reset` starts anew, where the system lets it."""

    def __init__(self, *devices: torch.device) -> None:
        self.gpus = [device for device in devices if device.type == "cuda"]
        self.is_reset = False

    def reset(self) -> None:
        for device in self.gpus:
            torch.cuda.reset_peak_memory_stats(device)
        if self.gpus:
            self.is_reset = True
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.is_reset = True
        except OSError:  # not allowed in some containers: then loading stays in the peak, and `counter` says so
            self.is_reset = False

    def read(self) -> Peak:
        since = "since the weights were loaded" if self.is_reset else "loading included"
        if self.gpus:
            allocated = sum(torch.cuda.max_memory_allocated(device) for device in self.gpus)
            reserved = sum(torch.cuda.max_memory_reserved(device) for device in self.gpus)
            return Peak(allocated_bytes=allocated, reserved_bytes=reserved, counter=f"CUDA allocator, {since}")
        high = status_bytes("VmHWM")
        if high is None:
            high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            since = "loading included"
        return Peak(allocated_bytes=high, reserved_bytes=None, counter=f"resident set, {since}")


def status_bytes(field: str) -> int | None:
    """`VmRSS`, `VmHWM` or `VmData` of this process; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def limit_memory(device: torch.device, memory_gib: float | None) -> None:
    """Using more than `memory_gib` (or than is free) raises an error; otherwise the system would kill the process."""
    free, total = memory_bytes(device)
    if device.type == "cuda":
        if memory_gib is not None:
            index = torch.cuda.current_device() if device.index is None else device.index  # torch takes no bare "cuda"
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * 2**30 / total), index)
        return
    allowed = int(free * MARGIN) if memory_gib is None else int(memory_gib * 2**30)
    held = status_bytes("VmData")
    if held is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = held + allowed
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))


def to_json(peak: Peak) -> dict[str, JSON]:
    return {
        "peak_bytes": peak.allocated_bytes,
        "reserved_bytes": peak.reserved_bytes,
        "peak_counter": peak.counter,
    }
