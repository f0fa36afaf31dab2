"""JSON over HTTP with a guaranteed end: every try has a time limit, every body a bound, every run a budget of retries.

A server is not trusted: what it sends is read up to a bound, also once unpacked, and what it says is cleaned.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio
import httpx2 as httpx

from qwen_eval.core import JSON, EngineError
from qwen_eval.engines.api.faults import Fault, RequestFailed, safe_text
from qwen_eval.engines.api.pace import MAX_PAUSE_S, Pace, asked_pause_s, retry_pause_s
from qwen_eval.engines.endpoint import public_url

MAX_BODY_BYTES = 64 << 20
MAX_HELD_BYTES = 512 << 20  # of all bodies that are being read
CONNECT_S = 20.0
MAX_BUSY_S = 900.0  # without one good reply to anybody
DOWN_S = 10.0  # a retry: how long a server that is not there is waited for
DOWN_PAUSE_S = 5.0  # at most, so that its return is seen
NO_MONEY = "insufficient_quota"  # OpenAI's word, sent with 429: waiting does not help
MIN_RETRIES = 50  # of a run, however few its requests
FOR_ALL = (401, 403, 404)  # no other request of this run would fare better
TRANSIENT = (408, 409, 425, 429)  # and every 5xx
BUSY = (429, 503, 529)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`retries` of one request; all retries of a run are at most `retry_share` of its requests."""

    concurrency: int = 16
    timeout_s: float = 600.0
    retries: int = 6
    retry_share: float = 1.0

    @property
    def down_s(self) -> float:
        return self.retries * DOWN_S

    @property
    def longest_s(self) -> float:
        """The end of every request, whatever the server does."""
        return (self.retries + 1) * (self.timeout_s + MAX_PAUSE_S)


class _Tries:
    """Of one request."""

    def __init__(self) -> None:
        self.begun_at = self.down_at = time.monotonic()
        self.num_busy = self.num_down = self.num_faults = 0

    def add(self, fault: Fault, sent_at: float) -> None:
        self.num_busy += fault.is_busy
        self.num_faults += not (fault.is_busy or fault.is_down)
        if not fault.is_down:
            self.num_down = 0
        elif not self.num_down:
            self.down_at = sent_at
        self.num_down += fault.is_down

    def pause_s(self, fault: Fault) -> float:
        if fault.pause_s is not None:
            return fault.pause_s
        if fault.is_down:
            return min(DOWN_PAUSE_S, retry_pause_s(self.num_down - 1))
        return retry_pause_s((self.num_busy if fault.is_busy else self.num_faults) - 1)


class EndpointClient:
    """Posts JSON to `url`; made and used inside one event loop."""

    def __init__(self, url: str, key: str | None, limits: Limits) -> None:
        self.url, self.public_url, self._key, self._limits = url.rstrip("/"), public_url(url.rstrip("/")), key, limits
        self.pace = Pace(limits.concurrency)
        self.num_requests = self.num_retries = 0
        self._held_bytes = 0
        self._headers = {"Accept-Encoding": "gzip, identity", "Content-Type": "application/json"}
        self._headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self._verify = (
            httpx.create_ssl_context() if self.url.startswith("https") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        )
        self._idle: list[httpx.AsyncClient] = []

    async def close(self) -> None:
        for http in self._idle:
            await http.aclose()

    def _connection(self) -> httpx.AsyncClient:
        """One for each place in flight: a pool looks through all of its connections for every request."""
        if self._idle:
            return self._idle.pop()
        timeout = httpx.Timeout(self._limits.timeout_s, connect=min(CONNECT_S, self._limits.timeout_s))
        single = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx.AsyncClient(headers=self._headers, limits=single, timeout=timeout, verify=self._verify)

    async def ask(self, path: str, body: JSON, read: Callable[[JSON], T]) -> T:
        """`read` of the reply to `body`; `read` raises Fault for a reply that makes no sense.

        RequestFailed where this request has no answer, EngineError where no request can have one.
        """
        data = json.dumps(body).encode()
        async with self.pace:
            self.num_requests += 1
            try:
                with anyio.fail_after(self._limits.longest_s):  # no task of its own, whose error could get lost
                    return await self._with_retries(path, data, read)
            except TimeoutError:
                raise RequestFailed(f"no answer in {self._limits.longest_s:.0f} s, all tries together") from None

    async def _with_retries(self, path: str, data: bytes, read: Callable[[JSON], T]) -> T:
        tries = _Tries()
        while True:
            await self.pace.opened()
            sent_at = time.monotonic()
            try:
                answer = read(await self._once(path, data))
            except Fault as fault:
                if fault.is_busy:
                    self.pace.too_many(sent_at, fault.pause_s)
                tries.add(fault, sent_at)
                self._spend(fault, tries)
                await asyncio.sleep(tries.pause_s(fault))
            else:
                self.pace.succeeded()
                return answer

    def _spend(self, fault: Fault, tries: _Tries) -> None:
        """One retry of this request and of the run. None for a server that is busy, or not there, for a while."""
        if fault.is_busy:
            if self.pace.idle_s(tries.begun_at) > MAX_BUSY_S:
                raise RequestFailed(f"{fault} (and no good reply for {MAX_BUSY_S / 60:.0f} minutes)") from None
            return
        if fault.is_down:
            if self.pace.idle_s(tries.down_at) >= self._limits.down_s:
                raise EngineError(f"{self.public_url}: {fault}, waited for {self._limits.down_s:.0f} s") from None
            return
        if tries.num_faults > self._limits.retries:
            raise RequestFailed(f"{fault} (asked {tries.num_faults} times)") from None
        budget = max(MIN_RETRIES, self._limits.retry_share * self.num_requests)
        if self.num_retries >= budget:
            raise RequestFailed(f"{fault} (and the run's {budget:.0f} retries are spent)") from None
        self.num_retries += 1

    async def _once(self, path: str, data: bytes) -> JSON:
        http = self._connection()
        try:
            with anyio.fail_after(self._limits.timeout_s):
                return await self._exchange(http, path, data)
        except (TimeoutError, httpx.TimeoutException):
            raise Fault(f"no whole reply within {self._limits.timeout_s:g} s (engine.timeout_s)") from None
        except httpx.ConnectError as error:
            raise Fault(f"no server answers ({safe_text(str(error), self._key)})", is_down=True) from None
        except (httpx.HTTPError, httpx.StreamError, ssl.SSLError, OSError) as error:
            reason = safe_text(str(error), self._key) or type(error).__name__
            raise Fault(f"the connection broke ({reason})") from None
        finally:
            self._idle.append(http)

    async def _exchange(self, http: httpx.AsyncClient, path: str, content: bytes) -> JSON:
        async with http.stream("POST", self.url + path, content=content) as reply:
            data = await self._body(reply)
        if reply.status_code == 200:
            self.pace.heed(reply.headers)
            return parsed(data)
        said = f"status {reply.status_code}: {safe_text(error_text(data), self._key)}"
        if reply.status_code in FOR_ALL or NO_MONEY.encode() in data[:4000]:
            raise EngineError(f"{self.public_url}{path}: {said}")
        if reply.status_code in TRANSIENT or reply.status_code >= 500:
            raise Fault(said, pause_s=asked_pause_s(reply.headers), is_busy=reply.status_code in BUSY)
        raise RequestFailed(said)

    async def _body(self, reply: httpx.Response) -> bytes:
        """The body, unpacked by us: a library would unpack a bomb before its size can be seen."""
        unpack = _unpacker(reply.headers.get("content-encoding", ""))
        parts, size = [], 0
        try:
            async for chunk in reply.aiter_raw():
                part = unpack(chunk, MAX_BODY_BYTES + 1 - size)
                parts.append(part)
                size += len(part)
                self._held_bytes += len(part)
                if size > MAX_BODY_BYTES:
                    raise Fault(f"a reply of more than {MAX_BODY_BYTES >> 20} MiB")
                if self._held_bytes > MAX_HELD_BYTES:
                    raise Fault(f"replies of more than {MAX_HELD_BYTES >> 20} MiB together")
        finally:
            self._held_bytes -= size
        return b"".join(parts)


def _unpacker(encoding: str) -> Callable[[bytes, int], bytes]:
    """(chunk, most bytes) -> its content. Bytes behind the bound are left packed; the caller stops there."""
    if encoding in ("", "identity"):
        return lambda chunk, most: chunk
    if encoding not in ("gzip", "x-gzip"):
        raise Fault(f"a reply packed as {safe_text(encoding)}, which was not asked for")
    inflater = zlib.decompressobj(wbits=31)

    def unpack(chunk: bytes, most: int) -> bytes:
        try:
            return inflater.decompress(chunk, max(1, most))
        except zlib.error:
            raise Fault("a reply that cannot be unpacked") from None

    return unpack


def parsed(data: bytes) -> JSON:
    """The JSON of a reply; Fault in plain words for everything else."""
    try:
        found: JSON = json.loads(data)
        return found
    except RecursionError:
        raise Fault("a reply nested too deep") from None
    except ValueError:
        pass
    start = data[:200].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise Fault("a web page instead of JSON; is engine.base_url= the address of an API, mostly .../v1?")
    raise Fault("an empty reply" if not start else f"{len(data)} bytes that are no JSON")


def error_text(data: bytes) -> str:
    """A server's own words on an error: the message in its JSON, else the beginning of its text."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        text = data[:4000].decode("utf-8", "replace")
        return "a web page" if text.lstrip().lower().startswith(("<!doctype", "<html")) else text
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail", "msg") if found.get(key)), "")
    return found if isinstance(found, str) else json.dumps(found)[:4000]
