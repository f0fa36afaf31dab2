"""The one place where steps are captured: a shape that comes back is captured once and replayed from then on.

A replay launches all kernels of a step at once, where Python would launch hundreds one after another. What is captured
must read and write the same memory each time and read nothing back; where that fails, steps run plainly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from qwen_eval.models.cost import MAX_GRAPH_BYTES

T = TypeVar("T")
Compute = Callable[[], T]
Replay = Callable[[], None]


class StepGraphs(Generic[T]):
    """Runs steps by key. `capture` records a step without running it: how to run it, and the outputs it will fill."""

    def __init__(
        self,
        capture: Callable[[Compute[T]], tuple[Replay, T]],
        *,
        used_bytes: Callable[[], int] = lambda: 0,
        max_bytes: int = MAX_GRAPH_BYTES,
    ) -> None:
        self._capture, self._used_bytes, self.max_bytes = capture, used_bytes, max_bytes
        self._captured: dict[Hashable, tuple[Replay, T]] = {}
        self._seen: set[Hashable] = set()
        self.num_bytes = 0
        self.num_replays = 0
        self.stopped: str | None = None  # why nothing more is captured

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable | None, compute: Compute[T]) -> T:
        """The outputs of one step; those of a captured one are overwritten by the next of its key.

        The first step of a key runs plainly and so sets its kernels up. `None` is never captured.
        """
        if key is None:
            return compute()
        if key not in self._captured and (key not in self._seen or not self._add(key, compute)):
            self._seen.add(key)
            return compute()
        replay, outputs = self._captured[key]
        replay()
        self.num_replays += 1
        return outputs

    def _add(self, key: Hashable, compute: Compute[T]) -> bool:
        if self.stopped is not None:
            return False
        before = self._used_bytes()
        try:
            self._captured[key] = self._capture(compute)
        except RuntimeError as error:
            self.stopped = " ".join(str(error).split())[:200]
            return False
        self.num_bytes += self._used_bytes() - before
        if self.num_bytes >= self.max_bytes:
            self.stopped = f"captured steps keep {self.num_bytes / 2**20:.0f} MiB"
        return True


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Of this device. torch's own is of the device that was captured first: elsewhere a graph would stay empty."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def cuda_graphs(device: torch.device, max_bytes: int = MAX_GRAPH_BYTES) -> StepGraphs[T] | None:
    """Graphs of this device, all in one memory pool; None where there are none."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Compute[T]) -> tuple[Replay, T]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_capture_stream(device)):
                outputs = compute()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # torch stays on the stream of a capture that fails when it ends
            raise
        return graph.replay, outputs

    def used_bytes() -> int:
        torch.cuda.empty_cache()  # as a capture does: what it gives back would hide what the graph keeps
        return torch.cuda.memory_reserved(device)

    return StepGraphs(capture, used_bytes=used_bytes, max_bytes=max_bytes)
