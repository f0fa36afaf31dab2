"""Where the rows of a benchmark come from: a local path, the hub, or the sample bundled with the package."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from qwen_eval.config import TaskSpec, check_limit
from qwen_eval.core import ConfigError, DataError, Sample
from qwen_eval.data.catalogue import CARDS, way_to_get
from qwen_eval.data.files import Folder, files_at
from qwen_eval.data.hub import copy_at, hub_source
from qwen_eval.data.rows import Source
from qwen_eval.hubs.repository import HubError

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
DATA_KINDS = ("auto", "bundled", "hub")

logger = logging.getLogger(__name__)


def open_source(spec: TaskSpec, *, bundled: str) -> Source:
    """Where a task's rows are read: `task.path`, the hub (`task.hub_id`), or `assets/samples/<bundled>`.

    `data=auto` takes the path if there is one, else the hub if it answers (or has answered before: its cache), else
    the bundled sample, and says so.
    """
    if spec.data not in DATA_KINDS:
        raise ConfigError(f"task.data={spec.data}: one of {', '.join(DATA_KINDS)}{nearest(spec.data, DATA_KINDS)}")
    if spec.path is not None:
        return _at_path(spec, Path(spec.path).expanduser())
    if spec.data == "bundled" or (spec.data == "auto" and spec.hub_id is None):
        return _bundled(spec, bundled)
    if spec.hub_id is None:
        raise ConfigError(f"task.data=hub: {spec.name} has no task.hub_id; pass one, or task.path=")
    try:
        return hub_source(spec.name, spec.hub_id, spec.revision)
    except HubError as error:
        if spec.data == "auto" and error.is_silent:
            return _bundled(spec, bundled, why=str(error))
        raise DataError(f"hub:{spec.hub_id}: {error}; {way_to_get(spec.name)}") from None


def _at_path(spec: TaskSpec, path: Path) -> Source:
    """The official files, or a copy of the hub's repository as `python -m qwen_eval.data get` makes it."""
    origin, how, card = f"path:{spec.path}", way_to_get(spec.name), CARDS.get(spec.name)
    copy = copy_at(path, card, origin, how) if card is not None and card.files and path.is_dir() else None
    return copy or Source(origin, files_at(path), how=how)


def _bundled(spec: TaskSpec, name: str, why: str = "") -> Source:
    root = SAMPLES / name
    if not root.is_dir():
        raise DataError(f"{spec.name}: no sample is bundled; {way_to_get(spec.name)}")
    if why:
        _warn_once(f"{spec.name}: {why}: scoring the small bundled sample; {way_to_get(spec.name)}")
    return Source(f"bundled:{name}", Folder(root))


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    """A task may be built several times in one run. An error, since `quiet=true` keeps warnings back, and not this."""
    logger.error("%s", message)


def nearest(value: str, known: Iterable[str]) -> str:
    """`"; did you mean x?"` for a typo, else `""`."""
    matches = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


# --- a part of the rows --------------------------------------------------------------------------------------------


def num_drawn(num_samples: int, limit: int | float | None) -> int:
    """How many of them `limit` leaves: `num_drawn(250, 0.1)` -> 25; a share leaves at least one."""
    if limit is None:
        return num_samples
    return min(num_samples, limit if isinstance(limit, int) else max(1, round(limit * num_samples)))


def draw(samples: Sequence[Sample], limit: int | float | None, seed: int) -> list[Sample]:
    """At most `limit` samples, or that share of them, in their original order: every group in proportion to its size,
    chosen by the seed.

    Nested: the draw of a smaller limit is part of the draw of a larger one. Drawing a number again changes nothing.
    """
    check_limit(limit)
    num = num_drawn(len(samples), limit)
    if num == len(samples):
        return list(samples)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.group].append(index)
    ranked: list[tuple[float, int]] = []
    for group, indices in groups.items():
        indices.sort(key=lambda i: _uniform(seed, "item", samples[i].id))
        # A random start for each group: with equal ones the largest groups would always be served first.
        start = _uniform(seed, "group", group)
        ranked += [((rank + start) / len(indices), index) for rank, index in enumerate(indices)]
    return [samples[i] for i in sorted(index for _, index in sorted(ranked)[:num])]


def _uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little") / 2**56
