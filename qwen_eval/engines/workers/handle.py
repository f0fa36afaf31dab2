"""One worker as the driver sees it: its process, its calls under way, the requests it holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_eval.core import EngineError, Request
from qwen_eval.engines.workers.batches import BatchQueue
from qwen_eval.engines.workers.cluster import Cluster
from qwen_eval.engines.workers.worker import EngineWorker, OpenedWorker, Slice

COUNTS = ("computed_tokens", "prompt_tokens", "generated_tokens", "busy_s", "num_oom")  # of Engine.info
CALLS_AHEAD = 2  # of a worker: while the driver reads one slice the next is made
MAX_STARTS = 3  # deaths in a row of a worker that has never loaded its model: it cannot
MAX_RESTARTS = 10  # the same of one that had: its machine was short of memory, or kills processes
MAX_DEATHS = 6  # of one worker in a row without an answer: enough to single out a request that kills it, and one more
CLOSE_S = 60.0  # to end the processes of an engine that has some


class ActorHandle:
    """`held`: requests that this worker was given and has not answered, in order (the values say nothing)."""

    def __init__(self, cluster: Cluster, number: int, *, arguments: tuple[Any, ...], num_gpus: int) -> None:
        self._cluster, self.number = cluster, number
        self._arguments, self._num_gpus = arguments, num_gpus
        self.opened: OpenedWorker | None = None
        self.info: Mapping[str, Any] = {}
        self.calls: deque[Any] = deque()
        self.held: dict[int, bool] = {}
        self.has_opened = False
        self._num_deaths = self._num_lost_starts = 0  # in a row: while it answered, while it loaded its model
        self._is_suspect = False  # what it holds
        self._past: dict[str, Any] = {}  # what those that died had counted
        self.begin(0)
        self._start()

    def begin(self, run: int) -> None:
        """Forget an earlier run: its slices are not read any more."""
        self._run = run
        self._is_busy = bool(self.held)
        self.held = {}
        self._num_given = self._num_started = 0
        if self.opened is not None:
            self.calls.clear()

    def feed(self, queue: BatchQueue, requests: Sequence[Request]) -> None:
        """Keep calls under way while there is work. A batch is given when the one before it was begun."""
        if self.opened is None:
            return
        while len(self.calls) < CALLS_AHEAD:
            indexes = self._taken(queue)
            if not indexes and not self.held:
                return
            self.held |= dict.fromkeys(indexes, True)
            self._num_given += bool(indexes)
            batch = [(index, requests[index]) for index in indexes]
            self.calls.append(self.actor.more.remote(self._run, batch))

    def _taken(self, queue: BatchQueue) -> list[int]:
        """The next batch; [] while there is none to give. Nothing is given beside a batch of suspects."""
        if self._num_given != self._num_started or (self.held and (self._is_suspect or queue.is_suspect_next)):
            return []
        self._is_suspect = queue.is_suspect_next
        return queue.take()

    @property
    def is_new(self) -> bool:
        """Whether its first process is loading the model."""
        return not self.has_opened and not self._num_lost_starts

    def note(self, result: OpenedWorker | Slice) -> None:
        if isinstance(result, OpenedWorker):
            self.opened, self.info = result, result.info
            self.has_opened, self._num_lost_starts = True, 0
            return
        self.info = result.info
        if result.run == self._run:
            self._num_started = result.num_started
        if result.answers:
            self._num_deaths = 0

    def restart(self, death: Exception, under_way: str = "") -> None:
        """A new process in place of one that died over `under_way`; EngineError after too many deaths."""
        if self.opened is None:
            self._num_lost_starts += 1
            self._refuse(death, self._num_lost_starts, "while it loaded the model", self._most_starts)
        elif under_way:
            self._num_deaths += 1
            self._refuse(death, self._num_deaths, f"without an answer, at last over {under_way}", MAX_DEATHS)
        self.kill()
        self._past = {key: self.count(key) for key in COUNTS}
        self.info = {key: 0 if key in COUNTS else value for key, value in self.info.items()}
        self.held = {}
        self._num_given = self._num_started = 0
        self._start()

    @property
    def _most_starts(self) -> int:
        return MAX_RESTARTS if self.has_opened else MAX_STARTS

    def _refuse(self, death: Exception, num: int, when: str, most: int) -> None:
        if num >= most:
            reason = " ".join(str(death).split())
            raise EngineError(
                f"worker {self.number} died {num} times in a row {when}; what is graded is stored, "
                f"the same command asks for the rest ({reason[:300]})"
            )

    def count(self, key: str) -> Any:
        return self._past.get(key, 0) + self.info.get(key, 0)

    def close(self) -> None:
        """End the engine, which may have processes of its own, then its process. A busy one is ended at once."""
        if self.opened is not None and not self._is_busy:
            self._cluster.ray.wait([self.actor.close.remote()], timeout=CLOSE_S)
        self.kill()

    def kill(self) -> None:
        self._cluster.ray.kill(self.actor)

    def _start(self) -> None:
        options: dict[str, Any] = {"num_cpus": 0 if self._cluster.directory else 1, "num_gpus": self._num_gpus}
        options |= {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        actor = self._cluster.ray.remote(EngineWorker).options(**options)
        self.actor: Any = actor.remote(*self._arguments)
        self.opened = None
        self.calls = deque([self.actor.open.remote()])
