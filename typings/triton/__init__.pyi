"""What models/gpu and tools/compile_kernels.py use of Triton 3, which publishes no types of its own."""

from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec, TypeVar, overload

from triton import knobs as knobs
from triton import runtime as runtime

_P = ParamSpec("_P")
_T = TypeVar("_T")

class JITFunction(Generic[_P, _T]):
    """A kernel. `kernel[grid](...)` launches it: tensors arrive as pointers and numbers as scalars, not checked.

    Called by another kernel it is a function like any other.
    """

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]: ...
    def __call__(self, *args: object) -> _T: ...

@overload
def jit(fn: Callable[_P, _T]) -> JITFunction[_P, _T]: ...
@overload
def jit(
    *, do_not_specialize: Sequence[str] = (), do_not_specialize_on_alignment: Sequence[str] = ()
) -> Callable[[Callable[_P, _T]], JITFunction[_P, _T]]: ...
def next_power_of_2(n: int) -> int: ...
def cdiv(x: int, y: int) -> int: ...
