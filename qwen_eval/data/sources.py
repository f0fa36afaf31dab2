"""Where the rows of a benchmark come from: a local path, the hub, or the sample bundled with the package.

A `Source` reads files by their official names out of a folder, an archive (zip, tar) or a single file, and keeps the
sha256 of all it read, so that a result records exactly which rows it used.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import logging
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

from qwen_eval.config import TaskSpec, check_limit
from qwen_eval.core import ConfigError, DataError, Sample
from qwen_eval.data.files import GZIP, Files, Folder, check_parquet, files_at, gunzip

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
DATA_KINDS = ("auto", "bundled", "hub")
HUB_TIMEOUT_S = 4.0  # to learn that there is no network; the clients themselves retry for minutes

logger = logging.getLogger(__name__)


# --- reading rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
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
        self._files = files
        self._how = how
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
        """Of all bytes read so far, names sorted: the same files read in any order give the same digest."""
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
        import pandas

        name, raw = self._read(*candidates)
        try:
            check_parquet(raw, self._place(name))
            rows = pandas.read_parquet(io.BytesIO(raw)).to_dict("records")
            return [{str(key): value for key, value in row.items()} for row in rows]
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
    ) -> list[Row]:
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
        return [Row(cells=cells, where=f"{name} line {line}") for cells, (line, _) in zip(tables, lines)]

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
            raise DataError(f"{self.origin}: no {' or '.join(candidates)} there; {self._how}")
        try:
            raw = self._files.read(name)
            content = gunzip(raw, self._place(name)) if raw[:2] == GZIP else raw
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise DataError(f"{self._place(name)}: cannot be read ({error})") from None
        self._digests[name] = hashlib.sha256(content).hexdigest()
        return name, content

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


# --- the hub -------------------------------------------------------------------------------------------------------


class HubSource(Source):
    """Rows of a hub dataset through `datasets`, in the hub's own columns."""

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
            raise DataError(f"{self.origin} {config or ''} {split}: {reason}; {self._how}") from None
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode())
        self._digests[f"{config}/{split}"] = digest.hexdigest()
        return rows


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


def is_hub_reachable(timeout_s: float = HUB_TIMEOUT_S) -> bool:
    """Whether the hub answers; False at once under HF_HUB_OFFLINE=1 or HF_DATASETS_OFFLINE=1."""
    if any(os.environ.get(key, "0").upper() in ("1", "ON", "YES", "TRUE") for key in _OFFLINE_KEYS):
        return False
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


_OFFLINE_KEYS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def is_hub_cached(hub_id: str) -> bool:
    """Whether an earlier download of the dataset lies in the hub's cache."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    tables = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")) / hub_id.replace("/", "___").lower()
    blobs = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"datasets--{hub_id.replace('/', '--')}"
    return tables.is_dir() or blobs.is_dir()


def _hub_archive(hub_id: str, name: str, revision: str | None, *, is_offline: bool, how: str) -> Source:
    """A benchmark that the hub keeps as the official archive."""
    try:
        import huggingface_hub

        path = huggingface_hub.hf_hub_download(
            hub_id, name, repo_type="dataset", revision=revision, local_files_only=is_offline
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(f"hub:{hub_id} {name}: {reason}; {how}") from None
    return Source(f"hub:{hub_id}@{revision or 'main'}", files_at(Path(path)), how=how)


# --- which one -----------------------------------------------------------------------------------------------------


def open_source(spec: TaskSpec, *, bundled: str, hub_archive: str | None = None) -> Source:
    """Where a task's rows are read: `task.path`, the hub (`task.hub_id`), or `assets/samples/<bundled>`.

    `data=auto` takes the path if there is one, else the hub if it answers (or has answered before: its cache), else
    the bundled sample, and says so. `hub_archive` names the official archive inside the hub's repository, for
    benchmarks that the hub does not hold as tables.
    """
    if spec.data not in DATA_KINDS:
        raise ConfigError(f"task.data={spec.data}: one of {', '.join(DATA_KINDS)}{nearest(spec.data, DATA_KINDS)}")
    if spec.path is not None:
        path = Path(spec.path).expanduser()
        return Source(f"path:{spec.path}", files_at(path), how="see the benchmark's official layout in docs/")
    how = f"pass task.path=<folder, archive or file of {spec.name} in its official format> or task.data=bundled"
    if spec.data == "bundled" or (spec.data == "auto" and spec.hub_id is None):
        return _bundled(bundled)
    return _open_hub(spec, bundled, hub_archive, how)


def _open_hub(spec: TaskSpec, bundled: str, hub_archive: str | None, how: str) -> Source:
    if spec.hub_id is None:
        raise ConfigError(f"task.data=hub: {spec.name} has no task.hub_id; pass one, or task.path=")
    is_reachable = is_hub_reachable()
    if not is_reachable and not is_hub_cached(spec.hub_id):
        if spec.data == "hub":
            raise DataError(f"hub:{spec.hub_id}: the hub does not answer and nothing is cached; {how}")
        return _bundled(bundled, why="the hub does not answer and nothing is cached")
    if hub_archive is not None:
        return _hub_archive(spec.hub_id, hub_archive, spec.revision, is_offline=not is_reachable, how=how)
    return HubSource(spec.hub_id, spec.revision, is_offline=not is_reachable, how=how)


def _bundled(name: str, why: str = "") -> Source:
    root = SAMPLES / name
    if not root.is_dir():
        raise DataError(
            f"{name}: no sample is bundled; pass task.path=<folder, archive or file in the official format>"
        )
    if why:
        _warn_once(f"{name}: {why}: scoring the small bundled sample; task.path= takes the full benchmark")
    return Source(f"bundled:{name}", Folder(root))


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    """A task may be built several times in one run."""
    logger.warning("%s", message)


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
