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
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwen_eval.core import ConfigError, EngineError

EMBEDDED = "auto"
LOOPBACK = "127.0.0.1"
ADDRESS = re.compile(r"[\w.-]+:\d+|\[[\da-fA-F:]+\]:\d+")
OBJECT_STORE_BYTES = 256 << 20  # requests and answers pass through it; Ray's default is a third of the memory


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connection to Ray. `directory`: files of our own instance; None where it is somebody else's."""

    ray: Any  # the package
    directory: str | None

    @property
    def num_gpus(self) -> int:
        return int(self.ray.cluster_resources().get("GPU", 0))

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
        if self.directory is None:
            return
        self.ray.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)


def connect(address: str) -> Cluster:
    """Start Ray here ("auto") or join the cluster at HOST:PORT; EngineError in one line where that cannot be.

    Where this process is connected already, that connection is used, and stays.
    """
    if address != EMBEDDED and not ADDRESS.fullmatch(address):
        raise ConfigError(f"engine.ray={address}: auto starts Ray on this machine, HOST:PORT joins a cluster")
    with _environment(own=address == EMBEDDED):
        try:
            import ray
        except ImportError as error:
            raise EngineError("engine.workers needs the package ray: pip install 'qwen_eval[ray]'") from error
        if ray.is_initialized():
            return Cluster(ray=ray, directory=None)
        return _start(ray) if address == EMBEDDED else _join(ray, address)


def _start(ray: Any) -> Cluster:
    directory = tempfile.mkdtemp(prefix="qe-ray-", dir="/tmp")  # short: it holds sockets, whose paths have a limit
    try:
        ray.init(
            address="local",
            num_cpus=0,  # of what Ray gives away: our workers need none, and it starts no process before it is asked
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
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray's own kinds, ConnectionError, RuntimeError, ValueError
        ray.shutdown()
        raise EngineError(f"engine.ray={address}: cannot be joined from this machine ({_line(error)})") from error
    return Cluster(ray=ray, directory=None)


@contextlib.contextmanager
def _environment(*, own: bool) -> Iterator[None]:
    """Ray's settings, read when it is imported and started. They are taken back: other children need no token."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if own:
        wanted |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its switch for the loopback interface, on Linux too
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _token(),
            "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "1",  # those of a killed vLLM
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
