"""What runs in a worker's process: one engine, asked batch by batch, answering in slices."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import JSON, Answer, Engine, LocatesNonFinite, MayFail, QwenEvalError, Request, Tokenizer
from qwen_eval.engines.kinds import open_engine

SLICE_S = 0.2  # a killed worker loses what it answered since its last slice
PACKAGES = ("qwen_eval", "torch", "transformers", "tokenizers", "tiktoken")  # must be equal everywhere

Batch = Sequence[tuple[int, Request]]  # with the index of the request in the run


@dataclass(frozen=True, kw_only=True)
class OpenedWorker:
    """What the driver must know of a loaded engine. `tokenizer` renders there, too."""

    info: Mapping[str, JSON]
    tokenizer: Tokenizer
    host: str
    pid: int
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Answers since the last slice. `num_started`: batches of the run that were begun so far."""

    run: int
    answers: list[tuple[int, Answer]] = field(default_factory=list)
    failures: Mapping[int, str] = field(default_factory=dict)
    num_started: int
    info: Mapping[str, JSON]
    error: QwenEvalError | None = None  # what ended the batch


class EngineWorker:
    """Made by Ray, in a process of its own. Every method is called by the driver; one runs at a time."""

    def __init__(self, spec: EngineSpec, model: ModelSpec, protocol: str, num_threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # before torch is imported
        self._spec, self._model, self._protocol = spec, model, protocol
        self._engine: Engine | None = None
        self._waiting: deque[Batch] = deque()
        self._answers: Iterator[tuple[int, Answer]] | None = None  # of the batch under way
        self._indexes: list[int] = []
        self._run = self._num_started = self._num_left = 0

    def open(self) -> OpenedWorker:
        self._engine = open_engine(self._spec, self._model, protocol=self._protocol)
        assert self._engine.tokenizer is not None, f"engine={self._spec.name} has no tokenizer"
        return OpenedWorker(
            info=dict(self._engine.info),
            tokenizer=self._engine.tokenizer,
            host=socket.gethostname(),
            pid=os.getpid(),
            versions=versions(),
        )

    def more(self, run: int, batch: Batch) -> Slice:
        """Add a batch ([] adds none), and answer for a moment. Batches of an earlier run are given up."""
        assert self._engine is not None, "not opened"
        if run != self._run:
            self._abandon(run)
        if batch:
            self._waiting.append(batch)
        answers: list[tuple[int, Answer]] = []
        failures: dict[int, str] = {}
        error: QwenEvalError | None = None
        try:
            self._answer_for(SLICE_S, answers, failures)
        except QwenEvalError as raised:
            error, self._answers = raised, None
        return Slice(
            run=run,
            answers=answers,
            failures=failures,
            num_started=self._num_started,
            info=dict(self._engine.info),
            error=error,
        )

    def locate_non_finite(self, request: Request) -> str | None:
        """None where this engine cannot look into its model."""
        return self._engine.locate_non_finite(request) if isinstance(self._engine, LocatesNonFinite) else None

    def sees(self, path: str) -> bool:
        return Path(path).exists()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _answer_for(self, seconds: float, answers: list[tuple[int, Answer]], failures: dict[int, str]) -> None:
        end_s = time.monotonic() + seconds
        while self._answers is not None or self._waiting:
            if self._answers is None:
                self._start()
            assert self._answers is not None
            item = next(self._answers, None)
            if item is not None:
                answers.append((self._indexes[item[0]], item[1]))
                self._num_left -= 1
            else:
                lost: Mapping[int, str] = self._engine.failures if isinstance(self._engine, MayFail) else {}
                failures |= {self._indexes[i]: reason for i, reason in lost.items()}
                assert self._num_left == len(lost), f"{self._num_left} requests without answer, {len(lost)} failures"
                self._answers = None
            if time.monotonic() >= end_s:
                return

    def _abandon(self, run: int) -> None:
        self._run, self._num_started, self._answers = run, 0, None
        self._waiting.clear()

    def _start(self) -> None:
        assert self._engine is not None
        batch = self._waiting.popleft()
        self._indexes, self._num_left = [index for index, _ in batch], len(batch)
        self._answers = iter(self._engine.run([request for _, request in batch]))
        self._num_started += 1


def versions() -> dict[str, str]:
    """Without the build tag: one machine may compute on CUDA, another on its CPU."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
