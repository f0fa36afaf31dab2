"""The origin of a number: code, packages, machine. No torch: the engine reports its part in `Engine.info`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from qwen_eval.core import JSON
from qwen_eval.models.cpu import cpu_model

PACKAGES = (
    "qwen_eval",
    "torch",
    "transformers",
    "tokenizers",
    "tiktoken",
    "numpy",
    "datasets",
    "bitsandbytes",
    "vllm",
    "ray",
)
DECIDING = ("torch", "transformers", "tokenizers", "tiktoken")  # another major version may change numbers


def provenance() -> dict[str, JSON]:
    """Recorded beside every result, compared with nothing."""
    git = git_state()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": None if git is None else dict(git),
        "packages": dict(package_versions()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "threads_env": os.environ.get("OMP_NUM_THREADS"),
        "argv": sys.argv[1:],
    }


@cache  # many runs may come of one process, and its code and packages are those that it began with
def package_versions() -> Mapping[str, str]:
    """Versions of the packages that are installed, without importing one."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def deciding_versions(*, has_programs: bool = False) -> dict[str, str]:
    """`has_programs`: programs of a model are run, which one Python knows how to run and another does not."""
    found = {name: version.split(".")[0] for name, version in package_versions().items() if name in DECIDING}
    return found | ({"python": f"{sys.version_info.major}.{sys.version_info.minor}"} if has_programs else {})


@cache
def git_state() -> Mapping[str, JSON] | None:
    """Commit and dirty flag of the checkout this package is imported from; None for an installed copy."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None  # site-packages inside somebody else's repository is not our commit
    commit, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(status)}


def text_sha256(parts: Iterable[str]) -> str:
    """Of the parts one by one: moving a boundary changes the hash."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
