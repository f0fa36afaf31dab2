"""A repository on a hub, which of its files are wanted, and what went wrong with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

NAMES = {"huggingface": "the Hugging Face hub", "modelscope": "ModelScope"}
OFFLINE_KEYS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
TIMEOUT_S = 8.0  # for the first word of a hub; downloads take the time they take


class HubError(Exception):
    """Why a repository could not be fetched, one line.

    `is_passing`: another time it may be. `is_silent`: the hub did not answer at all, or may not be asked.
    """

    def __init__(self, reason: str, *, is_passing: bool = False, is_silent: bool = False):
        super().__init__(reason)
        self.is_passing, self.is_silent = is_passing or is_silent, is_silent


class NoSuchFiles(HubError):
    """The repository is there, but has none of the wanted files."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """`wanted` gets the names of all files and returns the shell patterns of those to fetch; `*` spans folders."""

    id: str
    wanted: Callable[[Sequence[str]], list[str]]
    kind: str = "model"  # or "dataset"
    hub: str = "huggingface"  # or "modelscope"
    revision: str | None = None

    def chosen(self, names: Iterable[str]) -> list[str]:
        """The names that are wanted, sorted; HubError where there are none."""
        names = sorted(names)
        patterns = self.wanted(names)
        found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not found:
            raise NoSuchFiles(f"no file there is named {' or '.join(patterns)}")
        return found


def offline_key() -> str | None:
    """The variable by which the user has forbidden the network: HF_HUB_OFFLINE=1 or HF_DATASETS_OFFLINE=1."""
    switched_on = (key for key in OFFLINE_KEYS if os.environ.get(key, "0").upper() in ("1", "ON", "YES", "TRUE"))
    return next(switched_on, None)


def is_offline() -> bool:
    return offline_key() is not None


def unreachable(hub: str, error: Exception) -> HubError:
    """The answer of the hub, or that there was none."""
    status = _status(error)
    if status is None:
        words = f"{NAMES[hub]} cannot be reached ({type(error).__name__}) and no copy is cached"
        return HubError(words, is_silent=True)
    words = {429: "asks to wait (429, too many requests)"}.get(status, f"answers with status {status}")
    return HubError(f"{NAMES[hub]} {words} and no copy is cached; try again later", is_passing=True)


def _status(error: BaseException | None) -> int | None:
    """The status of the HTTP answer that an error, or what caused it, is about."""
    while error is not None:
        found = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
        if found is not None:
            return int(found)
        error = error.__cause__ or error.__context__
    return None


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_digest(file: Path, want: str | None) -> None:
    """HubError, and the file is removed, where its content has another digest than the hub states.

    `want` is the sha256, or of small files the id of git's blob; None: the hub states none.
    """
    if want is None:
        return
    got = sha256_of(file) if len(want) == 64 else _git_blob(file)
    if got != want:
        file.resolve().unlink(missing_ok=True)  # in the cache a file is a link to its content
        file.unlink(missing_ok=True)
        raise HubError(f"{file.name}: digest {got[:12]}, the hub states {want[:12]}; it was removed, fetch it again")


def _git_blob(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
