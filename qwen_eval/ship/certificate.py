"""certificate.json: the answer, the question, digests of all that made it, and the evidence at every look.

Beside it `TASK/evidence.jsonl` has a line for each drawn item, in the drawn order: both scores and what both records
say. It is tamper-evident, not signed: who can write all files can write another certificate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from qwen_eval.core import JSON, Answer, ChoiceLogprobs, Completions, Record
from qwen_eval.runs.provenance import provenance, text_sha256
from qwen_eval.runs.store import write_bytes, write_json
from qwen_eval.ship.config import ShipSpec
from qwen_eval.ship.drawing import score
from qwen_eval.ship.run import Asked, ShipRun
from qwen_eval.ship.standing import ShipVerdict, Standing, rounded
from qwen_eval.ship.words import sentence

FORMAT = 1
PACKAGE_ROOT = Path(__file__).parents[1]
CERTIFICATE, EVIDENCE = "certificate.json", "evidence.jsonl"


class ModelEntry(TypedDict):
    """One of the two models."""

    model: str
    engine: str
    weights: str
    dtype: str | None


class SideEntry(TypedDict):
    """What one model was asked in one task."""

    spec_sha256: str
    weights: str
    requests_sha256: str
    benchmark: dict[str, JSON]
    failed: list[str]


class TaskEntry(TypedDict):
    """One task; beside these the keys of `standing_json`."""

    word: str
    kind: str
    items: int
    estimand: str
    order_sha256: str
    evidence_sha256: str
    reference: SideEntry
    candidate: SideEntry


class VerdictEntry(TypedDict):
    word: str
    is_equivalent: bool
    sentence: str


class Certificate(TypedDict):
    """What certificate.json holds, as far as it is read again. A file may be anybody's: its keys may be missing."""

    reference: ModelEntry
    candidate: ModelEntry
    tasks_asked: list[str]
    margin_points: float
    margin_ppl_percent: float
    alpha: float
    order_seed: int
    protocol: str
    verdict: VerdictEntry
    tasks: dict[str, TaskEntry]
    code_sha256: str
    sha256: str


def write(run: ShipRun, verdict: ShipVerdict) -> dict[str, Any]:
    """Evidence first, the certificate last. Two runs of one question differ in the section "provenance" alone."""
    tasks = {}
    for name, asked in run.asked.items():
        write_bytes(run.path / name / EVIDENCE, evidence_text(asked).encode("utf-8", "surrogatepass"))
        tasks[name] = _task(asked, verdict)
    content = _question(run.spec, run.asked) | {"verdict": _verdict(run, verdict), "tasks": tasks}
    content["code_sha256"] = code_sha256()
    content["sha256"] = json_sha256(content)
    content["provenance"] = provenance()
    write_json(run.path / CERTIFICATE, content)
    return content


def _question(spec: ShipSpec, asked: Mapping[str, Asked]) -> dict[str, Any]:
    first = next(iter(asked.values()), None)
    sides = {}
    for side in ("reference", "candidate"):
        cell = None if first is None else first.pair.side(side)
        sides[side] = {"model": spec.model(side).name, "engine": spec.engine(side).name} | (
            {} if cell is None else {"weights": cell.spec["decides"]["weights"], "dtype": cell.info.get("dtype")}
        )
    return {
        "format": FORMAT, "kind": "certificate", **sides, "tasks_asked": list(spec.tasks),
        "margin_points": spec.margin, "margin_ppl_percent": spec.margin_ppl, "alpha": spec.alpha,
        "order_seed": spec.seed, "protocol": spec.protocol,
    }  # fmt: skip


def _verdict(run: ShipRun, verdict: ShipVerdict) -> dict[str, Any]:
    return {
        "word": verdict.word,
        "is_equivalent": verdict.is_equivalent,
        "sentence": sentence(verdict, [asked.standing for asked in run.asked.values()], run.spec),
    }


def _task(asked: Asked, verdict: ShipVerdict) -> dict[str, Any]:
    standing = asked.standing
    sides = {side: _side(asked, side) for side in ("reference", "candidate")}
    return {
        "word": verdict.by_task[standing.task],
        **standing_json(standing),
        "estimand": estimand(asked),
        "order_sha256": text_sha256(sample.id for sample in asked.ordered),
        "evidence_sha256": text_sha256([evidence_text(asked)]),
        **sides,
    }


def estimand(asked: Asked) -> str:
    if asked.standing.kind == "texts":
        return "perplexity on texts like these: paired t test over documents, all texts read once"
    mean = "mean of the subjects' means" if asked.is_macro else "mean over items"
    return f"score on this benchmark ({mean}), items drawn at random without replacement"


def standing_json(standing: Standing) -> dict[str, Any]:
    return {
        "kind": standing.kind, "items": standing.num_items, "size": standing.size, "is_exact": standing.is_exact,
        "delta": rounded(standing.delta), "low": rounded(standing.low), "high": rounded(standing.high),
        "lost": standing.num_lost, "gained": standing.num_gained, "items_needed": standing.needed,
        "looks": [look.to_json() for look in standing.looks],
    }  # fmt: skip


def _side(asked: Asked, side: str) -> dict[str, Any]:
    decides = asked.pair.side(side).spec["decides"]
    return {
        "spec_sha256": json_sha256(decides),
        "weights": decides["weights"],
        "requests_sha256": decides["requests_sha256"],
        "benchmark": decides["benchmark"],
        "failed": asked.failed(side),
    }


# --- digests ---------------------------------------------------------------------------------------------------------


def evidence_text(asked: Asked) -> str:
    lines = (evidence_line(*pair, is_scored=asked.standing.kind == "items") for pair in asked.pair.records(asked.drawn))
    return "".join(f"{line}\n" for line in lines)


def evidence_line(reference: Record, candidate: Record, *, is_scored: bool) -> str:
    sides = {"reference": reference, "candidate": candidate}
    scores = {side: score(record) if is_scored else None for side, record in sides.items()}
    digests = {f"{side}_sha256": record_sha256(record) for side, record in sides.items()}
    return json.dumps({"id": reference.sample_id, **scores, **digests}, ensure_ascii=False)


def record_sha256(record: Record) -> str:
    """Of what a record says: prompts, replies, reading and score. Log-probabilities are left out: their last digits
    depend on what else was in a batch. Grading them again shows whether the reading follows from them.
    """
    said = [
        record.sample_id, record.group, record.cluster, record.target, record.prompts, record.prompt_sha256,
        [_said(answer) for answer in record.answers], record.grade.score, record.grade.extracted, record.grade.flags,
    ]  # fmt: skip
    return json_sha256(said)


def _said(answer: Answer) -> JSON:
    if isinstance(answer, Completions):
        return [[item.text, item.finish_reason] for item in answer.completions]
    return list(answer.num_tokens if isinstance(answer, ChoiceLogprobs) else answer.token_ids)


def json_sha256(value: object) -> str:
    """The same before and after a trip through a file: keys are sorted, tuples are lists."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def code_sha256() -> str:
    """Of the package's Python files."""
    files = sorted(PACKAGE_ROOT.rglob("*.py"))
    return text_sha256(f"{path.relative_to(PACKAGE_ROOT).as_posix()}\n{path.read_text('utf-8')}" for path in files)


def is_close(stored: object, found: object) -> bool:
    """Equal JSON trees, numbers to five digits: another machine adds in another order."""
    if isinstance(stored, dict) and isinstance(found, dict):
        return stored.keys() == found.keys() and all(is_close(stored[key], found[key]) for key in stored)
    if isinstance(stored, list) and isinstance(found, list):
        return len(stored) == len(found) and all(map(is_close, stored, found))
    if isinstance(stored, (int, float)) and isinstance(found, (int, float)):
        return math.isclose(stored, found, rel_tol=1e-5, abs_tol=1e-9)
    return bool(stored == found)
