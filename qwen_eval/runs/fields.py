"""Reading JSON of unknown origin as typed values: strict where a wrong type means damage, else with a default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from qwen_eval.core import JSON

MAX_WHOLE = 1 << 53  # JSON's whole numbers have no bound; a float is exact up to here


# --- strict: TypeError for another type ------------------------------------------------------------------------------


def as_object(value: JSON) -> Mapping[str, JSON]:
    if isinstance(value, Mapping):
        return value
    raise _wrong(value, "an object")


def as_list(value: JSON) -> Sequence[JSON]:
    if isinstance(value, (list, tuple)):
        return value
    raise _wrong(value, "a list")


def as_text(value: JSON) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(value, "a text")


def as_count(value: JSON) -> int:
    if is_count(value):
        return value
    raise _wrong(value, "a count")


def as_number(value: JSON) -> float:
    if is_number(value):
        return value
    raise _wrong(value, "a number")


def as_score(value: JSON) -> float | None:
    return None if value is None else as_number(value)


def as_texts(value: JSON) -> tuple[str, ...]:
    return tuple(map(as_text, as_list(value)))


def as_numbers(value: JSON) -> tuple[float, ...]:
    return tuple(map(as_number, as_list(value)))


def as_counts(value: JSON) -> tuple[int, ...]:
    return tuple(map(as_count, as_list(value)))


def _wrong(value: JSON, wanted: str) -> TypeError:
    return TypeError(f"{repr(value)[:40]} is not {wanted}")


def is_count(value: JSON) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < MAX_WHOLE


def is_number(value: JSON) -> TypeGuard[float]:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MAX_WHOLE)


# --- lenient: what is absent or of another type is empty -------------------------------------------------------------


def section(value: JSON) -> Mapping[str, JSON]:
    return value if isinstance(value, Mapping) else {}


def rows(value: JSON) -> list[Mapping[str, JSON]]:
    """The objects of a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, (list, tuple)) else []


def shortened(value: JSON) -> str:
    """A value as it stands in an error: at most 77 characters, its middle left out; a digest is shown whole."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= 80 else text[:38] + "…" + text[-38:]
