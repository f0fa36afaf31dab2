"""`python -m qwen_eval.ship verify=FILE`: does the answer follow from the records, and are they as they were?

With `reference=` and `candidate=` the checkpoints at hand are compared too, and with `spot=20` items are asked again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from qwen_eval.config import EvalSpec
from qwen_eval.core import (
    ChoiceLogprobs,
    GradesInBatches,
    QwenEvalError,
    Record,
    Sample,
    StoreError,
    Task,
    Tokenizer,
    Turn,
)
from qwen_eval.engines.kinds import identity
from qwen_eval.models.hub import local_checkpoint_dir
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.report.runs import CERTIFICATE as KIND
from qwen_eval.runs.evaluate import ask, requests_sha256, selected, task_context
from qwen_eval.runs.grading import graded
from qwen_eval.runs.provenance import text_sha256
from qwen_eval.runs.store import RECORDS, SPEC, differences, read_json, read_records
from qwen_eval.runs.stored import stored_config
from qwen_eval.ship.certificate import (
    CERTIFICATE,
    EVIDENCE,
    FORMAT,
    Certificate,
    SideEntry,
    TaskEntry,
    code_sha256,
    evidence_line,
    is_close,
    json_sha256,
    standing_json,
)
from qwen_eval.ship.config import SIDES, ShipSpec, named_sides
from qwen_eval.ship.drawing import drawn_order, ends_until, weights
from qwen_eval.ship.sides import FAILED, Engines
from qwen_eval.ship.standing import Standing, draws_of, of_items, of_texts, verdict
from qwen_eval.tasks.registry import TaskContext, build
from qwen_eval.terminal import plain_text

MAX_EVIDENCE_BYTES = 256 << 20
TIE = 1e-4  # nats between two choices whose stored digits may not tell which was larger
SPOT_TOLERANCE = 0.1  # of the items asked again in half precision, at least one, may fall the other way


@dataclass
class Findings:
    """`faults` make a certificate void; `notes` are what could not be checked, or is other without harm."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(self, what: str, stored: object, found: object) -> bool:
        if stored != found:
            self.faults.append(f"{what}: {_short(stored)} in the certificate, {_short(found)} now")
        return stored == found


@dataclass(frozen=True, kw_only=True)
class StoredSide:
    """One side of one task, as it lies in its directory."""

    side: str
    spec: Mapping[str, Any]
    config: EvalSpec
    task: Task
    samples: Sequence[Sample]
    records: Mapping[str, Record]


def verify(spec: ShipSpec) -> int:
    """Print what was found; 0 where the certificate holds, 1 where it does not."""
    path = Path(spec.verify or "")
    path = path / CERTIFICATE if path.is_dir() else path
    findings = check_certificate(path, spec)
    for line in findings.notes:
        print(plain_text(f"note: {line}"))
    for line in findings.faults:
        print(plain_text(f"does not hold: {line}"))
    if not findings.faults:
        print(plain_text(f"{path}: holds; {_read(path)['verdict']['sentence']}"))
    return 1 if findings.faults else 0


def check_certificate(path: Path, spec: ShipSpec) -> Findings:
    stored = _read(path)
    findings = Findings()
    try:
        _check_content(stored, findings)
        standings = [_try_task(path.parent / name, name, stored, spec, findings) for name in stored["tasks"]]
        found = verdict([s for s in standings if s is not None], stored["tasks_asked"], stored["alpha"])
        findings.compare("the verdict", stored["verdict"]["word"], found.word)
        findings.compare("equivalence", stored["verdict"]["is_equivalent"], found.is_equivalent)
        _check_models(stored, spec, findings)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        findings.faults.append(f"{path}: not a certificate that this version reads ({type(error).__name__}: {error})")
    return findings


def _read(path: Path) -> Certificate:
    if not path.is_file():
        raise StoreError(f"verify={path}: no such file; give a certificate.json or the directory that holds it")
    stored = read_json(path)
    if stored.get("kind") != "certificate" or stored.get("format") != FORMAT:
        raise StoreError(f"verify={path}: not a certificate of format {FORMAT}")
    return cast(Certificate, stored)


def _check_content(stored: Certificate, findings: Findings) -> None:
    content = {key: value for key, value in stored.items() if key not in ("sha256", "provenance")}
    if json_sha256(content) != stored["sha256"]:
        findings.faults.append("certificate.json was edited: its own digest does not match")
    if stored["code_sha256"] != code_sha256():
        findings.notes.append("another version of the code made it; everything was computed again with this one")


# --- one task --------------------------------------------------------------------------------------------------------


def _try_task(directory: Path, name: str, stored: Certificate, spec: ShipSpec, findings: Findings) -> Standing | None:
    try:
        return _check_task(directory, name, stored["tasks"][name], stored, spec, findings)
    except QwenEvalError as error:
        findings.faults.append(f"{name}: {error}")
        return None


def _check_task(
    directory: Path, name: str, section: TaskEntry, stored: Certificate, spec: ShipSpec,
    findings: Findings,
) -> Standing | None:  # fmt: skip
    """The standing computed again from the records; None where they do not allow it."""
    sides: dict[str, StoredSide] = {}
    for side in SIDES:
        opened = _open(directory / side, name, side, section[side], findings)
        if opened is None:
            return None
        sides[side] = opened
    reference, candidate = sides["reference"], sides["candidate"]
    ordered = _ordered(reference, section, stored)
    findings.compare(f"{name}: the order of items", section["order_sha256"], text_sha256(s.id for s in ordered))
    drawn = ordered[: section["items"]]
    if not _has_records(name, sides, drawn, findings):
        return None
    both, protocol = (reference.records, candidate.records), str(stored["protocol"])
    pairs = [(both[0][s.id].under(protocol), both[1][s.id].under(protocol)) for s in drawn]
    _check_evidence(directory / EVIDENCE, name, section, pairs, findings)
    for opened in sides.values():
        _check_grades(name, opened, drawn, findings)
    standing = _standing(name, reference, ordered, pairs, section, stored)
    held: Mapping[str, object] = section
    for key, value in standing_json(standing).items():
        if not is_close(held[key], value):
            findings.faults.append(f"{name}: {key} is {_short(held[key])}, the records give {_short(value)}")
    _spot(spec, name, sides, drawn, findings)
    return standing


def _has_records(name: str, sides: Mapping[str, StoredSide], drawn: Sequence[Sample], findings: Findings) -> bool:
    missing = {side: [s.id for s in drawn if s.id not in opened.records] for side, opened in sides.items()}
    findings.faults += [f"{name}: {side} has no record of {', '.join(ids[:5])}" for side, ids in missing.items() if ids]
    return not any(missing.values())


def _open(directory: Path, name: str, side: str, section: SideEntry, findings: Findings) -> StoredSide | None:
    """Reads a side and compares its questions with those that the task asks today."""
    where = f"{name}, {side}"
    try:
        found = read_json(directory / SPEC)
        config = stored_config(found)
        records = {record.sample_id: record for record in read_records(directory / RECORDS)}
        task = build(config.task, _context(config, found))
        samples = selected(task, config)
    except (QwenEvalError, OSError) as error:
        findings.faults.append(f"{where}: cannot be read again: {error}")
        return None
    if found.get("kind") != KIND or json_sha256(found["decides"]) != section["spec_sha256"]:
        findings.faults.append(f"{where}: spec.json was changed")
    for change in differences(section["benchmark"], json.loads(json.dumps(dict(task.describe())))):
        findings.faults.append(f"{where}: the data or the settings are others: {change}")
    if requests_sha256(task, samples) != section["requests_sha256"]:
        findings.faults.append(f"{where}: the prompts are others now than those that were asked")
    return StoredSide(side=side, spec=found, config=config, task=task, samples=samples, records=records)


def _context(config: EvalSpec, spec: Mapping[str, Any]) -> TaskContext:
    context = task_context(config, None, facts=spec.get("engine") or {})
    return replace(context, tokenizer=_tokenizer(config))


def _tokenizer(config: EvalSpec) -> Tokenizer | None:
    """Of the checkpoint, where it is at hand: some tasks count in tokens."""
    if config.engine.name in ("openai", "fake"):
        return None
    try:
        return load_tokenizer(local_checkpoint_dir(config.model))
    except (QwenEvalError, OSError):
        return None


def _ordered(reference: StoredSide, section: TaskEntry, stored: Certificate) -> Sequence[Sample]:
    if section["kind"] == "items":
        return drawn_order(reference.samples, stored["order_seed"])
    group = next(iter(reference.task.summarise(reference.records.values()))).rpartition("/")[2]
    return [sample for sample in reference.samples if sample.group == group] or reference.samples


def _standing(
    name: str, reference: StoredSide, ordered: Sequence[Sample], pairs: Sequence[tuple[Record, Record]],
    section: TaskEntry, stored: Certificate,
) -> Standing:  # fmt: skip
    if section["kind"] == "texts":
        return of_texts(name, pairs, stored["margin_ppl_percent"], stored["alpha"])
    ends = ends_until(len(ordered), section["items"])
    draws = draws_of(pairs, weights(reference.task, ordered))
    return of_items(name, draws, ends, stored["margin_points"] / 100, stored["alpha"], is_final=True)


def _check_evidence(
    path: Path, name: str, section: TaskEntry, pairs: Sequence[tuple[Record, Record]], findings: Findings
) -> None:
    """The records against evidence.jsonl, line by line, and that against its digest: a changed record is named."""
    text = _text(path)
    if text_sha256([text]) != section["evidence_sha256"]:
        findings.faults.append(f"{name}: {EVIDENCE} was changed")
    lines = text.splitlines()
    if len(lines) != len(pairs):
        findings.faults.append(f"{name}: {EVIDENCE} has {len(lines)} items, the certificate is of {len(pairs)}")
    for line, (reference, candidate) in zip(lines, pairs):
        if line != evidence_line(reference, candidate, is_scored=section["kind"] == "items"):
            side = _changed_side(line, reference, candidate)
            findings.faults.append(f"{name}: the record of {reference.sample_id} of the {side} was changed")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_EVIDENCE_BYTES:
            raise StoreError(f"{path}: larger than {MAX_EVIDENCE_BYTES >> 20} MiB, this is no evidence of ours")
        return path.read_bytes().decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error


def _changed_side(line: str, reference: Record, candidate: Record) -> str:
    try:
        stored: dict[str, object] = json.loads(line)
        found: dict[str, object] = json.loads(evidence_line(reference, candidate, is_scored=True))
        changed = [side for side in SIDES if stored[f"{side}_sha256"] != found[f"{side}_sha256"]]
    except (ValueError, KeyError, TypeError, QwenEvalError):
        return "reference or candidate"
    return " and ".join(changed) or "reference or candidate"


def _check_grades(name: str, opened: StoredSide, drawn: Sequence[Sample], findings: Findings) -> None:
    """The stored answers are graded again: a score that does not follow from its answer is named."""
    asked = [
        (sample, opened.records[sample.id]) for sample in drawn if FAILED not in opened.records[sample.id].grade.flags
    ]
    try:
        turns = [(sample, _turns(opened.task, sample, record)) for sample, record in asked]
    except (StoreError, AssertionError) as error:
        findings.faults.append(f"{name}, {opened.side}: answers and questions do not match: {error}")
        return
    task = opened.task
    grades = task.grade_many(turns) if isinstance(task, GradesInBatches) else [graded(task, *item) for item in turns]
    for (sample, record), grade in zip(asked, grades):
        if grade.score != record.grade.score and not _is_close_call(record):
            scores = f"{record.grade.score} is stored, the answer gives {grade.score}"
            findings.faults.append(f"{name}: the score of {sample.id} of the {opened.side}: {scores}")


def _turns(task: Task, sample: Sample, record: Record) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for answer in record.answers:
        request = task.request(sample, tuple(turns))
        if request is None:
            raise StoreError(f"{sample.id} has more answers than it is asked questions")
        turns.append(Turn(request=request, answer=answer))
    return tuple(turns)


def _is_close_call(record: Record) -> bool:
    """Two choices so near that the stored digits cannot tell them apart."""
    return any(
        isinstance(answer, ChoiceLogprobs) and len(best := sorted(answer.logprobs)) > 1 and best[-1] - best[-2] < TIE
        for answer in record.answers
    )


# --- the models ------------------------------------------------------------------------------------------------------


def _check_models(stored: Certificate, spec: ShipSpec, findings: Findings) -> None:
    for side in named_sides():
        found = identity(spec.engine(side), spec.model(side))
        if found != stored[side]["weights"]:
            what = f"is {_short(found)}, the certificate is of {_short(stored[side]['weights'])}"
            findings.faults.append(f"{side}: the checkpoint of {spec.model(side).name} {what}")
    for name, section in stored["tasks"].items():
        for side in SIDES:
            findings.compare(f"{name}, {side}: the checkpoint", stored[side]["weights"], section[side]["weights"])


def _spot(
    spec: ShipSpec, name: str, sides: Mapping[str, StoredSide], drawn: Sequence[Sample], findings: Findings
) -> None:
    """Some items asked again, another choice each time, by the models that the command names."""
    if not spec.spot or findings.faults:
        return
    samples = random.sample(list(drawn), min(spec.spot, len(drawn)))
    engines = Engines(spec)
    try:
        for side, opened in sides.items():
            _ask_again(spec, name, side, opened, samples, engines, findings)
    finally:
        engines.close()


def _ask_again(
    spec: ShipSpec, name: str, side: str, opened: StoredSide, samples: Sequence[Sample], engines: Engines,
    findings: Findings,
) -> None:  # fmt: skip
    cell = replace(opened.config, model=spec.model(side), engine=spec.engine(side))
    engine = engines.open(side, cell)
    found: dict[str, Record] = {}
    task = build(cell.task, task_context(cell, engine))

    def keep(record: Record) -> None:
        found[record.sample_id] = record

    ask(engine, task, samples, keep, model=cell.model.name, keep_failed=lambda sample, request: None)
    changed = [sample.id for sample in samples if _differs(found.get(sample.id), opened.records[sample.id])]
    allowed = 0 if engine.info.get("dtype") in ("float32", None) else max(1, math.floor(SPOT_TOLERANCE * len(samples)))
    said = f"{name}, {side}: {len(changed)} of {len(samples)} items asked again are answered otherwise"
    if len(changed) > allowed:
        findings.faults.append(f"{said}, such as {changed[0]}")
    elif changed:
        findings.notes.append(f"{said}, as close calls in half precision may be")


def _differs(found: Record | None, stored: Record) -> bool:
    return (None if found is None else found.grade.score) != (
        None if FAILED in stored.grade.flags else stored.grade.score
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-12:]}"
