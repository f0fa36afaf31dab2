"""Two devices on a machine without any: tensors that say where they lie, hold their values, and refuse to meet.

Values lie in CPU tensors, so answers are those of a CPU; an operation whose operands lie on two devices fails, as it
does on GPUs. "lazy" is a device type of torch that nothing here implements.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")  # the only operations that may see two devices


class Elsewhere(Tensor):
    """A tensor on a device that is not there; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):  # torch would make it on the real device
            args = (*args[:2], Elsewhere(torch.tensor(args[2], dtype=args[0].dtype), args[0].device))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


@torch.inference_mode(False)  # a view of an inference tensor could not be wrapped outside of that mode
@torch.no_grad()
def run(func: Any, args: Any, kwargs: Any) -> Any:
    operands = list(_tensors(args)) + list(_tensors(kwargs.values()))
    where = {x.device for x in operands if x.dim() or isinstance(x, Elsewhere)}  # numbers of the host go everywhere
    name, is_in_place = _known(func)
    assert len(where) <= 1 or name in COPIES, f"{func} on {sorted(map(str, where))}"
    target = args[0].device if name == "aten::copy_" else kwargs.get("device") or next(iter(where), torch.device("cpu"))
    kwargs = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
    result = func(*map(_held, args), **{key: _held(value) for key, value in kwargs.items()})
    if is_in_place and isinstance(result, Tensor):
        return args[0]
    return result if target.type == "cpu" else _on(result, target)


@functools.cache
def _known(func: Any) -> tuple[str, bool]:
    first = func._schema.arguments[0].alias_info if func._schema.arguments else None
    return func._schema.name, first is not None and first.is_write


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _held(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_held(each) for each in x]
    return x.held if isinstance(x, Elsewhere) else x


def _on(x: Any, device: torch.device) -> Any:
    if isinstance(x, (list, tuple)):
        return [_on(each, device) for each in x]
    return Elsewhere(x, device) if isinstance(x, Tensor) else x


class _Literals(TorchFunctionMode):
    """`torch.tensor(..., device=)` goes to the device past every other hook."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        where = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if where is None else made.to(where)


@contextmanager
def two_devices() -> Iterator[TwoDevices]:
    with TwoDevices() as counted, _Literals():
        yield counted


class TwoDevices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where tensors can be made on `FIRST` and `SECOND`; counts the operations of each and the copies between them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported, for seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[torch.device] = Counter()
        self.crossings: Counter[tuple[torch.device, torch.device]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = run(func, args, kwargs or {})
        if isinstance(result, Elsewhere):
            self.operations[result.device] += 1
            if func._schema.name in COPIES and args[0].device not in (result.device, torch.device("cpu")):
                self.crossings[args[0].device, result.device] += 1
        return result
