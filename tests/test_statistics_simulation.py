"""A short run of tools/simulate_statistics.py: few and uneven documents, tests at their level, intervals that cover."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TOOL = Path(__file__).parents[1] / "tools" / "simulate_statistics.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_statistics", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_statistics"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_ratio_of_perplexities_keeps_level_and_coverage_in_every_cell(tool: ModuleType) -> None:
    draws, failed = 10_000, []
    error = math.sqrt(0.05 * 0.95 / draws)
    for number, cell in enumerate(tool.cells()):
        found = tool.perplexity_ratio(np.random.default_rng([2, number]), cell, draws)
        if found.errors > 0.05 + 2 * error or found.covered < 0.93 - 2 * error:
            failed.append((cell, found))
    assert len(list(tool.cells())) == 24
    assert not failed


@pytest.mark.parametrize("study", ["answers_compared", "one_perplexity", "one_share"])
@pytest.mark.parametrize("documents", [5, 25])
def test_answers_in_uneven_documents_keep_level_and_coverage(tool: ModuleType, study: str, documents: int) -> None:
    draws = 400
    error = math.sqrt(0.05 * 0.95 / draws)
    cell = tool.Cell(documents=documents, size_spread=0.7, correlation=0.5)
    found = getattr(tool, study)(np.random.default_rng(3), cell, draws)
    assert found.covered >= 0.93 - 2 * error
    if study == "answers_compared":
        assert (found.errors is None) == (documents == 5)  # too few to test
        assert found.errors is None or found.errors <= 0.05 + 2 * error


def test_the_usual_cluster_variance_would_fail_here(tool: ModuleType) -> None:
    """The check bites: with clusters - 1 degrees of freedom and no correction, uneven documents are called changed."""
    from scipy.special import stdtrit

    cell = tool.Cell(documents=10, size_spread=1.2)
    sizes, effects = tool.drawn(np.random.default_rng(4), cell, 10_000)
    weights = sizes / sizes.sum(-1, keepdims=True)
    means = (weights * effects).sum(-1, keepdims=True)
    variance = ((weights * (effects - means)) ** 2).sum(-1) * 10 / 9
    errors = np.mean(np.abs(means[:, 0]) / np.sqrt(variance) > stdtrit(9, 0.985))
    assert errors > 0.09
