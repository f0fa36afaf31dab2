"""The engine in use is kept: runs that differ only in the task share it, and load the model once."""

from __future__ import annotations

from types import TracebackType

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec
from qwen_eval.core import Engine
from qwen_eval.engines.kinds import identity, open_engine


class EngineCache:
    """Keeps the last engine until another one is needed: `with EngineCache() as cache: ...` frees it at the end."""

    def __init__(self) -> None:
        self._key: tuple[EngineSpec, ModelSpec, str] | None = None
        self.engine: Engine | None = None

    def open(self, spec: EvalSpec) -> Engine:
        key = (spec.engine, spec.model, spec.protocol)
        if self.engine is None or key != self._key or not self._is_current(spec):
            self.close()  # before the next one loads: two models rarely fit
            self.engine, self._key = open_engine(spec.engine, spec.model, protocol=spec.protocol), key
        return self.engine

    def _is_current(self, spec: EvalSpec) -> bool:
        """Whether the checkpoint or the server is still the one that was opened."""
        assert self.engine is not None
        opened = self.engine.info.get("weights")
        return opened is None or opened == identity(spec.engine, spec.model)

    def __enter__(self) -> EngineCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = self._key = None
