"""Runs generated programs in confinement and judges them from outside: a verdict the program cannot forge.

See docs/sandbox.md for the threat model and the decisions.
"""

from __future__ import annotations

from qwen_eval.sandbox.program import Mode, Program, SandboxError, Verdict
from qwen_eval.sandbox.selftest import run_programs, self_test

__all__ = ["Mode", "Program", "SandboxError", "Verdict", "run_programs", "self_test"]
