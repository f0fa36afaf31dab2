"""The place of a checkpoint's files: a local directory, an asset of the package, the Hugging Face hub or ModelScope.

Only data files are fetched (weights, configs, tokenizers), never code. A hub that does not answer costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qwen_eval.config import HUBS, ModelSpec
from qwen_eval.core import ConfigError, ModelError
from qwen_eval.hubs.repository import HubError, Repository, sha256_of
from qwen_eval.hubs.snapshots import cached, fetch

ASSETS = Path(__file__).parent.parent / "assets"
FILES = ("*.safetensors", "*.bin", "*.json", "*.tiktoken", "*.txt", "*.model", "*.jinja")
TEXTS = tuple(pattern for pattern in FILES if pattern not in ("*.safetensors", "*.bin"))
# The first that is there holds the weights, as in transformers: an index beside a whole file is a leftover.
ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def checkpoint_dir(spec: ModelSpec) -> Path:
    """The directory with config.json, weights and tokenizer of `spec`; ModelError in one line where there is none.

    `path` wins over `asset`, `asset` over the hub. Random weights of a hub model need no file of it: their shape is
    `arch`, and the directory is that of qwen-tiny, for its vocabulary.
    """
    return _own_dir(spec) or _fetched(spec, repository_of(spec))


def texts_dir(spec: ModelSpec) -> Path:
    """As `checkpoint_dir`, but no weights are fetched: config.json and the tokenizer's files are there."""
    return _own_dir(spec) or _fetched(spec, repository_of(spec, lambda names: list(TEXTS)))


def local_checkpoint_dir(spec: ModelSpec) -> Path:
    """As `checkpoint_dir`, but only from this machine: no hub is contacted, nothing is downloaded."""
    own = _own_dir(spec)
    if own is not None:
        return own
    repository = repository_of(spec)
    found = cached(repository)
    if found is None:
        raise ModelError(
            f"{_wanted(spec, repository.id)}: no copy is cached on this machine; fetch it with "
            f"`python -m qwen_eval.data get model={repository.id}`"
        )
    return found


def _own_dir(spec: ModelSpec) -> Path | None:
    """The directory of a spec that needs no hub."""
    if spec.path is not None:
        return local_dir(spec.path)
    if spec.asset is not None:
        return asset_dir(spec.asset)
    return asset_dir("qwen-tiny") if spec.weights == "random" and spec.arch else None


def _fetched(spec: ModelSpec, repository: Repository) -> Path:
    try:
        return fetch(repository)
    except HubError as error:
        way_out = "; put the checkpoint's files into a directory and pass model.path=DIR" if error.is_silent else ""
        raise ModelError(f"{_wanted(spec, repository.id)}: {error}{way_out}") from error


def local_dir(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelError(f"model.path={path}: not a directory; it must hold config.json, weights and tokenizer files")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(f"model.path={path}: no config.json there; copy the checkpoint's files into one directory")
    return folder


def asset_dir(name: str, root: Path = ASSETS) -> Path:
    """An embedded checkpoint, every byte checked against its SHA256SUMS."""
    folder = root / name
    sums = folder / "SHA256SUMS"
    if Path(name).name != name or not sums.is_file():
        known = sorted(file.parent.name for file in root.glob("*/SHA256SUMS"))
        raise ModelError(f"model.asset={name}: not in this package; one of {', '.join(known) or 'none'}")
    for line in sums.read_text(encoding="utf-8").splitlines():
        want, _, file = line.partition("  ")
        got = _sha256(folder / file)
        if got != want:
            raise ModelError(f"{folder / file}: sha256 {got[:12]}, expected {want[:12]}; install the package again")
    return folder


def wanted_files(names: Iterable[str]) -> list[str]:
    """The patterns to download of a repository that has `names`: not its .bin weights where it has safetensors too."""
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    return [pattern for pattern in FILES if not (has_safetensors and pattern == "*.bin")]


def _sha256(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); install the package again") from error


def repository_of(spec: ModelSpec, wanted: Callable[[Sequence[str]], list[str]] | None = None) -> Repository:
    """The repository of a model on its hub, and which of its files are wanted: as a rule all that an engine reads."""
    if spec.hub not in HUBS:
        raise ConfigError(f"model.hub={spec.hub}: not a hub; one of {', '.join(HUBS)}")
    model_id = (spec.modelscope_id or spec.hub_id) if spec.hub == "modelscope" else spec.hub_id
    if model_id is None:
        key = "model.modelscope_id" if spec.hub == "modelscope" else "model.hub_id"
        raise ModelError(f"model {spec.name}: neither model.path, model.asset nor {key} is given")
    return Repository(id=model_id, hub=spec.hub, revision=spec.revision, wanted=wanted or wanted_files)


def _wanted(spec: ModelSpec, model_id: str) -> str:
    """The keys that named it: `"model.hub_id=Qwen/Qwen-7B model.revision=v1"`."""
    key = "modelscope_id" if spec.hub == "modelscope" else "hub_id"
    return f"model.{key}={model_id}" + (f" model.revision={spec.revision}" if spec.revision else "")
