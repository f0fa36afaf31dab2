"""The processor of this machine. No torch."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_model() -> str:
    """Its model name by /proc/cpuinfo, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
