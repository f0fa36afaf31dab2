"""The candidate's side: run its source, then answer calls with plain data until nobody asks.

Everything here is in the hands of the candidate: it knows no expected value and decides nothing. Runs inside the
sandbox: standard library alone.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from qwen_eval.sandbox.codec import (
    Handle,
    Hangup,
    Oversize,
    Packed,
    pack,
    receive_frame,
    receive_order,
    send_frame,
    send_order,
    unpack,
)


class Objects:
    """What cannot be sent stays here; the judge gets its number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []  # alive, so that an id is never used twice
        self.numbers: dict[int, int] = {}
        self.iterators: dict[int, Iterator[object]] = {}

    def export(self, value: object) -> Handle:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return Handle(self.numbers[id(value)])

    def resolve(self, handle: Handle) -> object:
        return self.kept[handle.number]

    def next_items(self, number: int) -> list[object]:
        """The next item, [] at the end."""
        if number not in self.iterators:
            self.iterators[number] = iter(self.kept[number])
        return [item for _, item in zip((None,), self.iterators[number])]


# Made before the fork, which is when it costs least: a process runs one program.
_objects = Objects()
_module = types.ModuleType("solution")
_names = _module.__dict__


def serve(channel: int, set_budget: Callable[[int, int], None]) -> None:
    """Answer until the judge hangs up.

    Orders: [seconds, bytes, program], then [nonce, operation, target, ...]. Frames out: [nonce, "ok" | "raise" |
    "big", ...]. A program is its code, or its source where that does not compile: the error is the candidate's.
    `set_budget` limits this process to the seconds of computing and bytes of memory before the program runs.
    """
    sys.modules["solution"] = _module
    try:
        first: tuple[int, int, str | types.CodeType] = receive_order(channel)
        cpu_s, memory_bytes, program = first
        set_budget(cpu_s, memory_bytes)
        _reply(channel, "", _load, program)
        while True:
            asked: list[Any] = receive_order(channel)
            nonce, *order = asked
            _reply(channel, nonce, _perform, *order)
    except Hangup:
        return


_FAMILIAR = "from typing import Any, Dict, List, Optional, Tuple\n" + "".join(
    f"def f(x: List[{kind}], y: List[List[{kind}]] = [], z: Optional[{kind}] = None, d: Dict[str, {kind}] = {{}}) ->"
    f" Tuple[{kind}, {kind}]:\n    return x\n"
    for kind in ("int", "float", "str", "bool", "Any")
)


def rehearse() -> None:
    """Do, before the first fork, what every program has done, and leave no trace of it.

    Python notes in the code it runs how best to run it, and `typing` keeps the annotations that it has made: what has
    been written by then need not be written by each candidate, in pages of its own.
    """
    untouched = dict(_names)
    program = compiled(_FAMILIAR)
    reader, writer = os.pipe()
    for _ in range(20):
        for work, *operands in ((_load, program), (_perform, "call", "f", [[1, 2.0, "3"]], None)):
            send_order(writer, operands)
            _reply(writer, "", work, *receive_order(reader))
            receive_frame(reader)
    os.close(reader)
    os.close(writer)
    _names.clear()
    _names.update(untouched)


def _reply(channel: int, nonce: str, work: Callable[..., tuple[Packed, Packed]], *operands: Any) -> None:
    try:
        send_frame(channel, [nonce, "ok", *work(*operands)])
    except Hangup:
        raise
    except Oversize:
        send_frame(channel, [nonce, "big"])
    except BaseException as error:  # SystemExit too: leaving is no answer
        send_frame(channel, [nonce, "raise", _text(error), _lineage(type(error))])


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


def _lineage(kind: type) -> list[list[str]]:
    """The class and its bases, nearest first, as [module, name]."""
    return [[f"{base.__module__}"[:100], base.__name__[:100]] for base in kind.__mro__[:50]]


def compiled(source: str) -> types.CodeType:
    return compile(source, "<solution>", "exec", dont_inherit=True)


def _load(program: str | types.CodeType) -> tuple[None, None]:
    exec(compiled(program) if isinstance(program, str) else program, _names)
    return None, None


def _perform(operation: str, target: str | int, *operands: Any) -> tuple[Packed, Packed]:
    """(packed result, packed arguments where the call changed them, else None)."""
    if operation == "next":
        assert isinstance(target, int)
        return pack(_objects.next_items(target), _objects.export), None
    owner = _find(target)
    if operation == "get":
        return pack(getattr(owner, operands[0]), _objects.export), None
    if operation == "bool":
        return bool(owner), None
    if operation == "set":
        setattr(owner, operands[0], unpack(operands[1], _objects.resolve))
        return None, None
    assert operation == "call", operation
    args: list[object] = unpack(operands[0], _objects.resolve)
    kwargs: dict[str, object] = unpack(operands[1], _objects.resolve) if operands[1] else {}
    result = pack(owner(*args, **kwargs), _objects.export)
    after = pack(args, _objects.export)
    return result, None if after == operands[0] else after


def _find(target: str | int) -> Any:
    if isinstance(target, int):
        return _objects.kept[target]
    if target not in _names:
        raise NameError(f"name {target!r} is not defined")
    return _names[target]
