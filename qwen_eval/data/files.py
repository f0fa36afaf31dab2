"""Files by their official names, wherever they lie: in a folder, in an archive as it is published, or alone."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from qwen_eval.core import DataError

# Archives may be anybody's; the largest official file unpacked is MMLU's data.tar with 166 MB, of files below 60 MB.
MAX_FILE_BYTES = 256 << 20
MAX_DIRECTORY_BYTES = 8 << 20  # of a zip: some 80,000 files
MAX_TAR_FILES = 20_000
CELL_BYTES = 8  # at least, of a cell as an object


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
        return read_file(self.root / name)


@dataclass(frozen=True)
class SingleFile:
    """One file given for a whole benchmark: it stands for any name with the same ending (`test.jsonl`)."""

    file: Path

    def exists(self, name: str) -> bool:
        return name.removesuffix(".gz").endswith(Path(self.file.name.removesuffix(".gz")).suffix or "\0")

    def names(self) -> list[str]:
        return [self.file.name]

    def read(self, name: str) -> bytes:
        return read_file(self.file)


@dataclass(frozen=True)
class Zip:
    file: Path

    def exists(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        with self._open() as archive:
            return [i.filename for i in archive.infolist() if not i.is_dir()]

    def read(self, name: str) -> bytes:
        with self._open() as archive:
            entry = archive.getinfo(name)
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                raise DataError(f"{self.file}: {name!r} is encrypted or packed by another method than deflate")
            _check_size(entry.file_size, f"{self.file}: {name!r}")
            with archive.open(entry) as stream:
                return stream.read(entry.file_size + 1)  # without a number it unpacks all, whatever size is stated

    def _open(self) -> zipfile.ZipFile:
        with self.file.open("rb") as stream:
            size = _directory_bytes(stream)
        if size > MAX_DIRECTORY_BYTES:
            raise DataError(f"{self.file}: lists {size} bytes of names, more than {MAX_DIRECTORY_BYTES}; no benchmark")
        return zipfile.ZipFile(self.file)


def _directory_bytes(stream: IO[bytes]) -> int:
    """The size of a zip's list of files as its last record states it: reading the list takes far more memory."""
    stream.seek(0, io.SEEK_END)
    stream.seek(max(0, stream.tell() - (1 << 16) - 22))
    tail = stream.read()
    at = tail.rfind(b"PK\5\6")
    return int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0


@dataclass(frozen=True)
class Tar:
    """Plain or packed by gzip."""

    file: Path

    def exists(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        with self._open() as archive:
            return [member.name.removeprefix("./") for member in self._members(archive)]

    def read(self, name: str) -> bytes:
        with self._open() as archive:
            member = next(m for m in self._members(archive) if m.name.removeprefix("./") == name)
            _check_size(member.size, f"{self.file}: {name!r}")
            stream = archive.extractfile(member)
            assert stream is not None, name
            return stream.read()

    def _members(self, archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
        found: list[tarfile.TarInfo] = []
        for number, member in enumerate(archive):
            if number >= MAX_TAR_FILES:
                raise DataError(f"{self.file}: more than {MAX_TAR_FILES} files; not the archive of a benchmark")
            if member.isfile():
                found.append(member)
        return found

    def _open(self) -> tarfile.TarFile:
        with self.file.open("rb") as stream:
            is_packed = stream.read(2) == GZIP
        if not is_packed:
            return tarfile.open(self.file, "r:")
        return tarfile.open(fileobj=io.BytesIO(gunzip(self.file.read_bytes(), str(self.file))))


GZIP = b"\x1f\x8b"


def read_file(path: Path) -> bytes:
    _check_size(path.stat().st_size, str(path))
    return path.read_bytes()


def gunzip(packed: bytes, place: str) -> bytes:
    """The content, all members; DataError where it is longer than a file may be, before it is unpacked further."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{place}: cannot be read ({error})") from None
    _check_size(len(content), place)
    return content


def check_parquet(raw: bytes, place: str) -> None:
    """DataError where the footer states more than can be read: a million equal rows take a few bytes.

    OSError or ValueError of pyarrow for what is no parquet.
    """
    from pyarrow.parquet import ParquetFile

    footer = ParquetFile(io.BytesIO(raw)).metadata
    num_bytes = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    _check_size(max(num_bytes, footer.num_rows * footer.num_columns * CELL_BYTES), place)


def _check_size(num_bytes: int, place: str) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise DataError(
            f"{place}: more than {MAX_FILE_BYTES} bytes unpacked; not a file of a benchmark, nothing was read"
        )


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
