"""What tasks/vcsum.py uses of rouge."""

from typing import Literal

class Rouge:
    def __init__(self, metrics: list[str] | None = None) -> None: ...
    def get_scores(self, hyps: list[str], refs: list[str], *, avg: Literal[True]) -> dict[str, dict[str, float]]: ...
