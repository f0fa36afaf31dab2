"""The candidate's side: run its source, then answer calls with plain data until nobody asks.

Everything here is in the hands of the candidate: it knows no expected value and decides nothing. Runs inside the
sandbox: standard library alone.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from qwen_eval.sandbox.codec import Handle, Hangup, Oversize, pack, receive_order, send_frame, unpack


class Objects:
    """What cannot be sent stays here; the judge gets its number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []  # alive, so that an id is never used twice
        self.numbers: dict[int, int] = {}
        self.iterators: dict[int, Iterator[Any]] = {}

    def export(self, value: Any) -> Handle:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return Handle(self.numbers[id(value)])

    def resolve(self, handle: Handle) -> Any:
        return self.kept[handle.number]

    def next_items(self, number: int) -> list[Any]:
        """The next item, [] at the end."""
        if number not in self.iterators:
            self.iterators[number] = iter(self.kept[number])
        return [item for _, item in zip((None,), self.iterators[number])]


def serve(channel: int, set_budget: Callable[[int, int], None]) -> None:
    """Answer until the judge hangs up.

    Orders: [seconds, bytes, program], then [nonce, operation, target, ...]. Frames out: [nonce, "ok" | "raise" |
    "big", ...]. A program is its code, or its source where that does not compile: the error is the candidate's. `set_budget` limits this process to the seconds of computing and bytes of memory
    before the source runs.
    """
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    objects = Objects()
    try:
        cpu_s, memory_bytes, program = receive_order(channel)
        set_budget(cpu_s, memory_bytes)
        _reply(channel, "", lambda: _load(program, module.__dict__))
        while True:
            nonce, operation, target, *operands = receive_order(channel)
            _reply(channel, nonce, lambda: _perform(operation, target, operands, module.__dict__, objects))  # noqa: B023
    except Hangup:
        return


def _reply(channel: int, nonce: str, work: Any) -> None:
    try:
        send_frame(channel, [nonce, "ok", *work()])
    except Hangup:
        raise
    except Oversize:
        send_frame(channel, [nonce, "big"])
    except BaseException as error:  # SystemExit too: leaving is no answer
        send_frame(channel, [nonce, "raise", type(error).__name__, _text(error)])


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


def compiled(source: str) -> types.CodeType:
    return compile(source, "<solution>", "exec", dont_inherit=True)


def _load(program: str | types.CodeType, names: dict[str, Any]) -> tuple[None, None]:
    exec(compiled(program) if isinstance(program, str) else program, names)
    return None, None


def _perform(operation: str, target: str | int, operands: list[Any], names: dict[str, Any], objects: Objects) -> Any:
    """(packed result, packed arguments where the call changed them, else None)."""
    if operation == "next":
        assert isinstance(target, int)
        return pack(objects.next_items(target), objects.export), None
    owner = _find(target, names, objects)
    if operation == "get":
        return pack(getattr(owner, operands[0]), objects.export), None
    if operation == "bool":
        return bool(owner), None
    if operation == "set":
        setattr(owner, operands[0], unpack(operands[1], objects.resolve))
        return None, None
    assert operation == "call", operation
    args, kwargs = (unpack(part, objects.resolve) for part in operands)
    result = pack(owner(*args, **kwargs), objects.export)
    after = pack(args, objects.export)
    return result, None if after == operands[0] else after


def _find(target: str | int, names: dict[str, Any], objects: Objects) -> Any:
    if isinstance(target, int):
        return objects.kept[target]
    if target not in names:
        raise NameError(f"name {target!r} is not defined")
    return names[target]
