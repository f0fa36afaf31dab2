"""Archives and files of data that unpack to gigabytes, or are packed wrongly, end in one line at once."""

from __future__ import annotations

import gzip
import io
import lzma
import resource
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_eval.core import DataError
from qwen_eval.data.files import Files, files_at

GIB = 1 << 30


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("rows.jsonl", "w") as entry:
        for _ in range(512):
            entry.write(bytes(1 << 20))


def zip_by_another_method(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("rows.jsonl", bytes(1 << 20))


def zip_that_lies_about_its_size(path: Path) -> None:
    """The list says 10 bytes, the data unpack to 512 MiB."""
    zip_bomb(path)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 10)
    path.write_bytes(bytes(content))


def zip_of_many_names(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", "{}")
    content = bytearray(path.read_bytes())
    content[-22 + 12 : -22 + 16] = struct.pack("<I", 1 << 30)
    path.write_bytes(bytes(content))


def tar_gz_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(512):
            stream.write(bytes(1 << 20))


def tar_of_a_sparse_terabyte(path: Path) -> None:
    """A GNU sparse member: a kilobyte of archive for a terabyte of zeros."""
    header = tarfile.TarInfo("rows.jsonl")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (1 << 32)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes(1024))


def tar_of_many_files(path: Path) -> None:
    one = tarfile.TarInfo("x").tobuf()
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(one * 100_000)


def tar_xz(path: Path) -> None:
    path.write_bytes(lzma.compress(tarfile.TarInfo("rows.jsonl").tobuf()))


def sparse_file(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(10 * GIB)


BOMBS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "zip": ("a.zip", zip_bomb),
    "zip of bzip2": ("a.zip", zip_by_another_method),
    "zip that lies": ("a.zip", zip_that_lies_about_its_size),
    "zip of many names": ("a.zip", zip_of_many_names),
    "tar.gz": ("a.tar.gz", tar_gz_bomb),
    "sparse tar": ("a.tar", tar_of_a_sparse_terabyte),
    "many files": ("a.tar.gz", tar_of_many_files),
    "tar.xz": ("a.tar.xz", tar_xz),
    "sparse file": ("rows.jsonl", sparse_file),
    "gzip": ("rows.jsonl.gz", tar_gz_bomb),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_ends_in_one_line_within_two_seconds_and_a_gibibyte(tmp_path: Path, kind: str) -> None:
    name, write = BOMBS[kind]
    write(tmp_path / name)
    code = f"""
        import pathlib, time
        from qwen_eval.config import TaskSpec
        from qwen_eval.core import DataError
        from qwen_eval.data.sources import open_source
        task, start = TaskSpec(name="x", path={str(tmp_path / name)!r}), time.process_time()
        try:
            open_source(task, bundled="x").jsonl("rows.jsonl", "rows.jsonl.gz")
        except DataError as error:
            print(time.process_time() - start)
            # ru_maxrss would count what the parent held before the exec
            peak = pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
            print(int(peak) / 2**20)
            print(str(error))
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-300:]
    took_s, peak_gib, *message = done.stdout.strip().splitlines()
    assert len(message) == 1
    assert float(took_s) < 2
    assert float(peak_gib) < 1


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_ordinary_archive_is_read_as_before(tmp_path: Path, name: str) -> None:
    content = b'{"a": 1}\n'
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("dev/rows.jsonl", content)
    else:
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
            member = tarfile.TarInfo("./dev/rows.jsonl")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    files: Files = files_at(tmp_path / name)
    assert files.names() == ["dev/rows.jsonl"]
    assert files.read("dev/rows.jsonl") == content


def test_rows_nested_beyond_reason_are_one_line(tmp_path: Path) -> None:
    from qwen_eval.config import TaskSpec
    from qwen_eval.data.sources import open_source

    (tmp_path / "rows.jsonl").write_text("[" * 200_000)
    source = open_source(TaskSpec(name="x", path=str(tmp_path)), bundled="x")
    with pytest.raises(DataError, match="not JSON"):
        source.jsonl("rows.jsonl")
    with pytest.raises(DataError, match="not JSON"):
        source.json("rows.jsonl")


def test_a_parquet_of_billions_of_equal_rows_is_not_unpacked(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    from qwen_eval.config import TaskSpec
    from qwen_eval.data.sources import open_source

    group = pyarrow.table({"a": [1] * (1 << 22)})
    with parquet.ParquetWriter(tmp_path / "rows.parquet", group.schema) as writer:
        for _ in range(10):
            writer.write_table(group)
    assert (tmp_path / "rows.parquet").stat().st_size < 1 << 18
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match="more than 268435456 bytes unpacked"):
        open_source(TaskSpec(name="x", path=str(tmp_path)), bundled="x").parquet("rows.parquet")
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18
