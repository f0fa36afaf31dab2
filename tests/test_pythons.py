"""The supported versions of Python: said once, checked by the tools, and served by every pin of constraints.txt."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
SUPPORTED = re.findall(r'"Programming Language :: Python :: (\d+\.\d+)"', PROJECT)
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line[:1] != "#"]


def pinned_here() -> list[tuple[Requirement, SpecifierSet]]:
    """The pins whose package is installed as pinned, with the versions of Python that its metadata admits."""
    installed = {d.name.lower().replace("_", "-"): d for d in importlib.metadata.distributions()}
    found = [(pin, installed.get(pin.name.lower().replace("_", "-"))) for pin in PINS]
    return [
        (pin, SpecifierSet(d.metadata["Requires-Python"] or "")) for pin, d in found if d and d.version in pin.specifier
    ]


def test_the_tools_check_for_the_oldest_python_that_is_supported() -> None:
    oldest = SUPPORTED[0]
    assert f'requires-python = ">={oldest}"' in PROJECT
    assert f'python_version = "{oldest}"' in PROJECT  # of mypy: a newer name of the standard library is an error
    assert f'target-version = "py{oldest.replace(".", "")}"' in PROJECT  # of ruff


def test_the_guide_for_contributors_names_the_same_versions() -> None:
    assert f"on Python {SUPPORTED[0]} to {SUPPORTED[-1]};" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


@pytest.mark.parametrize("python", SUPPORTED)
def test_every_pin_can_be_installed_on_every_supported_python(python: str) -> None:
    pins = pinned_here()
    assert len(pins) > len(PINS) / 2
    wanted = [
        (pin, pythons) for pin, pythons in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert [f"{pin}: needs Python {pythons}" for pin, pythons in wanted if f"{python}.99" not in pythons] == []
