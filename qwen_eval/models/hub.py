"""The place of a checkpoint's files: a local directory, an asset of the package, the Hugging Face hub or ModelScope.

Only data files are fetched (weights, configs, tokenizers), never code. A hub that does not answer costs seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import socket
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_eval.activity import stage
from qwen_eval.config import HUBS, ModelSpec
from qwen_eval.core import ConfigError, ModelError

ASSETS = Path(__file__).parent.parent / "assets"
FILES = ("*.safetensors", "*.bin", "*.json", "*.tiktoken", "*.txt", "*.model", "*.jinja")
# The first that is there holds the weights, as in transformers: an index beside a whole file is a leftover.
ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TIMEOUT_S = 8.0  # for the first word of a hub; downloads take the time they take
MODELSCOPE_HOST = "www.modelscope.cn"


def checkpoint_dir(spec: ModelSpec) -> Path:
    """The directory with config.json, weights and tokenizer of `spec`; ModelError in one line where there is none.

    `path` wins over `asset`, `asset` over the hub. Random weights of a hub model need no file of it: their shape is
    `arch`, and the directory is that of qwen-tiny, for its vocabulary.
    """
    if spec.path is not None:
        return local_dir(spec.path)
    if spec.asset is not None:
        return asset_dir(spec.asset)
    if spec.weights == "random" and spec.arch:
        return asset_dir("qwen-tiny")
    if spec.hub not in HUBS:
        raise ConfigError(f"model.hub={spec.hub}: not a hub; one of {', '.join(HUBS)}")
    if spec.hub == "modelscope":
        return _from_modelscope(spec)
    return _from_huggingface(spec)


def local_checkpoint_dir(spec: ModelSpec) -> Path:
    """As `checkpoint_dir`, but only from this machine: no hub is contacted, nothing is downloaded."""
    if spec.path is not None or spec.asset is not None or (spec.weights == "random" and spec.arch):
        return checkpoint_dir(spec)
    model_id = (spec.modelscope_id or spec.hub_id) if spec.hub == "modelscope" else spec.hub_id
    if model_id is None:
        raise ModelError(f"model {spec.name}: neither model.path, model.asset nor model.hub_id is given")
    found = _cached(lambda: _snapshot(spec.hub)(model_id, revision=spec.revision, local_files_only=True))
    if found is None:
        raise ModelError(f"model.hub_id={model_id}: no copy of it is cached on this machine")
    return found


def _snapshot(hub: str) -> Any:
    if hub == "modelscope":
        from modelscope import snapshot_download
    else:
        from huggingface_hub import snapshot_download
    return snapshot_download


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
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); install the package again") from error
    return digest.hexdigest()


def _from_huggingface(spec: ModelSpec) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    if spec.hub_id is None:
        raise ModelError(f"model {spec.name}: neither model.path, model.asset nor model.hub_id is given")
    wanted = f"model.hub_id={spec.hub_id}" + (f" model.revision={spec.revision}" if spec.revision else "")
    try:
        with stage(f"fetching {spec.hub_id}"):
            info = HfApi().model_info(spec.hub_id, revision=spec.revision, timeout=TIMEOUT_S)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            # by its name, not by the commit behind it: only so the copy is found under that name without a network
            return Path(snapshot_download(spec.hub_id, revision=spec.revision, allow_patterns=wanted_files(names)))
    except errors.GatedRepoError as error:
        raise ModelError(f"{wanted}: gated; accept its licence on the hub and log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{wanted}: the hub has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{wanted}: the hub has no such model, or not for you; check the id or log in") from error
    except Exception as error:  # network errors come in the types of whatever HTTP library the hub uses this year
        cached = _cached(lambda: snapshot_download(spec.hub_id, revision=spec.revision, local_files_only=True))
        return cached or _unreachable(wanted, "the Hugging Face hub", error)


def _from_modelscope(spec: ModelSpec) -> Path:
    model_id = spec.modelscope_id or spec.hub_id
    if model_id is None:
        raise ModelError(f"model {spec.name}: neither model.path, model.asset nor model.modelscope_id is given")
    if importlib.util.find_spec("modelscope") is None:
        raise ModelError("model.hub=modelscope needs a package that is not here: pip install qwen_eval[modelscope]")
    from modelscope import snapshot_download

    wanted = f"model.modelscope_id={model_id}" + (f" model.revision={spec.revision}" if spec.revision else "")
    try:
        _probe(MODELSCOPE_HOST)
        with stage(f"fetching {model_id}"):
            return Path(snapshot_download(model_id, revision=spec.revision, allow_patterns=list(FILES)))
    except Exception as error:
        cached = _cached(lambda: snapshot_download(model_id, revision=spec.revision, local_files_only=True))
        return cached or _unreachable(wanted, "ModelScope", error)


def _probe(host: str) -> None:
    """OSError within seconds if there is no answer; the client would retry for minutes. Proxies are not probed."""
    if not urllib.request.getproxies():
        socket.create_connection((host, 443), timeout=TIMEOUT_S).close()


def _cached(look_up: Any) -> Path | None:
    try:
        return Path(look_up())
    except Exception:  # whatever it is, there is no usable copy; the caller reports why the hub failed
        return None


def _unreachable(wanted: str, hub: str, error: Exception) -> Path:
    raise ModelError(
        f"{wanted}: {hub} cannot be reached ({type(error).__name__}) and no copy is cached; "
        "put the checkpoint's files into a directory and pass model.path=DIR"
    ) from error
