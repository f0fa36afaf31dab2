"""Copies between the host and a device, neither of which waits for the other."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; the host does not wait for a GPU."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Fetched:
    """Values on their way to the host: what the device computes next does not wait for `wait`."""

    def __init__(self, values: Tensor) -> None:
        is_cuda = values.device.type == "cuda"
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
