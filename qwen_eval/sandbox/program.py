"""What goes into the sandbox and what comes out."""

from __future__ import annotations

import ast
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


def called_function(test: str, reference: str) -> str:
    """The function of the `reference` solution that `test` calls: the entry point where a benchmark names none (MBPP).

    The last one defined where there are several; "" where there is none.
    """
    defined = [node.name for node in ast.parse(reference).body if isinstance(node, ast.FunctionDef)]
    used = {node.func.id for node in ast.walk(ast.parse(test)) if _is_plain_call(node)}  # type: ignore[attr-defined]
    return next((name for name in reversed(defined) if name in used), "")


def _is_plain_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
