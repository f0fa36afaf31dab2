"""The run directory: `spec.json` is written first, `records.jsonl` as answers come, `result.json` last and atomically.

spec.json      {"format", "kind", "readings", "config": the whole configuration,
                "decides": what must be equal to resume, "provenance": git, packages, machine}
records.jsonl  one graded sample a line, append-only; an incomplete last line is dropped, and its sample asked again
result.json    {"metrics", "rates", "n", "partial", "run", "engine", "warnings", "provenance", "seal"}

A directory may come from someone else: every read has a limit. No error message suggests a step that loses records.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from qwen_eval.core import JSON, Record, StoreError
from qwen_eval.runs.fields import as_object, shortened
from qwen_eval.runs.record_json import record_from_json, record_to_json
from qwen_eval.runs.seal import sealed

FORMAT = 1
MAX_JSON_BYTES = 32 << 20  # of spec.json and result.json
MAX_LINE_BYTES = 32 << 20  # of one record
HIDDEN = "hidden"  # a directory: final hidden states of scored texts, with keep_hidden=true
PLACES = ("origin", "benchmark.origin")  # where the rows were read: their digest is what counts
SPEC, RECORDS, RESULT, LOCK = "spec.json", "records.jsonl", "result.json", ".lock"


def read_records(path: Path) -> Iterator[Record]:
    """Every whole line of records.jsonl; StoreError with the line number for one that is damaged."""
    if not path.exists():
        return
    _refuse_special(path)
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES)
            if len(line) == MAX_LINE_BYTES:
                raise StoreError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB, this is no record")
            if not line.endswith(b"\n"):
                return  # the end, or cut by a kill: that sample is asked again
            yield _record_of_line(path, number, line)


def _record_of_line(path: Path, number: int, line: bytes) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}, line {number}: not JSON ({type(error).__name__}); copy the file, then take that line out: "
            "the same command asks its sample again"
        ) from error
    try:
        return record_from_json(row)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        reason = f"{type(error).__name__}: {shortened(str(error))}"
        raise StoreError(
            f"{path}, line {number}: not a record that this version reads ({reason}); "
            "read it with the version that wrote it, named in spec.json"
        ) from error


class RunDirectory:
    """A run directory, locked by this process: `with RunDirectory.open(...) as run: run.append(record)`.

    `elsewhere` is how the user names another directory, for advice: "tag=NAME", or "run_dir=DIR" where that was given.
    """

    def __init__(self, path: Path, lock: int, elsewhere: str = "tag=NAME", made: Sequence[Path] = ()) -> None:
        self.path = path
        self.elsewhere = elsewhere
        self._lock = lock
        self._made = made  # directories that were not there before, the innermost first
        self._records: int | None = None
        self._end = 0  # records.jsonl is whole up to here

    @classmethod
    def open(cls, path: Path, *, elsewhere: str = "tag=NAME") -> RunDirectory:
        """Create the directory and lock it; StoreError when it cannot be written or another process holds it.

        It is taken away again, with the folders made for it, if nothing is written into it.
        """
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        lock = _locked(path, elsewhere)
        run = cls(path, lock, elsewhere, made)
        try:
            with _one_line(path):
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
        except BaseException:
            run.close()
            raise
        return run

    def check_spec(self, spec: Mapping[str, JSON], *, overwrite: bool = False) -> None:
        """Write spec.json; StoreError, listing the differences, if the directory holds a run with other settings.

        `overwrite` deletes the old run first, but only here, once the new settings are known to be valid.
        """
        path = self.path / SPEC
        if overwrite:
            self._forget()
        if not path.exists():
            if (self.path / RECORDS).exists():
                raise StoreError(f"{self.path}: has {RECORDS} but no {SPEC}; {self.way_out}")
            write_json(path, spec)
            return
        self.refuse_changes(_plain(as_object(spec["decides"])))

    def refuse_changes(self, decides: Mapping[str, JSON]) -> None:
        """StoreError, listing the differences, if `decides` (all or some keys) differs from that of the stored run."""
        stored = self.spec() or {}
        if stored.get("format") != FORMAT:
            written = f"format {shortened(stored.get('format'))}, this version reads {FORMAT}"
            raise StoreError(f"{self.path / SPEC}: {written}; {self.way_out}")
        old = stored.get("decides")
        known = old if isinstance(old, dict) else {}
        if "task" not in decides:
            known = {key: known.get(key) for key in decides}
        changes = differences(known, decides)
        if changes:
            listed = "; ".join(changes[:5]) + " …" * (len(changes) > 5)
            raise StoreError(f"{self.path} holds another run: {listed}; {self.way_out}")

    @property
    def way_out(self) -> str:
        """What the user can do instead. It never suggests overwriting records."""
        has_records = (self.path / RECORDS).exists() and (self.path / RECORDS).stat().st_size > 0
        return f"pass {self.elsewhere} to keep both" if has_records else f"pass {self.elsewhere} or overwrite=true"

    def records(self) -> list[Record]:
        return list(read_records(self.path / RECORDS))

    def append(self, record: Record) -> None:
        """Append one line and flush it. On a full disk no partial line is left behind."""
        text = json.dumps(record_to_json(record), ensure_ascii=False, separators=(",", ":"))
        line = text.encode("utf-8", "surrogatepass") + b"\n"
        with _one_line(self.path / RECORDS):
            file = self._open_records()
            try:
                _write_all(file, line)
            except BaseException:
                with contextlib.suppress(OSError):  # a reader drops a line without its end all the same
                    os.ftruncate(file, self._end)
                raise
            self._end += len(line)

    def finish(self, result: Mapping[str, JSON]) -> None:
        """Make the records durable, then put result.json with its seal in place in one step."""
        if self._records is not None:
            with _one_line(self.path / RECORDS):
                os.fsync(self._records)
        write_json(self.path / RESULT, sealed(_plain(result), self.spec() or {}, self.path / RECORDS))

    def spec(self) -> dict[str, JSON] | None:
        path = self.path / SPEC
        try:
            return read_json(path) if path.exists() else None
        except StoreError as error:
            raise StoreError(f"{error}; {self.way_out}") from error

    def result(self) -> dict[str, JSON] | None:
        path = self.path / RESULT
        return read_json(path) if path.exists() else None

    def close(self) -> None:
        if self._made:
            self._leave_nothing_empty()
        for file in (self._records, self._lock):
            if file is not None:
                os.close(file)
        self._records = None

    def _leave_nothing_empty(self) -> None:
        made, self._made = self._made, ()
        with contextlib.suppress(OSError):  # a folder that holds something stays, and those above it
            if os.listdir(self.path) != [LOCK]:
                return
            (self.path / LOCK).unlink()
            for folder in made:
                folder.rmdir()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_records(self) -> int:
        if self._records is None:
            path = self.path / RECORDS
            self._end = _whole_bytes(path)
            self._records = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if os.fstat(self._records).st_size > self._end:
                os.ftruncate(self._records, self._end)
        return self._records

    def _forget(self) -> None:
        # the result first and the spec last: a kill in between leaves an unfinished run, never a result without records
        with _one_line(self.path):
            for name in (RESULT, RECORDS, SPEC):
                (self.path / name).unlink(missing_ok=True)


def _locked(path: Path, elsewhere: str) -> int:
    """The open lock file of the directory, which is made where it is not there."""
    while True:
        with _one_line(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)  # its target would be emptied
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 20).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise StoreError(f"{path}: process {holder} is writing this run; wait for it or pass {elsewhere}") from None
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # another process has just taken its empty directory away


def differences(old: JSON, new: JSON, prefix: str = "") -> list[str]:
    """`["model.dtype: bf16 → fp16"]`: the leaves of two JSON trees that differ, but for the place of the rows."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {key: f"{prefix}.{key}".lstrip(".") for key in (*old, *new)}
        kept = [(key, path) for key, path in keys.items() if path not in PLACES]
        return [change for key, path in kept for change in differences(old.get(key), new.get(key), path)]
    return [] if old == new else [f"{prefix}: {shortened(old)} → {shortened(new)}"]


def write_json(path: Path, value: Mapping[str, JSON]) -> None:
    """Atomically: a reader sees the old file or the whole new one, also after a crash."""
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    write_bytes(path, text.encode("utf-8", "surrogatepass"))


def write_bytes(path: Path, data: bytes) -> None:
    """Atomically, as `write_json`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with _one_line(path):
        try:
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            try:
                _write_all(file, data)
                os.fsync(file)
            finally:
                os.close(file)
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


# --- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}; what was saved before is kept and valid") from error


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # on a nearly full disk a write may be partial
        view = view[os.write(file, view) :]


def _whole_bytes(path: Path) -> int:
    """The size of records.jsonl without a last line that was cut."""
    if not path.exists():
        return 0
    size = path.stat().st_size
    with path.open("rb") as file:
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def read_json(path: Path) -> dict[str, JSON]:
    """The object in a file of at most 32 MiB; StoreError in one line for anything else."""
    _refuse_special(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise StoreError(f"{path}: longer than {MAX_JSON_BYTES >> 20} MiB, this is no file of a run")
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise StoreError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path}: not a JSON object")
    return value


def _refuse_special(path: Path) -> None:
    """Reading a pipe could block forever, and a device has no end."""
    with _one_line(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise StoreError(f"{path}: not a plain file")


def _plain(value: Mapping[str, JSON]) -> dict[str, JSON]:
    """As it will look when read back: tuples are lists, keys are strings."""
    plain: dict[str, JSON] = json.loads(json.dumps(value, ensure_ascii=False))
    return plain
