"""qwen_eval: quality, speed and memory of Qwen models, in one table with error bars.

The Python API, see docs/python.md. A name is imported when it is first used, so that `import qwen_eval` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_eval.api import compare, evaluate
    from qwen_eval.core import Metric, QwenEvalError, Record
    from qwen_eval.engines.cache import EngineCache
    from qwen_eval.report.comparison import Comparison
    from qwen_eval.report.verdict import Judgement
    from qwen_eval.runs.run import Run, load_run

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "EngineCache",
    "Judgement",
    "Metric",
    "QwenEvalError",
    "Record",
    "Run",
    "compare",
    "evaluate",
    "load_run",
]

_HOMES = {
    "Comparison": "report.comparison",
    "EngineCache": "engines.cache",
    "Judgement": "report.verdict",
    "Metric": "core",
    "QwenEvalError": "core",
    "Record": "core",
    "Run": "runs.run",
    "compare": "api",
    "evaluate": "api",
    "load_run": "runs.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
