"""The candidate as the judge's test sees it: proxies that send arguments out and let only plain data in."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import CodeType

from qwen_eval.sandbox.codec import Damaged, Handle, Hangup, Oversize, Packed, pack, receive_frame, send_order, unpack


class Untestable(Exception):
    """The test asks for something that cannot be judged apart from the candidate."""


class OversizeAnswer(Exception):
    """The candidate said that its answer is over the limit."""


class Unconfined(Exception):
    """The candidate's process could not be confined; nothing of it has run."""


class CandidateError(Exception):
    """The candidate raised something that no class here can stand for."""


class Channel:
    """Asks one question at a time. Each carries a fresh nonce: an answer made before the question is damage."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.fault: Exception | None = None  # the first breach of the protocol: a test that catches it still fails

    def load(self, program: str | CodeType, cpu_s: int, memory_bytes: int) -> None:
        with self._noting_a_fault():
            send_order(self.fd, [cpu_s, memory_bytes, program])

    def loaded(self) -> None:
        """Wait until the source has run; raises what it raised."""
        with self._noting_a_fault():
            self._answer("")

    def ask(self, operation: str, target: str | int | None, *operands: Packed) -> tuple[Packed, Packed]:
        nonce = os.urandom(8).hex()
        with self._noting_a_fault():
            send_order(self.fd, [nonce, operation, target, *operands])
            return self._answer(nonce)

    @contextlib.contextmanager
    def _noting_a_fault(self) -> Iterator[None]:
        try:
            yield
        except (Damaged, Hangup, Oversize, OversizeAnswer) as error:
            self.fault = self.fault or error
            raise

    def _answer(self, nonce: str) -> tuple[Packed, Packed]:
        message: Packed = receive_frame(self.fd)
        match message:
            case [str(said), "ok", value, changed] if said == nonce:
                return value, changed
            case [str(said), "raise", str(text), list(lineage)] if said == nonce:
                raise _exception(text, lineage)
            case [str(said), "big"] if said == nonce:
                raise OversizeAnswer
            case ["", "unconfined", str(text)]:
                raise Unconfined(text[:200])
        raise Damaged("not an answer to what was asked")


# Their exceptions are of the same class here. A test framework's are not: `unittest.SkipTest` would be a verdict.
_SHARED_MODULES = frozenset(
    {"builtins", "binascii", "_csv", "decimal", "json.decoder", "_queue", "re", "statistics", "struct", "zlib"}
)


def _exception(text: str, lineage: list[Packed]) -> Exception:
    """What the candidate raised: of its own class where it is known here, else of a new one with its known bases."""
    known = [found for entry in lineage if (found := _known_exception(entry)) is not None]
    if known and known[0] is _known_exception(lineage[0]):
        with contextlib.suppress(Exception):  # UnicodeDecodeError and its kin want more than a text
            return _from_candidate(known[0](text))
    nearest = [kind for kind in known if not any(issubclass(other, kind) for other in known if other is not kind)]
    name = _name(lineage[0]) if lineage else "an exception without a class"
    try:
        bases = tuple(nearest) or (CandidateError,)
        made: type[Exception] = type(name, bases, {"__init__": _keep_nothing, "__str__": lambda _: text})
        return _from_candidate(made(text))
    except Exception:  # bases that no class can have together
        return _from_candidate(CandidateError(f"{name}: {text}" if text else name))


def _known_exception(entry: Packed) -> type[Exception] | None:
    """The class that [module, name] stands for, where the module is shared and loaded here."""
    match entry:
        case [str(module), str(name)] if module in _SHARED_MODULES and module in sys.modules:
            found = vars(sys.modules[module]).get(name)
            return found if isinstance(found, type) and issubclass(found, Exception) else None
    return None


def _name(entry: Packed) -> str:
    name = str(entry[-1]) if isinstance(entry, list) and entry else ""
    return "".join(c if c.isprintable() else " " for c in name)[:100]


def _keep_nothing(self: Exception, text: str) -> None:
    """Instead of an `__init__` that wants what did not cross."""


def _from_candidate(error: Exception) -> Exception:
    error.from_candidate = True  # type: ignore[attr-defined]
    return error


def is_from_candidate(error: BaseException) -> bool:
    """Whether the candidate raised it, not the test."""
    return getattr(error, "from_candidate", False)


class Remote:
    """An object or a named function on the candidate's side.

    It can be called, iterated, asked for its truth and its attributes. It never compares: an object of the candidate's
    that equals everything satisfies no assertion about a value. `_is_subject` marks the entry point and what came from
    it. Anything else the candidate defines may build objects for the test, but a plain value from it would let the
    candidate write its own expectations, so that is Untestable.
    """

    __slots__ = ("_channel", "_is_subject", "_target")
    __hash__ = None  # type: ignore[assignment]
    _channel: Channel
    _is_subject: bool
    _target: str | int | None

    def __init__(self, channel: Channel, target: str | int | None, is_subject: bool) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_is_subject", is_subject)

    def __call__(self, *args: object, **kwargs: object) -> object:
        sent = pack(list(args), _export), pack(kwargs, _export) if kwargs else None
        packed, changed = self._channel.ask("call", self._target, *sent)
        result = _admit(self, packed)
        if changed is not None and self._is_subject:
            after: object = unpack(changed, lambda handle: Remote(self._channel, handle.number, True))
            if type(after) is list and len(after) == len(args):
                for old, new in zip(args, after):
                    update(old, new)
        return result

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return _admit(self, self._channel.ask("get", self._target, name)[0])

    def __setattr__(self, name: str, value: object) -> None:
        self._channel.ask("set", self._target, name, pack(value, _export))

    def __iter__(self) -> Remote:
        return self

    def __next__(self) -> object:
        items = _admit(self, self._channel.ask("next", self._target)[0])
        if type(items) is not list or len(items) > 1:
            raise Damaged("not an item")
        if not items:
            raise StopIteration
        return items[0]

    def __bool__(self) -> bool:
        truth = _admit(self, self._channel.ask("bool", self._target)[0])
        if type(truth) is not bool:
            raise TypeError("an object of the candidate's is not plain data")
        return truth

    def __eq__(self, other: object) -> bool:
        raise TypeError("an object of the candidate's is not plain data")

    def __ne__(self, other: object) -> bool:
        raise TypeError("an object of the candidate's is not plain data")


def _export(value: object) -> Handle:
    if type(value) is Remote and isinstance(value._target, int):
        return Handle(value._target)
    raise Untestable(f"the test passes a {type(value).__name__} to the candidate")


def _admit(source: Remote, packed: Packed) -> object:
    """What `source` gave, as the test may see it."""
    channel = source._channel
    try:
        value: object = unpack(packed, lambda handle: Remote(channel, handle.number, source._is_subject))
    except (Damaged, RecursionError) as error:
        channel.fault = channel.fault or error
        raise
    if source._is_subject or type(value) is Remote:
        return value
    if value is None:
        return Remote(channel, None, False)
    raise Untestable(f"the test uses a value of {source._target!r}, which the candidate defines; give it as prelude")


def update(old: object, new: object) -> object:
    """Make the mutable `old` equal to `new` in place, as deep as types agree; return it, or `new` where they do not."""
    if type(old) is not type(new):
        return new
    if type(old) is list and type(new) is list:
        old[:] = [update(a, b) for a, b in zip(old, new)] + new[len(old) :]
    elif type(old) is dict and type(new) is dict:
        fresh = {key: update(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(fresh)
    elif type(old) is set and type(new) is set:
        old.clear()
        old.update(new)
    elif type(old) is tuple and type(new) is tuple and len(old) == len(new):
        return tuple(update(a, b) for a, b in zip(old, new))
    else:
        return new
    return old
