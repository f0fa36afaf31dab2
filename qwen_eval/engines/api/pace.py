"""How many requests are in flight, and when the next may be sent: as many as asked for, fewer while a server is busy.

Half as many when the server says "too many", nine tenths where it also says how long to wait, since waiting helps then;
a quarter more after as many successes as there are in flight.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import re
import time
from collections.abc import Mapping
from types import TracebackType

MAX_PAUSE_S = 300.0  # a server that asks for more is asked again all the same
FIRST_PAUSE_S = 0.5
CUT, CUT_WITH_PAUSE, GROWTH = 0.5, 0.9, 0.25
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?")


class Pace:
    """Used inside one event loop: `async with pace:` holds one of the places in flight."""

    def __init__(self, most: int) -> None:
        self._most, self._limit, self._in_flight = most, float(most), 0
        self._open_at = self._cut_at = 0.0
        self._good_at = time.monotonic()
        self._free = asyncio.Condition()
        self.most_in_flight = 0

    @property
    def limit(self) -> int:
        return int(self._limit)

    async def __aenter__(self) -> None:
        async with self._free:
            await self._free.wait_for(lambda: self._in_flight < self.limit)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._free:
            self._in_flight -= 1
            self._free.notify(2)  # the place that is left, and the one that a success may have added

    async def opened(self) -> None:
        """Wait as long as the server asked all of us to wait."""
        while (left := self._open_at - time.monotonic()) > 0:
            await asyncio.sleep(left * random.uniform(1.0, 1.1))  # not all at the same moment

    def succeeded(self) -> None:
        self._limit = min(self._most, self._limit + GROWTH)
        self._good_at = time.monotonic()

    def idle_s(self, since: float) -> float:
        """Seconds without a good reply to anybody, since that moment at most."""
        return time.monotonic() - max(since, self._good_at)

    def too_many(self, sent_at: float, pause_s: float | None) -> None:
        """Fewer, once for all requests that were in flight together; and hold all back for `pause_s`."""
        if sent_at >= self._cut_at:
            cut = CUT_WITH_PAUSE if pause_s else CUT
            self._limit, self._cut_at = max(1.0, self._limit * cut), time.monotonic()
        if pause_s:
            self._open_at = max(self._open_at, time.monotonic() + pause_s)

    def heed(self, headers: Mapping[str, str]) -> None:
        """The rate limit of a good reply: with no request left, wait until there are new ones."""
        if headers.get("x-ratelimit-remaining-requests", "").strip() == "0":
            reset_s = duration_s(headers.get("x-ratelimit-reset-requests", ""))
            self._open_at = max(self._open_at, time.monotonic() + min(reset_s or 0.0, MAX_PAUSE_S))


def retry_pause_s(attempt: int) -> float:
    """0.5 s, 1 s, 2 s … 60 s, with up to half of it taken off at random."""
    return float(min(60.0, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0))


def asked_pause_s(headers: Mapping[str, str]) -> float | None:
    """What `retry-after-ms` or `retry-after` (seconds, or a date) say; None where they say nothing."""
    found = _number(headers.get("retry-after-ms", ""))
    if found is not None:
        return min(found / 1000, MAX_PAUSE_S)
    text = headers.get("retry-after", "")
    found = _number(text)
    if found is None and text:
        try:
            found = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return duration_s(headers.get("x-ratelimit-reset-requests", ""))
    return None if found is None else min(max(found, 0.0), MAX_PAUSE_S)


def duration_s(text: str) -> float | None:
    """`"6m0s"` -> 360.0, `"20ms"` -> 0.02, `"1.5"` -> 1.5; None for anything else."""
    number = _number(text)
    if number is not None:
        return number
    found = _DURATION.fullmatch(text.strip())
    if not found or not any(found.groups()):
        return None
    values = [_number(part or "0") or 0.0 for part in found.groups()]
    return values[0] * 3600 + values[1] * 60 + values[2] + values[3] / 1000


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
