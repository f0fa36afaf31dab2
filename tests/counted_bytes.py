"""Counts the bytes of tensors as they are made and freed, also of tensors that have no memory (device "meta").

So the peak of a model of any size is known on a machine that could not hold it. Caching, fragmentation and the
workspaces inside of kernels are not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`live` and `peak` bytes of what was made on `device` inside."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.live, self.peak = device, 0, 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == self.device:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = self._seen.get(id(storage))
        if known is not None and known() is storage:
            return
        num_bytes = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds
        self._seen[id(storage)] = weakref.ref(storage)
        weakref.finalize(storage, self._drop, num_bytes)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def _drop(self, num_bytes: int) -> None:
        self.live -= num_bytes
