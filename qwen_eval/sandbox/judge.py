"""The judge: a process that runs tests against candidates it never shares an interpreter with.

Reads programs from the harness, has the zygote fork a candidate for each, runs the (trusted) test here with the
candidate behind a proxy, and answers with a verdict. The candidate sees the arguments of the calls, nothing else.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import importlib
import json
import math
import os
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from qwen_eval.sandbox import candidate
from qwen_eval.sandbox.codec import Damaged, Hangup, Oversize, receive_order, send_frame
from qwen_eval.sandbox.orders import END, END_SOON, OUT_OF_MEMORY, RUN
from qwen_eval.sandbox.remote import Channel, OversizeAnswer, Remote, Unconfined, Untestable, is_from_candidate

if TYPE_CHECKING:
    from typing import TypedDict

    class Request(TypedDict):
        """A program and its test, as the harness sends them."""

        solution: str
        test: str
        prelude: str
        entry_point: str
        timeout_s: float
        memory_bytes: int


JUDGE_MEMORY_BYTES = 1 << 30  # of address space
COMPILED_CHARACTERS = 1 << 15
LONG_TEST_CHARACTERS = 1 << 13
_BUILTINS = frozenset(dir(builtins))


class TimedOut(BaseException):
    """Not an Exception: a test's own `except Exception` must not swallow it."""


def main(harness_fd: int, control_fd: int, core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    resource.setrlimit(resource.RLIMIT_AS, (JUDGE_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.simplefilter("ignore")  # of programs and tests; the standard error is the harness's
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGALRM, _bell.ring)
    ready = json.loads(control.recv(4096) or "null")
    if ready is None:
        return
    send_frame(harness_fd, ready)
    try:
        with contextlib.suppress(Hangup):
            while True:
                _judge_next(harness_fd, control)
    except MemoryError:  # what earlier programs left here may be part of it: a fresh judge tells
        os._exit(OUT_OF_MEMORY)


def _judge_next(harness_fd: int, control: socket.socket) -> None:
    request: Request = receive_order(harness_fd, 1 << 30)
    start = time.perf_counter()
    reason = judge(request, control)
    send_frame(harness_fd, [reason, time.perf_counter() - start])


class _Bell:
    """Rung by the timer. It remembers, since a bare `except:` in a test may swallow what it raises."""

    has_rung = False

    def ring(self, *_: object) -> NoReturn:
        self.has_rung = True
        raise TimedOut


_bell = _Bell()


def judge(request: Request, control: socket.socket) -> str:
    """The reason of the verdict; "passed" is the only pass.

    Raises Hangup when the zygote is gone, MemoryError when this process, not the candidate, has no memory left.
    """
    with _candidate(control) as mine:
        _bell.has_rung = False
        channel = Channel(mine.fileno())
        try:
            # again and again: a bare `except:` in a test may catch one
            signal.setitimer(signal.ITIMER_REAL, request["timeout_s"], 0.05)
            try:
                _run_test(request, channel)
                if _bell.has_rung:
                    raise TimedOut
                if channel.fault:
                    raise channel.fault
                reason = "passed"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except TimedOut:
            reason = "timed out"
        except BaseException as error:
            if isinstance(error, MemoryError) and not is_from_candidate(error):
                raise
            reason = _describe(error, request["test"])
        has_left = isinstance(channel.fault, Hangup)  # whatever the test made of it
        status = _reap(control, END_SOON if has_left else END)  # with the channel open: a hangup would make it run
    return _describe_exit(status) if has_left else reason


def _candidate(control: socket.socket) -> socket.socket:
    """The channel to a new candidate, which is being made."""
    mine, theirs = socket.socketpair()
    with theirs:
        try:
            socket.send_fds(control, [RUN], [theirs.fileno()])
        except (BrokenPipeError, ConnectionResetError):
            mine.close()
            raise Hangup from None
    return mine


def _reap(control: socket.socket, order: bytes) -> int:
    try:
        control.sendall(order)
        answer = control.recv(4)
    except (BrokenPipeError, ConnectionResetError):
        answer = b""
    if len(answer) < 4:
        raise Hangup
    return int.from_bytes(answer, "little", signed=True)


def _run_test(request: Request, channel: Channel) -> None:
    channel.load(_compiled_solution(request["solution"]), math.ceil(request["timeout_s"]) + 1, request["memory_bytes"])
    test = _compiled_test(request["test"])
    names = _namespace(request, test, channel)
    channel.loaded()
    subject = names[request["entry_point"]]  # before the test runs: it may be called `check` too
    exec(test.code, names)
    if test.has_check:
        names["check"](subject)


def _compiled_solution(source: str) -> CodeType | str:
    """Its code, which nothing here runs: to compile it takes a warm process a third of the time that it takes a new
    one. What does not compile, or is of a length that could keep this process busy, is left to the candidate."""
    if len(source) > COMPILED_CHARACTERS:
        return source
    try:
        return candidate.compiled(source)
    except Exception:
        return source


class _Test(NamedTuple):
    code: CodeType
    has_check: bool
    names: frozenset[str]  # all that are not local to a function
    foreign: frozenset[str]  # those it may not bind itself


def _compiled_test(text: str) -> _Test:
    """The same for all samples of a problem. Few long ones are kept: this process's memory is limited."""
    return (_long_test if len(text) > LONG_TEST_CHARACTERS else _short_test)(text)


@functools.lru_cache(maxsize=1024)
def _short_test(text: str) -> _Test:
    return _compile_test(text)


@functools.lru_cache(maxsize=8)
def _long_test(text: str) -> _Test:
    return _compile_test(text)


def _compile_test(text: str) -> _Test:
    code = compile(text, "<test>", "exec", dont_inherit=True)
    parts = [part for part in code.co_consts if isinstance(part, CodeType)]
    names = frozenset(_names(code))
    foreign = names - _BUILTINS  # never the candidate's: it would redefine what an assertion means
    if foreign & sys.stdlib_module_names:  # attributes have such names too, and importing `this` is not free
        foreign &= _unbound(ast.parse(text))
    return _Test(code, any(part.co_name == "check" for part in parts), names, foreign)


@functools.lru_cache(maxsize=1024)
def _compiled_prelude(text: str) -> CodeType:
    return compile(text, "<prelude>", "exec", dont_inherit=True)


def _names(code: CodeType) -> set[str]:
    """Every name of `code` that is not local to a function: more than it reads, since attributes are among them."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


def _namespace(request: Request, test: _Test, channel: Channel) -> dict[str, Any]:
    """What the test's names mean: the prelude's, then the entry point, then what nobody else defines."""
    names: dict[str, Any] = {"__name__": "test"}
    prelude, entry_point = request["prelude"], request["entry_point"]
    if "import *" in prelude or any(name in prelude for name in test.names if name != entry_point):
        try:
            exec(_compiled_prelude(prelude), names)
        except Exception as error:
            raise Untestable(f"the prelude does not run by itself: {type(error).__name__}") from None
    if not entry_point.isidentifier():
        raise Untestable(f"entry point {entry_point!r} is not a name")
    names[entry_point] = Remote(channel, entry_point, True)
    for name in test.foreign - names.keys():
        if name in sys.stdlib_module_names:
            names[name] = importlib.import_module(name)
        else:
            names[name] = Remote(channel, name, False)
    return names


def _unbound(test: ast.Module) -> set[str]:
    """Names the test reads and nowhere binds."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(test):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound


def _describe(error: BaseException, test: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error))[:200]
    match error:
        case OversizeAnswer() | Oversize():
            return "output"
        case Damaged():
            return f"failed: damaged answer ({text})"
        case Untestable() | Unconfined():
            return f"error: {text}"
        case MemoryError():
            return "memory"
        case AssertionError() if not is_from_candidate(error):
            return f"failed: {_failing_line(error, test)}"
    kind = "" if type(error).__name__ == "CandidateError" else type(error).__name__
    return "failed: " + ": ".join(part for part in (kind, text) if part)


def _failing_line(error: BaseException, test: str) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<test>"]
    lines = test.splitlines()
    if not frames or not frames[-1].lineno or frames[-1].lineno > len(lines):
        return "AssertionError"
    return lines[frames[-1].lineno - 1].strip()[:200]


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"failed: the program left with exit status {status}"
    try:
        return f"killed: {signal.Signals(-status).name}"
    except ValueError:
        return f"killed: signal {-status}"
