"""ModelScope (MODELSCOPE_ENDPOINT names another server of its protocol). Its client checks every sha256."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwen_eval.hubs.repository import TIMEOUT_S, HubError, Repository, unreachable

ENDPOINT = "https://www.modelscope.cn"
PORTS = {"http": 80, "https": 443}


def fetch(repository: Repository) -> Path:
    """As `snapshots.fetch`, without a look into the cache."""
    if importlib.util.find_spec("modelscope_hub") is None:
        raise HubError("ModelScope needs a package that is not here: pip install qwen_eval[modelscope]")
    import modelscope_hub as client

    try:
        _probe(_endpoint())
        api = _api()
        files = api.list_repo_files(repository.id, repository.kind, revision=repository.revision)
        names = repository.chosen(file.path for file in files if file.type != "tree")
        return _download(repository, names)
    except HubError:
        raise
    except client.FileDownloadError as error:
        name, cause = next(iter(error.failed_files.items()))
        words = f"{name}: {str(cause).splitlines()[0][:200]}"
        raise HubError(f"{len(error.failed_files)} of {error.total} files failed ({words}); fetch it again") from error
    except client.NotExistError as error:
        what = repository.kind + (f" or no revision {repository.revision} of it" if repository.revision else "")
        raise HubError(f"the hub has no such {what}; check the id") from error
    except (client.AuthenticationError, client.PermissionDeniedError) as error:
        raise HubError("not for you; log in with `ms login`, or set MODELSCOPE_API_TOKEN") from error
    except Exception as error:
        raise unreachable("modelscope", error) from error


def cached(repository: Repository) -> Path | None:
    """The folder of an earlier fetch that has wanted files; whether it has all of them is not recorded there."""
    if importlib.util.find_spec("modelscope_hub") is None:
        return None
    try:
        folder = _download(repository, None)
        repository.chosen(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    except Exception:  # whatever it is, there is no usable copy; the caller reports why the hub failed
        return None
    return folder


def _api() -> Any:
    import modelscope_hub

    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # what fails is said by us, once
    return modelscope_hub.HubApi(modelscope_hub.HubConfig(endpoint=_endpoint()))


def _download(repository: Repository, names: list[str] | None) -> Path:
    """`names` None: only what is on this machine."""
    return Path(
        _api().download_repo(
            repository.id,
            repository.kind,
            revision=repository.revision,
            allow_patterns=names,
            local_files_only=names is None,
        )
    )


def _endpoint() -> str:
    found = os.environ.get("MODELSCOPE_ENDPOINT") or ENDPOINT
    return found if "://" in found else f"https://{found}"


def _probe(endpoint: str) -> None:
    """OSError within seconds if there is no answer; the client would retry for minutes. Proxies are not probed."""
    parts = urlsplit(endpoint)
    has_proxy = bool({"http", "https", "all"} & urllib.request.getproxies().keys())
    if not has_proxy and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or PORTS.get(parts.scheme, 443)), TIMEOUT_S).close()
