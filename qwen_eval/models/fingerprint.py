"""The digest that identifies a checkpoint, of the files that the engines read. No torch: finished runs are found by it.

"sample:…" holds at least 4 KiB of every tensor, and whole the small files and those whose tensors cannot be found
(torch before 1.6, GGUF: about a second a gigabyte); "full:…" (`model.digest=full`) every byte. Names,
sizes, headers and times are the same for two fine-tunes of one model, so none of them is enough.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qwen_eval.config import ModelSpec
from qwen_eval.core import ModelError
from qwen_eval.models.hub import local_checkpoint_dir
from qwen_eval.models.lora import base_of

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TEXTS = (".json", ".tiktoken", ".txt", ".jinja", ".model")
# Left beside a checkpoint by a trainer or a tool; no engine reads them.
UNREAD = (
    "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt",
    "trainer_state.json", "README.txt", "LICENSE.txt", "NOTICE.txt",
)  # fmt: skip
UNREAD_ENDINGS = ("_results.json", "_result.json")
TEMPLATES = "additional_chat_templates"

WHOLE_FILE_BYTES = 16 << 20  # up to here a file is read whole
WHOLE_TENSOR_BYTES = 32 << 10
NUM_BLOCKS, BLOCK_BYTES = 8, 1 << 10  # of a larger tensor: 8 KiB, from its first byte to its last
HEADER_BYTES = 100 << 20  # the most that safetensors itself takes for a header
LOCAL_HEADER_BYTES = 256  # of an entry of a zip archive with its name and padding: at most so many
READ_BYTES = 1 << 20
SETTLED_NS = 2 * 10**9  # a file changed more recently than this may change again without another time stamp

Stat = tuple[str, int, int, int, int, int, bool]
_digested: dict[Stat, bytes] = {}  # only what this process has read itself


def model_fingerprint(model: ModelSpec, directory: Path | None = None) -> str:
    """The digest of the checkpoint in `directory`, or of `model` on this machine; nothing is downloaded.

    Random weights are identified by seed and shape files. ModelError where there is no checkpoint.
    """
    directory = directory or local_checkpoint_dir(model)
    is_random = model.weights == "random"
    digest = directory_fingerprint(directory, is_full=model.digest == "full", with_weights=not is_random)
    base = base_of(directory)
    if base != directory:  # an adapter: what it is merged into makes the numbers as well
        digest += "+" + directory_fingerprint(base, is_full=model.digest == "full", with_weights=not is_random)
    return f"random:{model.seed}:{digest}" if is_random else digest


def directory_fingerprint(directory: Path, *, is_full: bool = False, with_weights: bool = True) -> str:
    """`"sample:<sha256>"` or `"full:<sha256>"`, the same for the same files wherever they lie; links are followed."""
    sha = hashlib.sha256()
    try:
        for file in _files(directory, with_weights=with_weights):
            name = file.relative_to(directory).as_posix().encode("utf-8", "surrogateescape")
            sha.update(len(name).to_bytes(4, "little") + name + _file_digest(file, is_full))
    except OSError as error:
        raise ModelError(f"{error.filename or directory}: cannot be read ({error.strerror or error})") from None
    return f"{'full' if is_full else 'sample'}:{sha.hexdigest()}"


def _files(directory: Path, *, with_weights: bool) -> list[Path]:
    endings = (*WEIGHTS, *TEXTS) if with_weights else TEXTS
    found = [*directory.iterdir(), *(directory / TEMPLATES).glob("*.jinja")]
    return sorted(path for path in found if path.suffix in endings and _is_read(path.name) and path.is_file())


def _is_read(name: str) -> bool:
    return name not in UNREAD and not name.endswith(UNREAD_ENDINGS) and not name.startswith(".")


def _file_digest(path: Path, is_full: bool) -> bytes:
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev, stat.st_ctime_ns, is_full)
        if key in _digested:
            return _digested[key]
        sha = hashlib.sha256(stat.st_size.to_bytes(8, "little"))
        for start, size in _parts(file, path, stat.st_size, is_full):
            _update(sha, file, start, size)
    if time.time_ns() - stat.st_ctime_ns > SETTLED_NS:
        _digested[key] = sha.digest()
    return sha.digest()


def _update(sha: hashlib._Hash, file: BinaryIO, start: int, size: int) -> None:
    file.seek(start)
    while size > 0 and (block := file.read(min(size, READ_BYTES))):
        sha.update(block)
        size -= len(block)


# --- which bytes -----------------------------------------------------------------------------------------------------


def _parts(file: BinaryIO, path: Path, size: int, is_full: bool) -> Iterator[tuple[int, int]]:
    """(start, size) of what is read of a file, in a fixed order."""
    if is_full or size <= WHOLE_FILE_BYTES or path.suffix not in WEIGHTS:
        return iter([(0, size)])
    spans = _safetensors_spans(file, size) if path.suffix == ".safetensors" else _torch_spans(file)
    return iter(spans if spans is not None else [(0, size)])


def _safetensors_spans(file: BinaryIO, size: int) -> list[tuple[int, int]] | None:
    """The header and blocks of every tensor; None for a file of another format (the loader reports it)."""
    try:
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            return None
        header: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
        first = 8 + length
        tensors = sorted(
            (first + int(row["data_offsets"][0]), first + int(row["data_offsets"][1]))
            for name, row in header.items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, RecursionError):
        return None
    if any(not first <= start <= end <= size for start, end in tensors):
        return None
    return [(0, first), *(block for start, end in tensors for block in _blocks(start, end))]


def _torch_spans(file: BinaryIO) -> list[tuple[int, int]] | None:
    """Blocks of every storage of a file of `torch.save`, a zip archive without compression; None for older files."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted((entry.header_offset, entry.compress_size) for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return None
    # the local header and its padding stand before the data
    return [block for start, size in entries for block in _blocks(start, start + LOCAL_HEADER_BYTES + size)] or None


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """A tensor's bytes, or evenly spread blocks of them with its first and its last byte."""
    size = end - start
    if size <= WHOLE_TENSOR_BYTES:
        yield start, size
        return
    for i in range(NUM_BLOCKS):
        yield start + i * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1), BLOCK_BYTES
