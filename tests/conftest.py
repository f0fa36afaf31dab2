"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_eval.runs import progress


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests first: at the end no worker waits for one that another has just begun."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine lines about slow stages would stand between those that a test looks at. They are there in
    commands that have a process of their own, and in tests/test_signs_of_life.py."""
    monkeypatch.setattr(progress, "FIRST_LINE_S", 3600.0)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 3600.0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded outputs of the original code; QWEN_EVAL_GOLDEN names another one of the same layout."""
    return Path(os.environ.get("QWEN_EVAL_GOLDEN") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session")
def official() -> Path:
    """The folder of official benchmark files that may not be shipped (wmt22/, leval/ ...), named by QWEN_EVAL_DATA."""
    named = os.environ.get("QWEN_EVAL_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("QWEN_EVAL_DATA names no folder of official benchmark files")
    return Path(named)
