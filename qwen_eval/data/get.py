"""Fetch the rows of a benchmark, or a checkpoint, and say what came: files, bytes, revision, sha256."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from qwen_eval.core import DataError
from qwen_eval.hubs.repository import HubError, Repository, check_digest, sha256_of
from qwen_eval.hubs.snapshots import fetch

MOST_LISTED = 8  # files that are named one by one
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FetchedFiles:
    """The wanted files of a folder: name -> bytes and sha256."""

    repository: Repository
    folder: Path
    files: dict[str, tuple[int, str]]

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def sha256(self) -> str:
        """That of the only file, or of the names and digests of all."""
        if len(self.files) == 1:
            return next(iter(self.files.values()))[1]
        lines = "".join(f"{name}\0{digest}\n" for name, (_, digest) in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def text(self) -> str:
        """The lines that `get` prints."""
        listed = self.files.items() if 1 < len(self.files) <= MOST_LISTED else ()
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        lines = [
            f"{count}, {self.num_bytes:,} bytes, revision {self.folder.name}",
            f"sha256 {self.sha256}" + (" (of their names and digests)" if len(self.files) > 1 else ""),
            *(f"  {name}  {size:,} bytes  sha256 {digest}" for name, (size, digest) in listed),
            f"in {self.folder}",
        ]
        return "\n".join(f"  {line}" for line in lines)


def get(repository: Repository) -> FetchedFiles:
    """Fetch what is missing and check all of it; DataError in one line where that fails."""
    try:
        folder = fetch(repository)
        names = repository.chosen(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in names:
            check_digest(folder / name, _stated(folder / name))
        files = {name: ((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}
    except HubError as error:
        revision = f" revision={repository.revision}" if repository.revision else ""
        raise DataError(f"{repository.id}{revision}: {error}") from error
    return FetchedFiles(repository=repository, folder=folder, files=files)


def _stated(file: Path) -> str | None:
    """The digest that the hub stated when a file was fetched: the Hugging Face cache names the content by it."""
    name = file.resolve().name
    return name if file.is_symlink() and DIGEST.fullmatch(name) else None
