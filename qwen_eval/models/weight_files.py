"""Finding the weight files of a directory, and reading them safely: anybody can publish a checkpoint.

Safetensors, or `.bin` (a zip with a pickle, read with `weights_only`, so that nothing is executed).
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_eval.core import ModelError
from qwen_eval.models.config import read_fields, shown
from qwen_eval.models.hub import ORDER

NO_WEIGHTS = ("training_args", "adapter_model", "optimizer", "scheduler", "rng_state")
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch before 1.6 begins
MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 16 << 20  # of a safetensors file; the 72B's is 0.1 MiB
MAX_PICKLE_BYTES = 2 << 20  # of a .bin without its tensors; 1,000 tensors take 0.2 MiB


class Tensors(Protocol):
    """The tensors of one file by name."""

    def keys(self) -> Iterable[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


def weight_files(directory: Path) -> list[Path]:
    """The files to read, in transformers' order; ModelError where there are none or a shard is missing."""
    for name in ORDER:
        path = directory / name
        if path.is_file():
            return _shards(path) if name.endswith(".json") else [path]
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(p for p in directory.glob(pattern) if not p.name.startswith(NO_WEIGHTS))
        if found:
            return found
    raise ModelError(f"{directory}: no *.safetensors or *.bin weights in this directory")


def _shards(index: Path) -> list[Path]:
    weight_map = read_fields(index, most_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ModelError(f"{index}: not a shard index (its weight_map is {shown(weight_map)})")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise ModelError(f"{index}: shard {shown(name)} is not the name of a weight file beside it; refused")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent}: shard {shown(missing[0])[1:-1]} is missing ({len(missing)} of {len(names)} shards)"
        )
    return [index.parent / name for name in names]


def open_weights(file: Path) -> Tensors:
    """The tensors of a file, mapped, not read. ModelError in one line for a damaged or hostile one."""
    try:
        if file.suffix == ".safetensors":
            _check_header(file)
            opened: Tensors = safe_open(str(file), framework="pt")
            return opened
        _check_archive(file)
        return _Pickled(file, torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except ModelError:
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{file}: truncated or damaged ({said}); fetch it again") from None
    except Exception as error:  # UnpicklingError and friends: torch raises what the pickle provokes
        raise ModelError(f"{file}: not a plain weight file ({type(error).__name__}); refused") from None


def _check_header(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(8)
    if len(start) == 8 and struct.unpack("<Q", start)[0] > MAX_HEADER_BYTES:
        raise ModelError(f"{file}: a header of more than {MAX_HEADER_BYTES} bytes; damaged, or not a weight file")


def _check_archive(file: Path) -> None:
    """torch stores its entries uncompressed: a compressed one can only be there to blow up."""
    with file.open("rb") as stream:
        if stream.read(len(OLD_TORCH)) == OLD_TORCH:
            raise ModelError(
                f"{file}: written by torch before 1.6, which cannot be mapped; read it with torch.load(FILE, "
                "weights_only=True) and save it again, or use engine=hf"
            )
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"{file}: holds compressed entries, which torch never writes; refused")
            if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
                raise ModelError(f"{file}: a pickle of {entry.file_size} bytes, more than {MAX_PICKLE_BYTES}; refused")


class _Pickled:
    """The dictionary of a .bin file."""

    def __init__(self, file: Path, content: Any) -> None:
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ModelError(f"{file}: holds a {type(content).__name__}, not tensors by name; not a weight file")
        self.file, self._content = file, content

    def keys(self) -> Sequence[str]:
        return list(self._content)

    def get_tensor(self, name: str) -> Tensor:
        """ModelError for anything but numbers that are in the file: a view can be a thousand times its storage."""
        tensor = self._content[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ModelError(f"{self.file}: {shown(name)} is a {type(tensor).__name__}, not a plain tensor")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
            raise ModelError(f"{self.file}: {shown(name)} claims more numbers than the file has; refused")
        return tensor
