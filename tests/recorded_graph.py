"""A stand-in for CUDA graphs on a CPU: replays the recorded operations on the very same tensors.

It shares what makes graphs fail: a number that Python put in is frozen, a tensor made outside is read where it lay, and
outputs are overwritten by the next replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qwen_eval.models.graph import StepGraphs


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that were written to, and what they held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given, argument in zip(args, func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.setdefault(id(given), (given, given.clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_flatten(recorded)[0], tree_flatten(fresh)[0]):
                if isinstance(old, Tensor) and _memory(old) != _memory(new):  # no view, not written in place
                    old.copy_(new)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@torch.inference_mode()
def record(compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As a capture: nothing has happened afterwards, but it can be replayed."""
    recorder = _Recorder()
    with recorder:
        outputs = compute()
    for tensor, held in reversed(recorder.before.values()):
        tensor.copy_(held)
    return torch.inference_mode()(recorder.replay), outputs


def recorded_graphs(device: torch.device) -> StepGraphs[Any]:
    return StepGraphs(record)
