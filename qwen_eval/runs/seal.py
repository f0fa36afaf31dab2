"""The seal of a finished run: digests of its spec, records and result in result.json. Later changes are detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from qwen_eval.core import JSON

SEAL = "seal"
SEALED_OF_SPEC = ("format", "kind", "config", "decides")


def sealed(result: Mapping[str, JSON], spec: Mapping[str, JSON], records: Path) -> dict[str, JSON]:
    """`result` with its seal; `records` need not exist (a profile has none)."""
    content = {key: value for key, value in result.items() if key != SEAL}
    size, num_records, digest = _of_file(records)
    return content | {
        SEAL: {
            "spec_sha256": _of_spec(spec),
            "result_sha256": _of_json(content),
            "records_sha256": digest,
            "records_bytes": size,
            "num_records": num_records,
        }
    }


def broken_parts(result: Mapping[str, JSON], spec: Mapping[str, JSON], records: Path) -> list[str]:
    """Which of "spec", "records" and "result" are not as they were sealed; of a result with a seal."""
    seal = result[SEAL]
    if not isinstance(seal, Mapping):
        return ["result"]
    content = {key: value for key, value in result.items() if key != SEAL}
    size = records.stat().st_size if records.is_file() else 0
    intact = {
        "spec": seal.get("spec_sha256") == _of_spec(spec),
        # a file of another size is not read: it may be of any size
        "records": seal.get("records_bytes") == size and seal.get("records_sha256") == _of_file(records)[2],
        "result": seal.get("result_sha256") == _of_json(content),
    }
    return [part for part, is_intact in intact.items() if not is_intact]


def _of_spec(spec: Mapping[str, JSON]) -> str:
    return _of_json({key: spec.get(key) for key in SEALED_OF_SPEC})


def _of_json(value: JSON) -> str:
    """The same before and after a trip through a file: keys are sorted, tuples are lists."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_file(path: Path) -> tuple[int, int, str]:
    """(bytes, lines, sha256)"""
    sha, size, lines = hashlib.sha256(), 0, 0
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
                size, lines = size + len(block), lines + block.count(b"\n")
    return size, lines, sha.hexdigest()
