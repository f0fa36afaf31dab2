"""Many requests in flight from ordinary code: one event loop in one thread, answers through a queue.

Back-pressure: while nobody takes the answers, nothing more is asked. In flight and unread together are bounded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from qwen_eval.engines.api.faults import RequestFailed

UNREAD = 2  # times the workers: requests in flight and answers that nobody has taken yet
STOP_S = 5.0

Q = TypeVar("Q")
A = TypeVar("A")


class LoopThread:
    """Runs coroutines until it is closed. A daemon: it never keeps a process alive."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, A]) -> Future[A]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, A]) -> A:
        """The result; an interrupt of the caller ends the work too."""
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()

    @property
    def is_closed(self) -> bool:
        return self.loop.is_closed()

    def close(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(STOP_S)
        if not self.loop.is_running():
            self.loop.close()


class Crew(Generic[Q, A]):
    """`num_workers` coroutines that share one list of requests."""

    def __init__(self, thread: LoopThread, ask: Callable[[Q], Awaitable[A]], num_workers: int) -> None:
        self._thread, self._ask, self._num_workers = thread, ask, num_workers
        self._done: SimpleQueue[tuple[int, A | RequestFailed] | None] = SimpleQueue()  # None: no more will come
        self._stopped = threading.Event()

    def answers(self, requests: Sequence[Q]) -> Iterator[tuple[int, A | RequestFailed]]:
        """(index, answer or why there is none), as they come. Whatever else is raised ends the asking at once."""
        unread = asyncio.Semaphore(UNREAD * self._num_workers)
        future = self._thread.start(self._all(requests, unread))
        future.add_done_callback(lambda _: self._done.put(None))
        try:
            while (item := self._done.get()) is not None:
                self._thread.loop.call_soon_threadsafe(unread.release)
                yield item
            future.result()
        finally:  # also where the caller stops early: nothing more is asked, requests cost money
            if not future.done():
                future.cancel()
                self._stopped.wait(STOP_S)

    async def _all(self, requests: Sequence[Q], unread: asyncio.Semaphore) -> None:
        upcoming = iter(enumerate(requests))
        workers = [
            asyncio.ensure_future(self._work(upcoming, unread)) for _ in range(min(self._num_workers, len(requests)))
        ]
        try:
            await asyncio.gather(
                *workers
            )  # where this is cancelled, they are: a second time would break their clean-up
        except Exception:
            for worker in workers:
                worker.cancel()
            raise
        finally:
            await asyncio.gather(*workers, return_exceptions=True)
            self._stopped.set()

    async def _work(self, upcoming: Iterator[tuple[int, Q]], unread: asyncio.Semaphore) -> None:
        for index, request in upcoming:
            await unread.acquire()
            answer: A | RequestFailed
            try:
                answer = await self._ask(request)
            except RequestFailed as failed:
                answer = failed
            self._done.put((index, answer))
