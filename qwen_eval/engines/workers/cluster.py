"""Ray: an instance of our own on this machine, or a cluster that is there.

Our own listens on the loopback interface alone and asks for a token: whoever reaches a port of Ray runs code as its
user. No dashboard, no usage statistics, no log lines; its files go when it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from qwen_eval.core import ConfigError, EngineError

EMBEDDED = "auto"
LOOPBACK = "127.0.0.1"
ADDRESS = re.compile(r"[\w.-]+:\d+|\[[\da-fA-F:]+\]:\d+")
CONNECT_S = 10.0
OBJECT_STORE_BYTES = 256 << 20  # requests and answers pass through it; Ray's default is a third of the memory


@dataclass(kw_only=True)
class Cluster:
    """A connection to Ray, of this process, for all its engines: `close` ends it when the last one has closed."""

    ray: Any  # the package
    directory: str | None = None  # the files of our own instance
    is_ours: bool = True  # False: connected by the caller, and not ended here
    num_users: int = 0
    before: Any = None  # what SIGTERM did before

    @property
    def num_gpus(self) -> int:
        return int(self.ray.cluster_resources().get("GPU", 0))

    @property
    def room(self) -> int | None:
        """How many workers there is a CPU for; None where they need none."""
        return None if self.directory is not None else int(self.ray.cluster_resources().get("CPU", 0))

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    @property
    def num_cpus(self) -> int:
        """Of the smallest machine."""
        if self.directory is not None:
            return os.cpu_count() or 1
        return int(min(node["Resources"].get("CPU", 1) for node in self._nodes))

    @property
    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def close(self) -> None:
        """End what was started here: all processes, their files. A cluster of others stays."""
        self.num_users -= 1
        if self.num_users:
            return
        for address in [address for address, cluster in _OPEN.items() if cluster is self]:
            del _OPEN[address]
        if self.is_ours:
            self.ray.shutdown()
            _on_sigterm(self.before)
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


_OPEN: dict[str, Cluster] = {}  # by address; Ray allows one connection of a process


def connect(address: str) -> Cluster:
    """Start Ray here ("auto") or join the cluster at HOST:PORT; EngineError in one line where that cannot be.

    Where the caller has connected this process already, that connection is used, and stays.
    """
    if address != EMBEDDED and not ADDRESS.fullmatch(address):
        raise ConfigError(f"engine.ray={address}: auto starts Ray on this machine, HOST:PORT joins a cluster")
    if address not in _OPEN:
        if _OPEN:
            raise EngineError(
                f"engine.ray={address}: this process uses engine.ray={next(iter(_OPEN))}; use one of them"
            )
        before = signal.getsignal(signal.SIGTERM)
        _OPEN[address] = _connected(address)
        _OPEN[address].before = before
        _on_sigterm(_exit if before == signal.SIG_DFL else before)
    _OPEN[address].num_users += 1
    return _OPEN[address]


def _connected(address: str) -> Cluster:
    with _environment(own=address == EMBEDDED):
        try:
            import ray
        except ImportError as error:
            raise EngineError("engine.workers needs the package ray: pip install 'qwen_eval[ray]'") from error
        if ray.is_initialized():
            return Cluster(ray=ray, is_ours=False)
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # those of calls that nobody waits for any more
        ray._private.worker.print_to_stdstream = lambda *args, **keys: None  # it prints a death among the results
        return _start(ray) if address == EMBEDDED else _join(ray, address)


def _start(ray: Any) -> Cluster:
    directory = tempfile.mkdtemp(prefix="qe-ray-", dir="/tmp")  # short: it holds sockets, whose paths have a limit
    try:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # these two read the environment again, if the caller
        ray._raylet.Config.initialize("")  # has imported Ray before
        ray.init(
            address="local",
            num_cpus=0,  # of what Ray gives away: our workers ask for none, and no process starts before they do
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=directory,
            _node_ip_address=LOOPBACK,
        )
        address = ray.nodes()[0]["NodeManagerAddress"]
        if address != LOOPBACK:
            raise RuntimeError(f"this version, {ray.__version__}, listens on {address}, not on the loopback interface")
    except BaseException as error:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, Exception):
            raise EngineError(f"engine.ray=auto: Ray does not start ({_line(error)})") from error
        raise
    return Cluster(ray=ray, directory=directory)


def _join(ray: Any, address: str) -> Cluster:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()  # Ray tries for minutes
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray's own kinds, OSError, RuntimeError, ValueError
        ray.shutdown()
        raise EngineError(f"engine.ray={address}: cannot be joined from this machine ({_line(error)})") from error
    return Cluster(ray=ray)


@contextlib.contextmanager
def _environment(*, own: bool) -> Iterator[None]:
    """Ray's settings, read when it is imported and started. They are taken back: other children need no token."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if own:
        wanted |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its switch for the loopback interface, on Linux too
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _token(),
            "RAY_process_group_cleanup_enabled": "1",  # the processes of a killed vLLM end with it
        }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@cache  # Ray keeps the first one for the life of the process
def _token() -> str:
    return secrets.token_hex(32)


def _on_sigterm(handler: Any) -> None:
    """Ray's own handler prints a trace and leaves its files."""
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


def _exit(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
