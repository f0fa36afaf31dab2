"""Rows from the hub: the files of a known repository, read as they are, or any other dataset through `datasets`."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_eval.core import DataError
from qwen_eval.data.catalogue import CARDS, DataCard, way_to_get
from qwen_eval.data.files import Files, Folder, files_at
from qwen_eval.data.rows import Source
from qwen_eval.hubs.repository import HubError, NoSuchFiles, Repository, is_offline
from qwen_eval.hubs.snapshots import fetch

REACH_TIMEOUT_S = 4.0  # to learn that there is no network; the clients themselves retry for minutes


class SnapshotSource(Source):
    """Rows of a copy of a hub's repository, in the hub's own columns. `table` names the files, as in a `DataCard`."""

    def __init__(self, origin: str, files: Files, table: str, *, how: str):
        super().__init__(origin, files, how=how)
        self._table = table

    @property
    def is_hub(self) -> bool:
        return True

    def hub_rows(self, config: str | None, split: str) -> list[dict[str, Any]]:
        pattern = self._table.format(config=config, split=split)
        names = self.names(pattern)
        if not names:
            raise DataError(f"{self.origin}: no {pattern} there; {self.how}")
        rows = [self.jsonl(name) if name.endswith(".jsonl") else self.parquet(name) for name in names]
        return [row for part in rows for row in part]


class DatasetSource(Source):
    """Rows of any hub dataset through `datasets`, in the hub's own columns."""

    def __init__(self, hub_id: str, revision: str | None, *, is_offline: bool, how: str):
        super().__init__(f"hub:{hub_id}@{revision or 'main'}", Folder(Path(os.devnull)), how=how)
        self._hub_id, self._revision, self._is_offline = hub_id, revision, is_offline

    @property
    def is_hub(self) -> bool:
        return True

    def hub_rows(self, config: str | None, split: str) -> list[dict[str, Any]]:
        """All rows of one configuration (often a subject) and split."""
        try:
            with _offline(self._is_offline):
                import datasets

                table = datasets.load_dataset(self._hub_id, config, split=split, revision=self._revision)
                rows = [dict(row) for row in table]
        except Exception as error:  # whatever the clients raise, the user's way out is the same
            reason = str(error).strip().split("\n")[0][:200]
            raise DataError(f"{self.origin} {config or ''} {split}: {reason}; {self.how}") from None
        self.keep_digest(f"{config}/{split}", json.dumps(rows, sort_keys=True, default=str).encode())
        return rows


def repository_of(card: DataCard, hub_id: str, *, revision: str | None, hub: str = "huggingface") -> Repository:
    return Repository(id=hub_id, kind="dataset", hub=hub, revision=revision, wanted=lambda _: list(card.files))


def hub_source(task: str, hub_id: str, revision: str | None) -> Source:
    """The rows of a task in the repository `hub_id`, fetched once. HubError where there are none to be had."""
    card, how = CARDS.get(task), way_to_get(task)
    origin = f"hub:{hub_id}@{revision or 'main'}"
    if card is None or not card.files:
        return _dataset(hub_id, revision, how)
    try:
        folder = fetch(repository_of(card, hub_id, revision=revision))
    except NoSuchFiles:
        if card.archive is not None:
            raise
        return _dataset(hub_id, revision, how)  # another layout of the same rows
    return copy_at(folder, card, origin, how) or Source(origin, files_at(folder), how=how)


def copy_at(folder: Path, card: DataCard, origin: str, how: str) -> Source | None:
    """The rows of a folder that is a copy of the hub's repository, None for a folder of another layout."""
    if card.archive is not None:
        archive = folder / card.archive
        return Source(origin, files_at(archive), how=how) if archive.is_file() else None
    pattern = card.table.format(config="*", split="*")
    copy = SnapshotSource(origin, Folder(folder), card.table, how=how)
    return copy if pattern.endswith(".parquet") and copy.names(pattern) else None


def _dataset(hub_id: str, revision: str | None, how: str) -> Source:
    is_reachable = is_hub_reachable()
    if not is_reachable and not is_hub_cached(hub_id):
        raise HubError("the hub does not answer and nothing is cached", is_silent=True)
    return DatasetSource(hub_id, revision, is_offline=not is_reachable, how=how)


@contextmanager
def _offline(is_offline: bool) -> Iterator[None]:
    """Let the hub's clients answer from their cache at once, where otherwise they would retry for minutes."""
    if not is_offline:
        yield
        return
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before):
            place.HF_HUB_OFFLINE = value


def is_hub_reachable(timeout_s: float = REACH_TIMEOUT_S) -> bool:
    """Whether the hub answers; False at once under HF_HUB_OFFLINE=1 or HF_DATASETS_OFFLINE=1."""
    if is_offline():
        return False
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


def is_hub_cached(hub_id: str) -> bool:
    """Whether an earlier download of the dataset lies in the hub's cache."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    tables = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")) / hub_id.replace("/", "___").lower()
    blobs = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"datasets--{hub_id.replace('/', '--')}"
    return tables.is_dir() or blobs.is_dir()
