"""The rows of one benchmark, read from files by their official names, with the sha256 of all that was read.

The files lie in a folder, an archive (zip, tar) or alone: `data/files.py`. A result records exactly which rows it used.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, overload

from qwen_eval.core import DataError
from qwen_eval.data.files import GZIP, Files, check_parquet, gunzip


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """Cells of one csv row by column, as text, and where it stands (`test/law.csv line 12`), for error messages."""

    cells: dict[str, str]
    where: str


class Source:
    """Rows of one benchmark. `origin` says where from; it is recorded with the result.

    Every reader takes candidate names and reads the first that exists. A missing, empty or damaged file is a DataError
    of one line that names the file.
    """

    def __init__(self, origin: str, files: Files, *, how: str = "pass task.path=<folder in the official format>"):
        self.origin = origin
        self.how = how  # to get what is missing
        self._files = files
        self._digests: dict[str, str] = {}

    @property
    def is_bundled(self) -> bool:
        return self.origin.startswith("bundled:")

    @property
    def is_hub(self) -> bool:
        """Rows come from `hub_rows`, not from named files."""
        return False

    @property
    def sha256(self) -> str:
        """Of all bytes read so far, by their official names, sorted.

        The same rows in a file, a folder or an archive give the same digest, in whatever order they are read.
        """
        lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def has(self, *names: str) -> str | None:
        """The first of the candidates that exists."""
        return next((name for name in names if self._files.exists(name)), None)

    def names(self, pattern: str) -> list[str]:
        """Names of the files that match a shell pattern, sorted; `*` also spans folders."""
        return sorted(name for name in self._files.names() if fnmatch(name, pattern))

    def text(self, *candidates: str) -> str:
        """Decoded text without a byte-order mark; `.gz` is unpacked."""
        return self._load(*candidates)[1]

    def content(self, *candidates: str) -> bytes:
        """The bytes of a file that is no text: an input of a question."""
        return self._read(*candidates)[1]

    def json(self, *candidates: str) -> Any:
        name, text = self._load(*candidates)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._place(name)}: not JSON ({error})") from None

    def jsonl(self, *candidates: str) -> list[dict[str, Any]]:
        """One object a line, `.jsonl` or `.jsonl.gz`; blank lines are skipped."""
        name, text = self._load(*candidates)
        rows = [self._json_line(name, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not rows:
            raise DataError(f"{self._place(name)}: empty; fetch it again")
        return rows

    def parquet(self, *candidates: str) -> list[dict[str, Any]]:
        """Rows of a parquet file, one dict each."""
        from pyarrow import parquet

        name, raw = self._read(*candidates)
        try:
            check_parquet(raw, self._place(name))
            rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(raw)).to_pylist()
            return rows
        except (OSError, ValueError) as error:  # pyarrow's errors are among these
            raise DataError(f"{self._place(name)}: not parquet ({str(error).splitlines()[0]})") from None

    def hub_rows(self, config: str | None, split: str) -> list[dict[str, Any]]:
        raise AssertionError(f"{self.origin} has files, not hub rows")

    @overload
    def csv(self, *candidates: str, header: Literal[True]) -> list[dict[str, str]]: ...

    @overload
    def csv(self, *candidates: str, header: Literal[False]) -> list[list[str]]: ...

    def csv(self, *candidates: str, header: bool) -> list[dict[str, str]] | list[list[str]]:
        """Cells as the text that stands in the file: dicts by the header's names, or lists when there is none."""
        name, text = self._load(*candidates)
        rows = [cells for _, cells in self._csv_lines(name, text)]
        return [dict(zip(rows[0], cells)) for cells in rows[1:]] if header else rows

    def table(
        self, *candidates: str, columns: Sequence[str], header: bool, as_pandas: bool = False, needs: Sequence[str] = ()
    ) -> list[TableRow]:
        """Rows of a csv by column name. `needs` are the columns that must be there (all `columns` if not given).

        `as_pandas` prints cells as the official scripts do, which let pandas guess types: "None" and "NA" become
        "nan", "007" becomes "7", whole numbers beside an empty cell become "4.0". Otherwise cells stay as they are.
        """
        name, text = self._load(*candidates)
        lines = self._csv_lines(name, text)
        names = [cell.strip() for cell in lines.pop(0)[1]] if header else list(columns)
        missing = [column for column in (needs or columns) if column not in names]
        if missing:
            raise DataError(f"{self._place(name)}: no column {', '.join(missing)}; found {', '.join(names)}")
        if not lines:
            raise DataError(f"{self._place(name)}: no rows; fetch it again")
        for line, cells in lines:
            if len(cells) != len(names):
                raise DataError(f"{self._place(name)} line {line}: {len(cells)} columns, {len(names)} expected")
        tables = _pandas_cells(text, names, header) if as_pandas else [dict(zip(names, cells)) for _, cells in lines]
        assert len(tables) == len(lines), f"{name}: csv and pandas disagree on the number of rows"
        return [TableRow(cells=cells, where=f"{name} line {line}") for cells, (line, _) in zip(tables, lines)]

    def _load(self, *candidates: str) -> tuple[str, str]:
        name, content = self._read(*candidates)
        try:
            return name, content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._place(name)}: not UTF-8 at byte {error.start}; convert or fetch it again"
            ) from None

    def _read(self, *candidates: str) -> tuple[str, bytes]:
        """Name and unpacked bytes of the first candidate there is; their digest is kept."""
        name = self.has(*candidates)
        if name is None:
            raise DataError(f"{self.origin}: no {' or '.join(candidates)} there; {self.how}")
        try:
            raw = self._files.read(name)
            content = gunzip(raw, self._place(name)) if raw[:2] == GZIP else raw
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise DataError(f"{self._place(name)}: cannot be read ({error})") from None
        self.keep_digest(candidates[0], content)
        return name, content

    def keep_digest(self, name: str, content: bytes) -> None:
        self._digests[name] = hashlib.sha256(content).hexdigest()

    def _json_line(self, name: str, line: int, text: str) -> dict[str, Any]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._place(name)} line {line}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{self._place(name)} line {line}: {type(row).__name__}, an object expected")
        return row

    def _csv_lines(self, name: str, text: str) -> list[tuple[int, list[str]]]:
        """(line number of its end, cells) of every row that is not blank."""
        reader = csv.reader(io.StringIO(text, newline=""))
        try:
            lines = [(reader.line_num, cells) for cells in reader if cells]
        except csv.Error as error:
            raise DataError(f"{self._place(name)} line {reader.line_num}: {error}") from None
        if not lines:
            raise DataError(f"{self._place(name)}: empty; fetch it again")
        return lines

    def _place(self, name: str) -> str:
        return f"{self.origin.removeprefix('path:')}/{name}"


def printed_by_pandas(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows that did not come from a csv, with their cells as pandas would print them had they."""
    text = io.StringIO()
    csv.writer(text).writerows([row[column] for column in columns] for row in rows)
    return _pandas_cells(text.getvalue(), list(columns), header=False)


def _pandas_cells(text: str, names: list[str], header: bool) -> list[dict[str, str]]:
    import pandas

    frame = pandas.read_csv(io.StringIO(text), names=names, header=0 if header else None)
    return [{str(column): str(value) for column, value in row.items()} for row in frame.to_dict("records")]
