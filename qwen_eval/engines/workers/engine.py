"""An engine that hands its requests to workers, each with an engine of its own, and yields what they answer.

The run does not know: it sees one engine. A worker that dies is started again, and what it held is asked again.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen_eval.activity import stage
from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import JSON, Answer, ConfigError, EngineError, Prompt, QwenEvalError, Rendered, Request, Score
from qwen_eval.engines.workers.batches import BatchQueue, beginning
from qwen_eval.engines.workers.cluster import Cluster, connect
from qwen_eval.engines.workers.handle import COUNTS, ActorHandle
from qwen_eval.engines.workers.worker import OpenedWorker, Slice, versions

MUST_AGREE = ("weights", "dtype", "chat_template")  # of Engine.info: they decide answers
SUSPECTS_SHARE = 8  # a batch over which a worker died is asked again in parts of this fraction of it
MAX_DEATHS_ALONE = 3  # over one request, with nothing else under way: it has no answer
SHOWN_CHARACTERS = 60  # of a prompt, in an error
RENDER_CACHE = 4096  # prompts: the run renders each again when it stores the record
WAIT_S = 1.0  # Ctrl-C is heard at least so often


class WorkersEngine:
    """Engine of a run over `handles`, whose workers are opened. `prepared` says how they were made, for the result."""

    def __init__(self, cluster: Cluster, handles: Sequence[ActorHandle], *, prepared: Mapping[str, JSON]) -> None:
        self._cluster, self._handles, self._prepared = cluster, handles, dict(prepared)
        first = handles[0].opened
        assert first is not None, "not opened"
        self._tokenizer: Any = first.tokenizer
        self._render_ids = lru_cache(maxsize=RENDER_CACHE)(lambda prompt: tuple(self._tokenizer.render(prompt)))
        self._run = 0
        self.failures: dict[int, str] = {}
        self._deaths_alone: Counter[int] = Counter()  # of this run, by request
        self.num_restarts = 0

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def info(self) -> Mapping[str, JSON]:
        """What is equal in all workers; counts are sums; of the rest the value of each worker."""
        infos = [handle.info for handle in self._handles]
        merged: dict[str, Any] = {}
        for key, value in infos[0].items():
            values = [info.get(key) for info in infos]
            if key in COUNTS:
                merged[key] = sum(handle.count(key) for handle in self._handles)
            else:
                merged[key] = value if all(other == value for other in values) else values
        merged["workers"] = {**self._prepared, "restarts": self.num_restarts}
        if self.num_restarts:
            merged["warnings"] = [*merged.get("warnings", ()), _restarts_note(self.num_restarts)]
        return merged

    @property
    def holding(self) -> dict[int, int]:
        """Process of each worker that has loaded its model (on its own machine) -> requests it has not answered."""
        return {handle.opened.pid: len(handle.held) for handle in self._handles if handle.opened is not None}

    def render(self, prompt: Prompt) -> Rendered:
        return Rendered(text=self._tokenizer.render_text(prompt), ids=self._render_ids(prompt))

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        self.failures = {}
        self._deaths_alone.clear()
        self._run += 1
        requests = self._reachable(requests)
        queue = BatchQueue(requests, len(self._handles))
        for handle in self._handles:
            handle.begin(self._run)
        try:
            while len(queue) or any(handle.held for handle in self._handles):
                for handle in self._handles:
                    handle.feed(queue, requests)
                for handle in self._ready():
                    yield from self._taken(handle, queue, requests)
        finally:
            for handle in self._handles:
                handle.begin(0)  # what is still under way is of no interest any more

    def locate_non_finite(self, request: Request) -> str:
        handle = self._handles[0]
        found = self._cluster.ray.get(handle.actor.locate_non_finite.remote(request))
        return found or f"a layer in {handle.info.get('dtype', 'unknown dtype')}"

    def close(self) -> None:
        for handle in self._handles:
            handle.close()
        self._cluster.close()

    def _ready(self) -> list[ActorHandle]:
        """Workers whose oldest call has returned."""
        heads = {handle.calls[0]: handle for handle in self._handles if handle.calls}
        done, _ = self._cluster.ray.wait(list(heads), num_returns=1, timeout=WAIT_S)
        if not done:
            self._cluster.refuse_loss()
        return [heads[call] for call in done]

    def _taken(
        self, handle: ActorHandle, queue: BatchQueue, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer]]:
        result = received(self._cluster.ray, handle)
        if isinstance(result, OpenedWorker):
            check_equal(self._handles)
        elif isinstance(result, Slice):
            for index, answer in result.answers:
                if handle.held.pop(index, None) is not None:
                    yield index, answer
            for index, reason in result.failures.items():
                if handle.held.pop(index, None) is not None:
                    self.failures[index] = reason
            if result.error is not None:
                raise result.error
        else:
            self.num_restarts += 1
            under_way = [index for index in handle.held if not self._is_given_up(index, handle)]
            queue.give_back(under_way, most=max(1, len(handle.held) // SUSPECTS_SHARE))
            handle.restart(result, described([requests[index] for index in handle.held]))

    def _is_given_up(self, index: int, handle: ActorHandle) -> bool:
        """Counts the death of a worker that held nothing else; that request fails where it is not the first time."""
        if len(handle.held) > 1:
            return False
        self._deaths_alone[index] += 1
        if self._deaths_alone[index] < MAX_DEATHS_ALONE:
            return False
        self.failures[index] = f"{MAX_DEATHS_ALONE} workers died while they answered it alone"
        return True

    def _reachable(self, requests: Sequence[Request]) -> list[Request]:
        """Hidden states are written by the workers: their directory must be one and the same for all."""
        folders = {request.keep_hidden for request in requests if isinstance(request, Score)} - {None}
        for folder in folders:
            assert folder is not None
            self._check_shared(Path(folder).absolute())
        return [
            dataclasses.replace(request, keep_hidden=str(Path(request.keep_hidden).absolute()))
            if isinstance(request, Score) and request.keep_hidden
            else request
            for request in requests
        ]

    def _check_shared(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".shared-") as probe:
            seen = self._cluster.ray.get([handle.actor.sees.remote(probe.name) for handle in self._handles])
        for handle, is_seen in zip(self._handles, seen):
            if not is_seen:
                assert handle.opened is not None
                raise EngineError(
                    f"keep_hidden=true: {handle.opened.host} does not see {folder}; put run_dir= on a file system "
                    "that all machines share"
                )


def received(ray: Any, handle: ActorHandle) -> OpenedWorker | Slice | Exception:
    """What the oldest call of a worker returned; the exception where its process died. An error of ours is raised."""
    call = handle.calls.popleft()
    try:
        result: OpenedWorker | Slice = ray.get(call)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if not isinstance(cause, QwenEvalError):
            raise
        if handle.is_new:
            raise cause from None
        return cause  # as it loads again: memory of the dead one may not be free yet
    except ray.exceptions.RayError as error:
        death: Exception = error
        return death
    handle.note(result)
    return result


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> WorkersEngine:
    """Start the workers and wait until all have loaded the model; what keeps one from it is raised, in one line."""
    _refuse(spec)
    cluster = connect(spec.ray)
    handles: list[ActorHandle] = []
    try:
        if cluster.room is not None and spec.workers > cluster.room:
            raise EngineError(f"engine.workers={spec.workers}: each takes a CPU, and Ray has {cluster.room}; use fewer")
        num_gpus = _gpus_each(cluster, spec, model)
        if num_gpus == 0 and cluster.directory is not None and spec.workers > max(2, cluster.num_cpus):
            raise EngineError(f"engine.workers={spec.workers}: this machine has {cluster.num_cpus} CPUs; use fewer")
        num_threads = spec.num_threads or _threads_each(cluster, spec.workers)
        arguments = (_worker_spec(spec, cluster, num_threads, num_gpus), _worker_model(model), protocol, num_threads)
        for number in range(spec.workers):
            handles.append(ActorHandle(cluster, number, arguments=arguments, num_gpus=num_gpus))
        _wait_opened(cluster, handles)
        check_equal(handles)
        prepared: dict[str, JSON] = {"num": spec.workers, "gpus_each": num_gpus, "threads_each": num_threads}
        prepared |= {"hosts": sorted({h.opened.host for h in handles if h.opened}), "ray": cluster.ray.__version__}
        return WorkersEngine(cluster, handles, prepared=prepared)
    except BaseException:
        for handle in handles:
            handle.kill()
        cluster.close()
        raise


def _wait_opened(cluster: Cluster, handles: Sequence[ActorHandle]) -> None:
    with stage("starting the workers", total=len(handles), unit="workers") as starting:
        while opening := {handle.calls[0]: handle for handle in handles if handle.calls}:
            done, _ = cluster.ray.wait(list(opening), num_returns=1, timeout=WAIT_S)
            if not done:
                cluster.refuse_loss()
            for handle in (opening[call] for call in done):
                result = received(cluster.ray, handle)
                if isinstance(result, Exception):
                    handle.restart(result)
                else:
                    starting.advance()


def described(requests: Sequence[Request]) -> str:
    """The first of these requests by the end of its prompt, and how many there are; "" for none."""
    if not requests:
        return ""
    prompt = requests[0].prompt
    text = f"{len(prompt.ids)} token ids" if prompt.ids is not None else beginning(prompt).replace("\0", " ")
    shown = " ".join(text.split())[-SHOWN_CHARACTERS:]
    return f'the request that ends on "{shown}"' + (f" and {len(requests) - 1} others" if len(requests) > 1 else "")


def check_equal(handles: Sequence[ActorHandle]) -> None:
    """EngineError where a worker would answer otherwise than this process or the first one."""
    opened = [handle.opened for handle in handles if handle.opened is not None]
    for other in opened:
        for name, version in versions().items():
            if other.versions.get(name) != version:
                raise EngineError(
                    f"{other.host} has {name} {other.versions.get(name)}, this machine has {version}; install the same "
                    "packages on all machines"
                )
        for key in MUST_AGREE:
            if other.info.get(key) != opened[0].info.get(key):
                raise EngineError(
                    f"workers differ in {key}: {opened[0].host} has {opened[0].info.get(key)}, {other.host} has "
                    f"{other.info.get(key)}; name it, or use machines of one kind"
                )


def _refuse(spec: EngineSpec) -> None:
    if spec.executor == "ray":
        raise ConfigError(
            "engine.executor=ray spreads one model over a cluster, engine.workers many of them: use one of the two"
        )


def _gpus_each(cluster: Cluster, spec: EngineSpec, model: ModelSpec) -> int:
    """GPUs of one worker: those of its tensor and pipeline parallel, 0 where there are none or none are wanted."""
    if model.device.startswith("cuda:"):
        raise ConfigError(f"model.device={model.device}: each worker has a GPU of its own; use model.device=cuda")
    if model.device == "cpu" or (cluster.num_gpus == 0 and model.device == "auto"):
        return 0
    each = spec.tensor_parallel * spec.pipeline_parallel
    if spec.workers * each > cluster.num_gpus:
        raise EngineError(
            f"engine.workers={spec.workers} with {each} GPUs each: there are {cluster.num_gpus}; "
            f"use engine.workers={cluster.num_gpus // each} or fewer"
        )
    return each


def _threads_each(cluster: Cluster, num_workers: int) -> int:
    """OMP_NUM_THREADS where it is set, else an even share of a machine's CPUs."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return max(1, cluster.num_cpus // _on_one_machine(cluster, num_workers))


def _on_one_machine(cluster: Cluster, num_workers: int) -> int:
    return -(-num_workers // max(1, cluster.num_nodes))


def _worker_spec(spec: EngineSpec, cluster: Cluster, num_threads: int, num_gpus: int) -> EngineSpec:
    """That of one engine. Workers on CPUs share their machine's memory; vLLM's processes stay within its worker."""
    share = 1 if num_gpus else _on_one_machine(cluster, spec.workers)
    changed: dict[str, Any] = {"workers": 1, "ray": "auto", "memory_fraction": spec.memory_fraction / share}
    if spec.name == "native":
        changed["num_threads"] = num_threads
    if spec.tensor_parallel * spec.pipeline_parallel > 1 and spec.executor == "auto":
        changed["executor"] = "mp"  # left to itself, vLLM takes Ray where it finds itself in a process of Ray's
    return dataclasses.replace(spec, **changed)


def _worker_model(model: ModelSpec) -> ModelSpec:
    """A relative path would be looked for in another directory."""
    return model if model.path is None else dataclasses.replace(model, path=str(Path(model.path).absolute()))


def _restarts_note(num: int) -> str:
    return f"{num} workers died and were started again; what they held was asked again"
