"""The map of the architecture names every room, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = sorted(path.name for path in (ROOT / "qwen_eval").iterdir() if path.is_dir() and path.name != "__pycache__")
FILES = sorted(set(re.findall(r"`((?:\w+/)*\w+\.py)`", MAP)))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_line_in_the_map(room: str) -> None:
    assert re.search(rf"^ +{room}/ +\w", MAP, re.MULTILINE)


@pytest.mark.parametrize("file", FILES)
def test_every_file_of_the_map_is_there(file: str) -> None:
    assert (ROOT / "qwen_eval" / file).is_file() or "NAME" in file


def test_a_sample_reaches_the_table_in_ten_steps() -> None:
    steps = re.findall(r"^(\d+)\. ", MAP, re.MULTILINE)
    assert steps == [str(i) for i in range(1, len(steps) + 1)]
    assert 5 <= len(steps) <= 10


PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_reached_from_the_readme(page: str) -> None:
    assert f"(docs/{page})" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)])
def test_every_link_leads_to_a_file(page: str) -> None:
    path = ROOT / page
    missing = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert missing == []
