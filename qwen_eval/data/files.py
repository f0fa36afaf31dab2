"""Files by their official names, wherever they lie: in a folder, in an archive as it is published, or alone."""

from __future__ import annotations

import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_eval.core import DataError


class Files(Protocol):
    """Files by posix name."""

    def exists(self, name: str) -> bool: ...

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


@dataclass(frozen=True)
class Folder:
    root: Path

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def names(self) -> list[str]:
        return [p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file()]

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


@dataclass(frozen=True)
class SingleFile:
    """One file given for a whole benchmark: it stands for any name with the same ending (`test.jsonl`)."""

    file: Path

    def exists(self, name: str) -> bool:
        return name.removesuffix(".gz").endswith(Path(self.file.name.removesuffix(".gz")).suffix or "\0")

    def names(self) -> list[str]:
        return [self.file.name]

    def read(self, name: str) -> bytes:
        return self.file.read_bytes()


@dataclass(frozen=True)
class Zip:
    file: Path

    def exists(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.file) as archive:
            return [i.filename for i in archive.infolist() if not i.is_dir()]

    def read(self, name: str) -> bytes:
        with zipfile.ZipFile(self.file) as archive:
            return archive.read(name)


@dataclass(frozen=True)
class Tar:
    file: Path

    def exists(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        with tarfile.open(self.file) as archive:
            return [m.name.removeprefix("./") for m in archive.getmembers() if m.isfile()]

    def read(self, name: str) -> bytes:
        with tarfile.open(self.file) as archive:
            member = next(m for m in archive.getmembers() if m.name.removeprefix("./") == name)
            stream = archive.extractfile(member)
            assert stream is not None, name
            return stream.read()


def files_at(path: Path) -> Files:
    """The files of a folder, of an archive as it is published, or a single file."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise DataError(f"task.path={path}: no such file or folder")
    try:
        if zipfile.is_zipfile(path):
            return Zip(path)
        if ".tar" in path.name or path.suffix == ".tgz":
            Tar(path).names()
            return Tar(path)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as an archive ({error}); fetch it again") from None
    return SingleFile(path)
