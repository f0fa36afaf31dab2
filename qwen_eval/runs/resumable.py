"""What the run directory of an evaluation holds already, looked at without a lock and without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_eval.config import EvalSpec
from qwen_eval.core import JSON, QwenEvalError, Sample
from qwen_eval.runs.evaluate import deciding_settings, elsewhere, run_directory
from qwen_eval.runs.fields import section
from qwen_eval.runs.store import RECORDS, SPEC, differences, plain, read_json, read_records


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """`num_stored` of the samples have a record; `refusal`: why the run would not continue in this directory."""

    num_stored: int = 0
    refusal: str | None = None


def resumable(spec: EvalSpec, samples: Sequence[Sample]) -> Resumable:
    """Settings are compared, but not the checkpoint: its fingerprint needs its weights."""
    path = run_directory(spec)
    if spec.overwrite or not (path / SPEC).exists():
        return Resumable()
    try:
        old = section(read_json(path / SPEC).get("decides"))
        new: dict[str, JSON] = plain({**deciding_settings(dataclasses.asdict(spec)), "num_samples": len(samples)})
        changes = differences({key: old.get(key) for key in new}, new)
        ids = {record.sample_id for record in read_records(path / RECORDS)}
    except QwenEvalError as error:
        return Resumable(refusal=str(error))
    if changes:
        return Resumable(refusal=f"{path} holds another run: {'; '.join(changes[:5])}; pass {elsewhere(spec)}")
    return Resumable(num_stored=sum(sample.id in ids for sample in samples))
