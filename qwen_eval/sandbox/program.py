"""What goes into the sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from qwen_eval.core import QwenEvalError

Mode: TypeAlias = Literal["auto", "bubblewrap", "namespaces", "unsafe"]


class SandboxError(QwenEvalError):
    """Confinement that cannot be had, or that does not hold."""


@dataclass(frozen=True)
class Program:
    """One program to judge.

    `solution` is untrusted: the complete text up to the tests. `test` and `prelude` are the benchmark's and trusted:
    they run in the judge, never beside the solution. `test` raises on failure; where it defines `check`, that is called
    with the entry point. `prelude` is the benchmark's own text before the solution (HumanEval's prompt): what the test
    uses of it, such as helper functions, comes from there and never from the candidate.
    """

    id: str
    solution: str
    test: str
    entry_point: str
    prelude: str = ""


@dataclass(frozen=True)
class Verdict:
    """`reason`: "passed", "failed: ...", "timed out", "memory", "output", "killed: ..." or "error: ..."."""

    passed: bool
    reason: str
    wall_s: float
