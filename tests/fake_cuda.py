"""CUDA devices on a machine without any: tensors that say "cuda:0", hold their values, and obey the rules of a GPU.

Operations of two devices in one call fail, and kernels that exist on CUDA alone are twins with its demands: dtypes,
alignment, no empty grids. Copies to pinned memory hold rubbish until an event says that they are done; what makes the
host wait is counted; a capture runs nothing, and refuses what CUDA refuses. Memory is counted, and ends.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from cuda_kernels import TWINS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from two_devices import COPIES, Elsewhere, _Literals, _tensors, run

from qwen_eval.models import attention, fused, graph
from qwen_eval.models.quant import kernels

COUNTS_ON_HOST = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::bincount",
                  "aten::_local_scalar_dense", "aten::equal")  # fmt: skip
CAPTURING = -1  # the stream of a capture
RUBBISH = -7777  # in host memory that a copy has not reached yet


class FakeCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`waits`: by what the host was made to wait. `total_bytes`: of the memory of each device."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch lets no other mode make tensors of an absent CUDA

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported, for seconds

    def __init__(self, count: int, total_bytes: int, capability: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.total_bytes, self.capability = count, total_bytes, capability
        self.waits: Counter[str] = Counter()
        self.current = 0
        self.launched: Counter[int] = Counter()  # operations, by device
        self.num_captures = 0
        self.capture_stream: int | None = None
        self.kernels: set[str] = set()  # those of cuda_kernels.py that ran
        self.streams = dict(enumerate(range(count)))  # the current one of each device
        self.num_arrived = 0
        self.pending: list[tuple[Tensor, Tensor]] = []  # host memory and what will come into it
        self.capture: Capture | None = None
        self.live: Counter[int] = Counter()
        self.reserved: Counter[int] = Counter()
        self.pools: Counter[int] = Counter()  # of captured graphs
        self._pinned: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._counted: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    # --- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, dict(kwargs or {})
        if name == "aten::is_pinned":
            return self.is_pinned(args[0])
        if name in ("aten::_pin_memory", "aten::pin_memory"):
            return self._pin(args[0].clone())
        is_pinned = kwargs.pop("pin_memory", None)
        if not _is_cuda(kwargs) and next(_there((args, list(kwargs.values()))), None) is None:
            result = func(*args, **kwargs)
            return self._pin(result) if is_pinned else result
        return self._on_device(func, name, args, kwargs)

    def _on_device(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        self._refuse(func, name, args)
        if name in COPIES and not self._is_within(name, args, kwargs):
            return self._crossing(func, name, args, kwargs)
        twin = TWINS.get(name)
        if twin is not None:
            self.kernels.add(name.removeprefix("aten::"))
        if self.capture is not None:
            self.capture.keep(func, args)
        result = run(func, args, kwargs) if twin is None else _wrapped(twin, args)
        self._made(result)
        if self.capture is not None:
            assert all(x.device.index == self.current for x in _there((result,))), (
                f"{func} of another device than the current one, cuda:{self.current}, is captured"
            )
            self.capture.operations.append((func, args, kwargs, result))
        return result

    def _refuse(self, func: Any, name: str, args: Any) -> None:
        """What counts on the host makes it wait."""
        has_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in _tensors(args[1:2]))
        if name in COUNTS_ON_HOST or (name.startswith("aten::index") and "fill" not in name and has_mask):
            self.wait(str(func))

    @staticmethod
    def _is_within(name: str, args: Any, kwargs: Any) -> bool:
        """A copy that stays on one device."""
        if name == "aten::copy_":
            return bool(args[0].device == args[1].device)
        target = kwargs.get("device")
        return target is None or torch.device(target) == args[0].device

    def _crossing(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        source = args[1] if name == "aten::copy_" else args[0]
        target = args[0].device if name == "aten::copy_" else torch.device(kwargs["device"])
        is_async = kwargs.get("non_blocking", False) or (name == "aten::copy_" and len(args) > 2 and args[2])
        assert self.capture is None or source.device.type == target.type, f"{func} from or to the host is captured"
        if source.device.type == "cpu":
            if source.numel() and not (is_async and self.is_pinned(source)):
                self.wait("a copy from memory that is not pinned")
        elif target.type == "cpu":
            return self._to_host(func, name, args, kwargs, source, is_async=is_async)
        result = run(func, args, kwargs)
        self._made(result)
        return result

    def _made(self, result: Any) -> None:
        for x in _there((result,)):
            self.launched[x.device.index or 0] += 1
            self._count(x)

    def _to_host(self, func: Any, name: str, args: Any, kwargs: Any, source: Elsewhere, *, is_async: bool) -> Any:
        if not is_async:
            self.wait("a copy to the host")
            return run(func, args, kwargs)
        assert name == "aten::copy_", f"{func}: a copy that is under way in memory that is not pinned"
        assert self.is_pinned(args[0]), "a copy that is under way in memory that is not pinned"
        self.pending.append((args[0], source.held.clone()))
        args[0].fill_(RUBBISH)
        return args[0]

    def wait(self, what: str) -> None:
        """The host waits for all that was launched."""
        assert self.capture is None, f"{what} makes the host wait while steps are captured"
        self.waits[f"{what} in {_place()}"] += 1
        self.arrive(self.num_copies)

    @property
    def num_copies(self) -> int:
        """To the host, begun so far."""
        return self.num_arrived + len(self.pending)

    def arrive(self, count: int) -> None:
        """The first `count` of all copies are done."""
        while self.num_arrived < count:
            host, value = self.pending.pop(0)
            host.copy_(value)
            self.num_arrived += 1

    # --- memory ------------------------------------------------------------------------------------------------------

    def is_pinned(self, x: Tensor) -> bool:
        ref = self._pinned.get(_memory(x))
        return ref is not None and ref() is not None

    def _pin(self, x: Tensor) -> Tensor:
        assert self.capture is None, "memory is pinned while steps are captured"
        self._pinned[_memory(x)] = weakref.ref(x.untyped_storage())
        return x

    def _count(self, x: Elsewhere) -> None:
        storage = x.held.untyped_storage()
        known = self._counted.get(id(storage))
        if known is not None and known() is storage:
            return
        index, num_bytes = x.device.index or 0, -(-storage.nbytes() // 512) * 512
        if self.free_bytes(index) < num_bytes - (self.reserved[index] - self.live[index]):
            self.reserved[index] = self.live[index]  # as the allocator does before it gives up
            if self.free_bytes(index) < num_bytes:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes")
        self._counted[id(storage)] = weakref.ref(storage)
        if self.capture is not None:  # as large as all that was made, since the operations keep it
            self.capture.num_bytes += num_bytes
            return
        weakref.finalize(storage, self._drop, index, num_bytes)
        self.live[index] += num_bytes
        self.reserved[index] = max(self.reserved[index], self.live[index])

    def _drop(self, index: int, num_bytes: int) -> None:
        self.live[index] -= num_bytes

    def free_bytes(self, index: int) -> int:
        return self.total_bytes - self.reserved[index] - self.pools[index]

    def empty_cache(self) -> None:
        assert self.capture is None, "the cache is emptied while steps are captured"
        for index in range(self.count):
            self.reserved[index] = self.live[index]


def _there(values: Any) -> Iterator[Elsewhere]:
    return (x for x in _tensors(values) if isinstance(x, Elsewhere))


def _is_cuda(kwargs: Any) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


def _memory(x: Tensor) -> int:
    held = x.held if isinstance(x, Elsewhere) else x
    return held.untyped_storage().data_ptr()


def _place() -> str:
    """The innermost line of ours."""
    ours = [frame for frame in traceback.extract_stack() if "/qwen_eval/" in frame.filename]
    return f"{ours[-1].filename.rsplit('/qwen_eval/')[-1]}:{ours[-1].name}" if ours else "a test"


# --- indexing -------------------------------------------------------------------------------------------------------


GUARDED: dict[Any, Any] = {
    Tensor.__invert__: torch.ops.aten.bitwise_not,
    Tensor.copy_: torch.ops.aten.copy_,
    Tensor.contiguous: torch.ops.aten.contiguous,
    Tensor.nonzero: torch.ops.aten.nonzero,
    Tensor.__int__: lambda x: int(x.item()),
    Tensor.__float__: lambda x: float(x.item()),
}


class _Python(_Literals):
    """What Python's side of torch would ask the real device for, as the operations that it stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = GUARDED.get(func, func)
        args = args if func is torch.device else tuple(_numbered(x) for x in args)
        kwargs = {key: _numbered(x) if key == "device" else x for key, x in (kwargs or {}).items()}
        if func is Tensor.__getitem__ and isinstance(args[0], Elsewhere):
            view, indices = _basic(args[0], args[1])
            return torch.ops.aten.index(view, indices) if indices else view
        if func is Tensor.__setitem__ and isinstance(args[0], Elsewhere):
            view, indices = _basic(args[0], args[1])
            value = args[2] if isinstance(args[2], Tensor) else Elsewhere(torch.tensor(args[2]), args[0].device)
            if indices:
                value = value if value.dtype == view.dtype else value.to(view.dtype)
                return torch.ops.aten.index_put_(view, indices, value)
            return torch.ops.aten.copy_(view, value) if isinstance(args[2], Tensor) else view.fill_(args[2])
        return super().__torch_function__(func, types, args, kwargs)


def _numbered(x: Any) -> Any:
    """A device with its number."""
    is_bare = isinstance(x, (torch.device, str)) and str(x) == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if is_bare else x


def _basic(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Numbers, slices, None and ... of an index applied; the tensors of it, by the dimension they stand for."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.dim() - taken)
    indices: list[Tensor | None] = []
    for part in parts:
        dim = len(indices)
        if isinstance(part, int) and not isinstance(part, bool):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            assert part.step in (None, 1) or part.stop is None
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        indices.append(part if isinstance(part, Tensor) else None)
    return x, indices if any(part is not None for part in indices) else []


@torch.inference_mode(False)
@torch.no_grad()
def _wrapped(twin: Callable[..., Any], args: Any) -> Any:
    where = next(x.device for x in args if isinstance(x, Elsewhere))
    assert all(x.device == where for x in args if isinstance(x, Elsewhere)), f"{twin.__name__}: several devices"
    held = [x.held if isinstance(x, Elsewhere) else x for x in args]
    return tree_map(lambda x: Elsewhere(x, where) if isinstance(x, Tensor) else x, twin(*held))


# --- torch.cuda -----------------------------------------------------------------------------------------------------


class Capture:
    """What a graph holds: operations on the very tensors they were captured with."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Elsewhere, Tensor]] = {}
        self.num_bytes = 0

    def keep(self, func: Any, args: Any) -> None:
        for given, argument in zip(args, func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Elsewhere):
                self.before.setdefault(id(given), (given, given.held.clone()))

    def seal(self) -> None:
        """Tensors from outside are known by their memory alone: a graph keeps nothing alive."""
        inside: set[int] = set()
        outside: set[int] = set()
        for _, args, kwargs, result in self.operations:
            outside |= {_memory(x) for x in _there((args, list(kwargs.values())))} - inside
            inside |= {_memory(x) for x in _there((result,))} - outside
        self.operations = [
            (func, *(_by_memory(part, outside) for part in parts)) for func, *parts in self.operations
        ]  # fmt: skip

    def undo(self) -> None:
        """A capture runs nothing."""
        with torch.inference_mode():
            for given, value in reversed(self.before.values()):
                given.held.copy_(value)
        self.before.clear()


class Outside:
    """A tensor as a graph knows it: where it lay."""

    def __init__(self, x: Elsewhere) -> None:
        self.memory, self.device, self.dtype = weakref.ref(x.held.untyped_storage()), x.device, x.dtype
        self.place = x.held.storage_offset(), x.held.shape, x.held.stride()

    def tensor(self) -> Elsewhere:
        storage = self.memory()
        assert storage is not None, "a replay reads memory that was freed"
        with torch.inference_mode(False):
            held = torch.empty(0, dtype=self.dtype)
            held.set_(storage, *self.place)
            return Elsewhere(held, self.device)


def _by_memory(values: Any, outside: set[int]) -> Any:
    def known(x: Any) -> Any:
        return Outside(x) if isinstance(x, Elsewhere) and _memory(x) in outside else x

    return tree_map(known, values)


def _graph_classes(cuda: FakeCuda) -> tuple[Any, Any]:
    class CUDAGraph:
        def __init__(self) -> None:
            self.captured = Capture()

        def replay(self) -> None:
            assert cuda.capture is None
            for func, *given, recorded in self.captured.operations:
                args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Outside) else x, tuple(given))
                twin = TWINS.get(func._schema.name)
                fresh = run(func, args, kwargs) if twin is None else _wrapped(twin, args)
                for old, new in zip(tree_leaves(recorded), tree_leaves(fresh)):
                    if isinstance(old, Elsewhere) and _memory(old) != _memory(new):
                        cuda.launched[old.device.index or 0] += 1
                        with torch.inference_mode():
                            old.held.copy_(new.held)

    @contextmanager
    def graph(graph: Any, pool: Any = None, stream: int | None = None) -> Iterator[None]:
        cuda.empty_cache()
        cuda.arrive(cuda.num_copies)
        cuda.num_captures += 1
        if stream is None:  # torch makes one for all captures of the process
            stream = cuda.capture_stream = cuda.current if cuda.capture_stream is None else cuda.capture_stream
        index, before = stream, cuda.streams[stream]
        elsewhere, cuda.current = cuda.current, stream
        cuda.capture, cuda.streams[index] = graph.captured, CAPTURING
        try:
            yield
            cuda.streams[index] = before  # after a failure torch stays on the stream of the capture
        finally:
            cuda.capture, cuda.current = None, elsewhere
            graph.captured.undo()
            graph.captured.seal()
            cuda.pools[index] += graph.captured.num_bytes
            weakref.finalize(graph, cuda.pools.subtract, {index: graph.captured.num_bytes})

    return CUDAGraph, graph


class _Properties:
    uuid = "0000"


def _functions(cuda: FakeCuda) -> dict[str, Any]:
    def index(device: Any) -> int:
        found = cuda.current if device is None else torch.device(device).index
        return cuda.current if found is None else found

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.count: int | None = None

        def record(self, stream: int | None = None) -> None:
            self.device = cuda.current if stream is None else stream
            self.count, self.at = cuda.num_copies, cuda.launched[self.device]

        def synchronize(self) -> None:
            assert cuda.capture is None
            assert self.count is not None, "an event that was never recorded"
            cuda.arrive(self.count)

        def elapsed_time(self, end: Event) -> float:
            """What its device did meanwhile: nothing, if the work was on another."""
            assert self.device == end.device
            return float(end.at - self.at)

    @contextmanager
    def device(where: Any) -> Iterator[None]:
        before, cuda.current = cuda.current, index(where)
        try:
            yield
        finally:
            cuda.current = before

    def numbered(where: Any) -> int:
        """As the functions of torch that take no bare "cuda"."""
        found = where if isinstance(where, int) else torch.device(where).index
        if found is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got: {where}")
        return int(found)

    def set_device(where: Any) -> None:
        cuda.current = numbered(where)

    def set_per_process_memory_fraction(fraction: float, where: Any) -> None:
        assert numbered(where) < cuda.count
        cuda.total_bytes = int(cuda.total_bytes * fraction)

    def mem_get_info(where: Any = None) -> tuple[int, int]:
        return cuda.free_bytes(index(where)), cuda.total_bytes

    CUDAGraph, graph = _graph_classes(cuda)
    return {
        "is_available": lambda: True,
        "device_count": lambda: cuda.count,
        "current_device": lambda: cuda.current,
        "set_device": set_device,
        "device": device,
        "get_device_name": lambda where=None: "Fake GPU",
        "get_device_capability": lambda where=None: cuda.capability,
        "get_device_properties": lambda where=None: _Properties(),
        "mem_get_info": mem_get_info,
        "memory_reserved": lambda where=None: cuda.reserved[index(where)] + cuda.pools[index(where)],
        "memory_allocated": lambda where=None: cuda.live[index(where)],
        "max_memory_allocated": lambda where=None: cuda.reserved[index(where)],
        "max_memory_reserved": lambda where=None: cuda.reserved[index(where)],
        "set_per_process_memory_fraction": set_per_process_memory_fraction,
        "reset_peak_memory_stats": lambda where=None: None,
        "empty_cache": cuda.empty_cache,
        "synchronize": lambda where=None: cuda.wait("torch.cuda.synchronize"),
        "Stream": index,
        "current_stream": lambda where=None: cuda.streams[index(where)],
        "set_stream": lambda stream: cuda.streams.update({stream: stream}),
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: object(),
    }


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def fake_cuda(
    count: int = 1, *, total_bytes: int = 1 << 40, capability: tuple[int, int] = (9, 0)
) -> Iterator[FakeCuda]:
    """`torch.cuda` as on a machine with `count` GPUs and no Triton."""
    torch._C._ensureCUDADeviceGuardSet()
    cuda = FakeCuda(count, total_bytes, capability)
    with ExitStack() as stack:
        for name, function in _functions(cuda).items():
            stack.enter_context(_replaced(torch.cuda, name, function))
        stack.enter_context(_replaced(fused, "_has_triton", lambda: False))
        stack.callback(_forget)
        _forget()
        stack.enter_context(cuda)
        stack.enter_context(_Python())
        yield cuda


def _forget() -> None:
    """What was learnt about a device of this name."""
    kernels._learnt_order.cache_clear()
    attention._has_flash.cache_clear()
    graph._capture_stream.cache_clear()
