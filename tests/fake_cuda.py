"""CUDA devices on a machine without any: tensors that say "cuda:0", hold their values, and obey the rules of a GPU.

Operations of two devices in one call fail, and kernels that exist on CUDA alone are twins with its demands: dtypes,
alignment, no empty grids. Copies to pinned memory hold rubbish until an event says that they are done; what makes the
host wait is counted; a capture runs nothing, and refuses what CUDA refuses. Memory is counted, and ends.
"""

from __future__ import annotations

import math
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from two_devices import COPIES, Elsewhere, _Literals, run

from qwen_eval.models import fused
from qwen_eval.models.quant import kernels

COUNTS_ON_HOST = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::bincount",
                  "aten::_local_scalar_dense", "aten::equal")  # fmt: skip
RUBBISH = -7777  # in host memory that a copy has not reached yet


class FakeCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`waits`: by what the host was made to wait. `total_bytes`: of the memory of each device."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch lets no other mode make tensors of an absent CUDA

    def __init__(self, count: int, total_bytes: int, capability: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.total_bytes, self.capability = count, total_bytes, capability
        self.waits: Counter[str] = Counter()
        self.drained: list[int] = []  # operations launched since the fetched value was made, at each wait for a copy
        self.current = 0
        self.launched = 0
        self.pending: list[tuple[Tensor, Tensor]] = []  # host memory and what will come into it
        self.capture: Capture | None = None
        self.live: Counter[int] = Counter()
        self.reserved: Counter[int] = Counter()
        self.pools: Counter[int] = Counter()  # of captured graphs
        self._made_at: dict[int, int] = {}  # by memory: the operation that wrote it last
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
        if not any(isinstance(x, Elsewhere) for x in tree_leaves((args, kwargs))) and not _is_cuda(kwargs):
            result = func(*args, **kwargs)
            return self._pin(result) if is_pinned else result
        return self._on_device(func, name, args, kwargs)

    def _on_device(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        self._refuse(func, name, args)
        if name in COPIES and not self._is_within(name, args, kwargs):
            return self._crossing(func, name, args, kwargs)
        self.launched += 1
        twin = TWINS.get(name)
        if self.capture is not None:
            self.capture.keep(func, args)
        result = run(func, args, kwargs) if twin is None else _wrapped(twin, args)
        for x in tree_leaves(result):
            if isinstance(x, Elsewhere):
                self._made_at[_memory(x)] = self.launched
                self._count(x)
        if self.capture is not None:
            assert all(x.device.index == self.current for x in tree_leaves(result) if isinstance(x, Elsewhere)), (
                f"{func} of another device than the current one, cuda:{self.current}, is captured"
            )
            self.capture.operations.append((func, args, kwargs, result))
        return result

    def _refuse(self, func: Any, name: str, args: Any) -> None:
        """What counts on the host makes it wait."""
        has_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
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
        self.launched += 1
        result = run(func, args, kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Elsewhere):
                self._made_at[_memory(x)] = self.launched
                self._count(x)
        return result

    def _to_host(self, func: Any, name: str, args: Any, kwargs: Any, source: Elsewhere, *, is_async: bool) -> Any:
        if not is_async:
            self.drained.append(self.launched - self._made_at.get(_memory(source), 0))
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
        self.arrive(len(self.pending))

    def arrive(self, count: int) -> None:
        for host, value in self.pending[:count]:
            host.copy_(value)
        del self.pending[:count]

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
        weakref.finalize(storage, self._drop, index, num_bytes)
        self.live[index] += num_bytes
        if self.capture is not None:
            self.capture.num_bytes += num_bytes
        self.reserved[index] = max(self.reserved[index], self.live[index])

    def _drop(self, index: int, num_bytes: int) -> None:
        self.live[index] -= num_bytes

    def free_bytes(self, index: int) -> int:
        return self.total_bytes - self.reserved[index] - self.pools[index]

    def empty_cache(self) -> None:
        assert self.capture is None, "the cache is emptied while steps are captured"
        for index in range(self.count):
            self.reserved[index] = self.live[index]


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
    Tensor.__int__: lambda x: int(x.item()),
    Tensor.__float__: lambda x: float(x.item()),
}


class _Python(_Literals):
    """What Python's side of torch would ask the real device for, as the operations that it stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = GUARDED.get(func, func)
        args = tuple(_numbered(x) for x in args)
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


# --- kernels that exist on CUDA alone -------------------------------------------------------------------------------


@torch.inference_mode(False)
@torch.no_grad()
def _wrapped(twin: Callable[..., Any], args: Any) -> Any:
    where = next(x.device for x in args if isinstance(x, Elsewhere))
    assert all(x.device == where for x in args if isinstance(x, Elsewhere)), f"{twin.__name__}: several devices"
    held = [x.held if isinstance(x, Elsewhere) else x for x in args]
    return tree_map(lambda x: Elsewhere(x, where) if isinstance(x, Tensor) else x, twin(*held))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """As the kernels lay it out: outputs [B,T,H,D] seen as [B,H,T,D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
    scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse.clamp(min=-3e38)[..., None]) @ v
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False
) -> tuple[Any, ...]:
    assert q.dtype in (torch.float16, torch.bfloat16), f"flash attention takes no {q.dtype}"
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] % 8 == 0, "heads of a multiple of 8 channels"
    assert q.shape[-1] <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "channels lie behind one another"
    assert not causal or q.shape[2] == k.shape[2]
    assert q.shape[2] > 0, "a grid of no blocks"
    assert q.shape[1] % k.shape[1] == 0
    out, lse = _attention(q, k, v, None, causal)
    return out, lse, None, None, q.shape[2], k.shape[2], torch.zeros(2), torch.zeros(()), torch.zeros(0)


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    want_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
) -> tuple[Any, ...]:
    align = 16 // q.element_size() if q.element_size() == 2 else 4
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[1] == k.shape[1], "this kernel groups no heads"
    assert q.shape[2] > 0, "a grid of no blocks"
    for x in (q, k, v):
        assert x.stride(-1) == 1, "channels lie behind one another"
        assert all(stride % align == 0 for size, stride in zip(x.shape[1:3], x.stride()[1:3]) if size > 1)
    if bias is not None:
        assert bias.dtype == q.dtype
        assert tuple(bias.shape) == (*q.shape[:3], k.shape[2])
        assert bias.stride(-1) == 1
        assert all(stride % align == 0 for size, stride in zip(bias.shape[:3], bias.stride()) if size > 1), "alignment"
        assert not causal
    out, lse = _attention(q, k, v, bias, causal)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
    return out, padded, torch.zeros(()), torch.zeros(())


def _pack(pairs: Tensor, inner_tiles: int) -> Tensor:
    """The layout of tinygemm: lane 4 n + l of a tile of 8 outputs holds inputs 2 l, 2 l + 1, 2 l + 8, 2 l + 9 ..."""
    assert pairs.dtype == torch.uint8
    assert pairs.is_contiguous()
    outputs, inputs = pairs.shape[0], 2 * pairs.shape[1]
    assert outputs % 8 == 0
    assert inputs % (inner_tiles * 16) == 0
    # outputs, super tiles, words of two tiles, four groups of four bytes each
    grouped = pairs.view(outputs // 8, 8, inputs // (16 * inner_tiles), inner_tiles // 2, 4, 4).long()
    bytes_ = grouped.transpose(-1, -2)  # [..., lane, which of its four bytes]
    shifts = torch.arange(0, 16, 4)
    words = ((bytes_ >> 4) << shifts).sum(-1) | ((bytes_ & 15) << (shifts + 16)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.permute(0, 2, 1, 4, 3).reshape(outputs // 8, -1, 32, inner_tiles // 2).int()


def _unpack(packed: Tensor) -> Tensor:
    """[outputs, inputs]"""
    blocks, strips, _, half = packed.shape
    words = packed.view(blocks, strips, 8, 4, half).permute(0, 2, 1, 4, 3)[..., None]  # block, n, strip, word, lane
    high, low = (words >> torch.arange(0, 16, 4)) & 15, (words >> torch.arange(16, 32, 4)) & 15
    return torch.stack([high, low], -1).transpose(4, 5).reshape(blocks * 8, -1)


def _int4_product(x: Tensor, packed: Tensor, group: int, scale_zero: Tensor) -> Tensor:
    assert x.dtype == scale_zero.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert packed.is_contiguous()
    assert scale_zero.is_contiguous()
    assert len(x) > 0, "a grid of no blocks: CUDA says invalid configuration argument"
    assert group in (32, 64, 128, 256)
    weight = _unpack(packed)
    assert x.shape[1] == weight.shape[1]
    assert tuple(scale_zero.shape) == (x.shape[1] // group, len(weight), 2)
    scale, zero = scale_zero.float().repeat_interleave(group, 0).unbind(-1)  # [inputs, outputs]
    return (x.float() @ ((weight.t() - 8) * scale + zero).bfloat16().float()).bfloat16()


TWINS: dict[str, Callable[..., Any]] = {
    "aten::_scaled_dot_product_flash_attention": _flash,
    "aten::_scaled_dot_product_efficient_attention": _efficient,
    "aten::_convert_weight_to_int4pack": _pack,
    "aten::_weight_int4pack_mm": _int4_product,
}


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

    def undo(self) -> None:
        """A capture runs nothing."""
        with torch.inference_mode():
            for given, value in reversed(self.before.values()):
                given.held.copy_(value)
        self.before.clear()


def _graph_classes(cuda: FakeCuda) -> tuple[Any, Any]:
    class CUDAGraph:
        def __init__(self) -> None:
            self.captured = Capture()

        def replay(self) -> None:
            assert cuda.capture is None
            for func, args, kwargs, recorded in self.captured.operations:
                cuda.launched += 1
                twin = TWINS.get(func._schema.name)
                fresh = run(func, args, kwargs) if twin is None else _wrapped(twin, args)
                for old, new in zip(tree_leaves(recorded), tree_leaves(fresh)):
                    if isinstance(old, Elsewhere) and _memory(old) != _memory(new):
                        with torch.inference_mode():
                            old.held.copy_(new.held)
                        cuda._made_at[_memory(old)] = cuda.launched

    @contextmanager
    def graph(graph: Any, pool: Any = None) -> Iterator[None]:
        cuda.empty_cache()
        cuda.arrive(len(cuda.pending))
        cuda.capture, index = graph.captured, cuda.current
        live = cuda.live[index]
        try:
            yield
        finally:
            cuda.capture = None
            graph.captured.undo()
            cuda.reserved[index] = min(cuda.reserved[index], live)
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

        def record(self, stream: Any = None) -> None:
            assert stream is None or stream < cuda.count
            self.stream = index(None) if stream is None else stream
            self.count, self.at = len(cuda.pending), cuda.launched

        def synchronize(self) -> None:
            assert cuda.capture is None
            assert self.count is not None, "an event that was never recorded"
            cuda.arrive(self.count)

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    @contextmanager
    def device(where: Any) -> Iterator[None]:
        before, cuda.current = cuda.current, index(where)
        try:
            yield
        finally:
            cuda.current = before

    def set_device(where: Any) -> None:
        cuda.current = index(where)

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
        "reset_peak_memory_stats": lambda where=None: None,
        "empty_cache": cuda.empty_cache,
        "synchronize": lambda where=None: cuda.wait("torch.cuda.synchronize"),
        "current_stream": index,
        "set_stream": lambda stream: None,
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
    """`torch.cuda` as on a machine with `count` GPUs and no compiler for Triton."""
    torch._C._ensureCUDADeviceGuardSet()
    cuda = FakeCuda(count, total_bytes, capability)
    with ExitStack() as stack:
        for name, function in _functions(cuda).items():
            stack.enter_context(_replaced(torch.cuda, name, function))
        stack.enter_context(_replaced(fused, "can_compile", lambda: False))
        kernels._learnt_order.cache_clear()
        stack.enter_context(cuda)
        stack.enter_context(_Python())
        try:
            yield cuda
        finally:
            kernels._learnt_order.cache_clear()
