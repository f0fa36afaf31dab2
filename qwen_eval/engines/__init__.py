"""Engines: who answers requests. `kinds.py` is the one place that finds them by name."""

from __future__ import annotations

from qwen_eval.engines.kinds import identity, kind, open_engine

__all__ = ["identity", "kind", "open_engine"]
