"""What every test may use."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest

from qwen_eval.runs import progress


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would the commands that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a long test first: at the end no worker waits for a test that another has just begun. Whole files, so
    that what a file's tests share is made once."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What the test files have imported stays: no collection of garbage need look at it again, half a million objects
    each time."""
    gc.collect()
    gc.freeze()


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
