"""Files of a repository, fetched once and found again without a network. Their clients resume a broken download.

A hub that does not answer costs seconds, once in a minute and not for every repository.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from qwen_eval.activity import stage
from qwen_eval.hubs import modelscope
from qwen_eval.hubs.repository import (
    TIMEOUT_S,
    HubError,
    Repository,
    check_digest,
    is_offline,
    offline_key,
    unreachable,
)

FORGET_S = 60.0  # for so long a hub that did not answer is not asked again

_silent: dict[str, tuple[float, HubError]] = {}  # hub -> when it did not answer, and how


def fetch(repository: Repository) -> Path:
    """The folder with the wanted files, from the hub or from its cache; HubError where there is neither.

    What is fetched now is checked against the digests that the hub states.
    """
    if is_offline():
        return _cached_or(repository, HubError(f"{offline_key()} is set and no copy is cached", is_silent=True))
    since, error = _silent.get(repository.hub, (0.0, None))
    if error is not None and time.monotonic() - since < FORGET_S:
        return _cached_or(repository, error)
    try:
        with stage(f"fetching {repository.id}"):
            return modelscope.fetch(repository) if repository.hub == "modelscope" else _from_huggingface(repository)
    except HubError as error:
        if not error.is_passing:
            raise
        if error.is_silent:
            _silent[repository.hub] = (time.monotonic(), error)
        return _cached_or(repository, error)


def cached(repository: Repository) -> Path | None:
    """The folder of an earlier fetch that was completed; nothing is asked of a hub."""
    if repository.hub == "modelscope":
        return modelscope.cached(repository)
    folder = _look_up(repository, [])
    if folder is None:
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        repository.chosen(names)
    except HubError:
        return None
    return _look_up(repository, repository.wanted(names))


def forget() -> None:
    """Ask hubs again that did not answer."""
    _silent.clear()


def revision_of(folder: Path) -> str:
    """The commit or branch that a folder of a cache holds."""
    return folder.name


def _cached_or(repository: Repository, error: HubError) -> Path:
    folder = cached(repository)
    if folder is None:
        raise error
    return folder


def _from_huggingface(repository: Repository) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache

    kind, revision = repository.kind, repository.revision
    endpoint = os.environ.get("HF_ENDPOINT") or None  # its client reads it only once, when it is imported
    try:
        info: Any = HfApi(endpoint=endpoint).repo_info(
            repository.id, repo_type=kind, revision=revision, timeout=TIMEOUT_S, files_metadata=True
        )
        stated = {file.rfilename: file for file in info.siblings or ()}
        names = repository.chosen(stated)
        missing = [name for name in names if not isinstance(
            try_to_load_from_cache(repository.id, name, repo_type=kind, revision=info.sha), str
        )]  # fmt: skip
        # by its name, not by the commit behind it: only so the copy is found under that name without a network
        folder = Path(
            snapshot_download(repository.id, repo_type=kind, revision=revision, allow_patterns=names, endpoint=endpoint)
        )
        for name in missing:
            check_digest(folder / name, _digest(stated[name]))
        return folder
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError("gated; accept its licence on the hub and log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise HubError("the hub has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"the hub has no such {kind}, or not for you; check the id or log in") from error
    except errors.HFValidationError as error:
        raise HubError("not the id of a repository, which is written NAME or OWNER/NAME") from error
    except Exception as error:  # network errors come in the types of whatever HTTP library the hub uses this year
        raise unreachable("huggingface", error) from error


def _digest(file: Any) -> str | None:
    """What the hub states of a file: its sha256, or the id of its blob in git."""
    large = file.lfs
    return large.get("sha256") if isinstance(large, dict) else getattr(large, "sha256", None) or file.blob_id


def _look_up(repository: Repository, patterns: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=patterns,
            local_files_only=True,
        )
    except Exception:  # whatever it is, there is no usable copy; the caller reports why the hub failed
        return None
    return Path(found)
