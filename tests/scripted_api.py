"""A real loopback server whose every reply is a script's: bytes, headers and status as the test wants them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

Script: TypeAlias = Callable[[str, dict[str, Any]], Any]  # (path, body) -> JSON, bytes or a Raw


class Raw:
    """A reply that is no plain JSON. `pause_s`: between two of its bytes; `is_cut`: it ends too early."""

    def __init__(
        self, data: bytes, *, status: int = 200, pause_s: float = 0.0, is_cut: bool = False, **headers: str
    ) -> None:
        self.data, self.status, self.pause_s, self.is_cut = data, status, pause_s, is_cut
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Scripted(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.seen = script, list[tuple[str, dict[str, Any]]]()
        self.models: list[dict[str, Any]] = [{"id": "m"}]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self._send(Raw(json.dumps({"object": "list", "data": self.server.models}).encode()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        found = self.server.script(self.path, body)
        self._send(found if isinstance(found, Raw) else Raw(json.dumps(found).encode()))

    def _send(self, reply: Raw) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(reply.data) + reply.is_cut))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not reply.pause_s:
            self.wfile.write(reply.data)
            return
        for byte in reply.data:
            self.wfile.write(bytes([byte]))
            time.sleep(reply.pause_s)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(script: Script, *, port: int = 0) -> Iterator[Scripted]:
    server = Scripted(script, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str = "A", *, tops: dict[str, float] | None = None, **choice: Any) -> dict[str, Any]:
    """A good reply of `/completions`."""
    row = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": {"top_logprobs": [tops]} if tops else None}
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return {"id": "x", "object": "text_completion", "created": 0, "choices": [row | choice], "usage": usage}


def chat(content: str | None = "A", **choice: Any) -> dict[str, Any]:
    """A good reply of `/chat/completions`."""
    row = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return completion() | {"choices": [row | choice]}
