"""Plain data between the judge and the candidate, with tags, in frames of a stated length.

Answers, which go up (candidate, judge, harness), are JSON: what is decoded is only ever a value of an exact builtin (or
standard library) type or a `Handle`; no class, code or method of the sender can arrive. Orders, which go down to who
may trust the sender, are `marshal`, which carries code as well and takes less to read. This module also runs inside
the sandbox, so it imports the standard library alone.
"""

from __future__ import annotations

import datetime
import json
import marshal
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

Packed: TypeAlias = "bool | int | float | str | list[Packed] | dict[str, Packed] | None"

FRAME_BYTES = 16 << 20
_FIRST_BYTES = 1 << 13  # most frames are shorter
_EXACT_INT = 1 << 53  # beyond this, hexadecimal: the decimal reading of huge ints is quadratic, and refused by Python
_SCALARS = frozenset({str, bool, float, type(None)})
_TYPES = {t.__name__: t for t in (int, float, str, bool, bytes, complex, list, tuple, dict, set, frozenset, type(None))}


class Oversize(Exception):
    """A frame over the limit."""


class Damaged(Exception):
    """Bytes that are not what `encode` writes."""


class Hangup(Exception):
    """The other end is closed."""


class Handle(NamedTuple):
    """An object that stays on the candidate's side, by number."""

    number: int


Export = Callable[[Any], "Handle"]


def pack(value: Any, export: Export) -> Packed:
    """`value` as what JSON carries. `export` gets what is not plain data and returns a `Handle`, or raises TypeError.

    An instance of a subclass of a builtin becomes the builtin it holds: an int subclass that claims to equal
    everything arrives as the int it is.
    """
    kind = type(value)
    if kind in _SCALARS:
        scalar: Packed = value
        return scalar
    if kind is int:
        return value if -_EXACT_INT < value < _EXACT_INT else {"i": hex(value)}
    if kind is list:
        return [pack(item, export) for item in value]
    if kind in _PACKERS:
        tag, take = _PACKERS[kind]
        return {tag: _pack_parts(take(value), export)}
    if kind is Handle:
        return {"h": value.number}
    if value in _TYPES.values() if isinstance(value, type) else False:
        return {"y": value.__name__}
    return _pack_instance(value, export)


def _pack_parts(parts: Any, export: Export) -> Packed:
    return [pack(part, export) for part in parts] if type(parts) in (list, tuple) else parts


def _pack_instance(value: Any, export: Export) -> Packed:
    for base, narrow in _NARROW.items():
        if isinstance(value, base):
            return pack(narrow(value), export)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return pack(value.item(), export)
    return pack(export(value), export)


# The unbound methods of the base class, so that an honest subclass cannot trip over its own overrides.
_NARROW: dict[type, Callable[[Any], object]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    complex: lambda value: complex(value.real, value.imag),
    bytes: lambda value: bytes(memoryview(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    Counter: lambda value: Counter(dict(dict.items(value))),
    OrderedDict: lambda value: OrderedDict(list(OrderedDict.items(value))),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}


def _pairs(value: dict[object, object]) -> list[object]:
    return [part for pair in value.items() for part in pair]


_PACKERS: dict[type, tuple[str, Callable[[Any], object]]] = {
    tuple: ("t", lambda value: value),
    dict: ("d", _pairs),
    set: ("s", list),
    frozenset: ("f", list),
    complex: ("c", lambda value: [value.real, value.imag]),
    bytes: ("b", lambda value: value.hex()),
    bytearray: ("B", lambda value: value.hex()),
    range: ("r", lambda value: [value.start, value.stop, value.step]),
    deque: ("q", lambda value: [value.maxlen, *value]),
    Counter: ("C", _pairs),
    OrderedDict: ("O", _pairs),
    Decimal: ("D", str),
    Fraction: ("F", lambda value: [value.numerator, value.denominator]),
    datetime.datetime: ("T", datetime.datetime.isoformat),
    datetime.date: ("A", datetime.date.isoformat),
    datetime.time: ("M", datetime.time.isoformat),
    datetime.timedelta: ("E", lambda value: [value.days, value.seconds, value.microseconds]),
}


def unpack(data: Any, resolve: Callable[[Handle], object]) -> Any:
    """The inverse of `pack`; `resolve` turns a handle into what stands for it. Raises Damaged."""
    kind = type(data)
    if kind is list:
        return [unpack(item, resolve) for item in data]
    if kind is not dict:
        return data
    if len(data) != 1:
        raise Damaged("not one tag")
    tagged: dict[str, Packed] = data
    [(tag, body)] = tagged.items()
    if tag == "h":
        if type(body) is not int:
            raise Damaged("a handle that is not a number")
        return resolve(Handle(body))
    if tag not in _MAKERS:
        raise Damaged(f"unknown tag {tag[:20]!r}")
    maker = _MAKERS[tag]
    try:
        return maker([unpack(part, resolve) for part in body] if type(body) is list else body)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise Damaged(f"tag {tag}: {type(error).__name__}") from None


def _dict(parts: list[object]) -> dict[object, object]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


_MAKERS: dict[str, Callable[[Any], object]] = {
    "i": lambda text: int(text, 16),
    "t": tuple,
    "d": _dict,
    "s": set,
    "f": frozenset,
    "c": lambda parts: complex(*parts),
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "r": lambda parts: range(*parts),
    "q": lambda parts: deque(parts[1:], parts[0]),
    "C": lambda parts: Counter(_dict(parts)),
    "O": lambda parts: OrderedDict(_dict(parts)),
    "D": Decimal,
    "F": lambda parts: Fraction(*parts),
    "T": datetime.datetime.fromisoformat,
    "A": datetime.date.fromisoformat,
    "M": datetime.time.fromisoformat,
    "E": lambda parts: datetime.timedelta(*parts),
    "y": lambda name: _TYPES[name],
}


_decode = json.JSONDecoder().raw_decode


def _encoder() -> Callable[[object], str]:
    """`JSONEncoder.encode`, which builds this C function anew for every message, where Python has it as we know it.

    Characters are written as they are: of two escapes `\\ud83d\\ude00`, a reader of JSON makes one character.
    """
    plain = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
    escape = json.encoder.encode_basestring
    rest = (None, plain.key_separator, plain.item_separator, False, False, True)
    try:
        into_parts = json.encoder.c_make_encoder(None, plain.default, escape, *rest)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return plain.encode
    return lambda message: "".join(into_parts(message, 0))


_encode = _encoder()


def send_frame(fd: int, message: object, limit: int = FRAME_BYTES) -> None:
    """Write one JSON message. Raises Oversize before a byte is written; Hangup when nobody reads any more."""
    _write_frame(fd, _encode(message).encode("utf-8", "surrogatepass"), limit)


def receive_frame(fd: int, limit: int = FRAME_BYTES) -> Any:
    """Read one JSON message; the ends take turns, so anything after it is damage.

    Raises Hangup, Oversize or Damaged; the bytes may be anybody's.
    """
    try:
        text = _read_frame(fd, limit).decode("utf-8", "surrogatepass")
        message: Packed
        message, end = _decode(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(type(error).__name__) from None
    if end < len(text):
        raise Damaged("more than one message")
    return message


def send_order(fd: int, message: Any, limit: int = FRAME_BYTES) -> None:
    """Write one message downwards: harness, judge, candidate; code may be in it. Raises Oversize or Hangup."""
    _write_frame(fd, marshal.dumps(message), limit)


def receive_order(fd: int, limit: int = FRAME_BYTES) -> Any:
    """Read one message from above, never from below: `marshal` believes what it reads. Raises Hangup or Oversize."""
    return marshal.loads(_read_frame(fd, limit))


def _write_frame(fd: int, body: bytes, limit: int) -> None:
    if len(body) > limit:
        raise Oversize(len(body))
    frame = len(body).to_bytes(4, "big") + body
    try:
        written = os.write(fd, frame)
        while written < len(frame):
            written += os.write(fd, memoryview(frame)[written:])
    except (BrokenPipeError, ConnectionResetError):
        raise Hangup from None


def _read_frame(fd: int, limit: int) -> bytes:
    start = _read(fd, _FIRST_BYTES)
    while len(start) < 4:
        start += _read(fd, _FIRST_BYTES)
    size = int.from_bytes(start[:4], "big")
    if size == len(start) - 4:
        return start[4:]
    if size > limit:
        raise Oversize(size)
    parts, missing = [start[4:]], size + 4 - len(start)
    while missing > 0:
        parts.append(_read(fd, min(missing, 1 << 20)))
        missing -= len(parts[-1])
    if missing:
        raise Damaged("more than one frame")
    return b"".join(parts)


def _read(fd: int, size: int) -> bytes:
    try:
        part = os.read(fd, size)
    except ConnectionResetError:
        part = b""
    if not part:
        raise Hangup
    return part
