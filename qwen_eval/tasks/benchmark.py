"""What all tasks share: spec, base or chat form, protocol, where the rows come from, and what is said of them."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

from qwen_eval.config import TaskSpec
from qwen_eval.core import JSON, ConfigError
from qwen_eval.data.rows import Source
from qwen_eval.data.sources import nearest, open_source
from qwen_eval.tasks.registry import TaskContext

MODES = ("auto", "base", "chat")

SpecT = TypeVar("SpecT", bound=TaskSpec)


class Benchmark(ABC, Generic[SpecT]):
    """Subclasses say which samples there are, how one is asked and graded, and what is reported."""

    version: ClassVar[int] = 1  # raise it when prompts, grading or aggregation change
    bundled: ClassVar[str | None] = None  # the folder of the bundled sample; None: the task's name

    def __init__(self, spec: SpecT, context: TaskContext):
        if spec.mode not in MODES:
            raise ConfigError(f"task.mode={spec.mode}: one of {', '.join(MODES)}{nearest(spec.mode, MODES)}")
        self.spec, self.context, self.name = spec, context, spec.name
        self.is_chat = context.is_chat if spec.mode == "auto" else spec.mode == "chat"
        self.is_upstream = context.protocol == "upstream"

    def open(self) -> Source:
        return open_source(self.spec, bundled=self.bundled or self.name)

    @cached_property
    def source(self) -> Source:
        return self.open()

    @property
    def form(self) -> str:
        return "chat" if self.is_chat else "base"

    @property
    def reply_tokens(self) -> int:
        return self.context.reply_tokens(self.spec, is_chat=self.is_chat)

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the result must know of the data."""
        return ()

    def describe(self) -> Mapping[str, JSON]:
        """Which rows, read by which version; the digest is that of all files read so far."""
        return {"origin": self.source.origin, "data_sha256": self.source.sha256, "version": self.version}
