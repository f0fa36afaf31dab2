"""One run: ask the samples that are not graded yet, grade, store and summarise them. One model, one benchmark."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_eval.activity import stage
from qwen_eval.config import EvalSpec
from qwen_eval.core import (
    JSON,
    Answer,
    Completions,
    DataError,
    DrawsLimit,
    Engine,
    EngineError,
    Grade,
    HasArtifacts,
    HasNotes,
    LocatesNonFinite,
    MayFail,
    QwenEvalError,
    Record,
    Request,
    RunsPrograms,
    Sample,
    StoreError,
    Task,
    TokenLogprobs,
    Turn,
    ids_sha256,
    is_finite,
)
from qwen_eval.data.sources import draw
from qwen_eval.engines.kinds import deciding_keys, identity
from qwen_eval.engines.options import check_options
from qwen_eval.metrics import rates
from qwen_eval.runs.fields import as_count, as_object, is_number, section
from qwen_eval.runs.grading import Finished, Graders
from qwen_eval.runs.integrity import damage_of, doubled
from qwen_eval.runs.prompt_lengths import CUT_PROMPT, is_cut, length_warnings, read_by_model
from qwen_eval.runs.provenance import deciding_versions, provenance, text_sha256
from qwen_eval.runs.record_json import metric_to_json
from qwen_eval.runs.run import Run, load_run
from qwen_eval.runs.store import FORMAT, HIDDEN, RESULT, RunDirectory, differences, write_bytes, write_json
from qwen_eval.tasks.registry import FROM_FILES, OWN, NeedsTokenizer, TaskContext, build

# The place of a checkpoint or a benchmark cannot change a number: the digests of the files are compared instead.
PLACES = {"task": ("path", "file"), "model": ("path", "hub", "digest")}
SHOWN = ("metrics", "rates", "n", "partial", "warnings")  # of result.json, at the end of a command

MOST_CUT = 0.05  # of the replies
BOTH_READINGS = "both"  # scores of ours and of the official reader, whatever the protocol

OpenEngine = Callable[[EvalSpec], Engine]


@dataclass
class _Conversation:
    sample: Sample
    turns: list[Turn] = field(default_factory=list)


def run_directory(spec: EvalSpec) -> Path:
    if spec.run_dir is not None:
        return Path(spec.run_dir)
    return Path(spec.runs_dir) / "eval" / spec.task.name / spec.model.name / spec.tag


def elsewhere(spec: EvalSpec) -> str:
    """How this user names another run directory."""
    return "tag=NAME" if spec.run_dir is None else "run_dir=DIR"


def evaluate(spec: EvalSpec, open_engine: OpenEngine) -> Run:
    """Run, resume or recall one cell. `open_engine` is called only when something is left to ask.

    Raises QwenEvalError; whatever was graded before stays in the run directory and is not asked again.
    """
    warnings = check_options(spec.engine, spec.model, keep_hidden=spec.keep_hidden)
    with RunDirectory.open(run_directory(spec), elsewhere=elsewhere(spec)) as run:
        with stage(f"reading the rows of {spec.task.name}"):
            known = None if spec.overwrite else _finished(spec, run)
            if known is not None:
                return known
            refuse_mistakes(spec)
        with stage(f"loading {spec.model.name}"):
            engine = open_engine(spec)
        with stage(f"reading the rows of {spec.task.name}"):
            task = build(spec.task, task_context(spec, engine))
            samples = selected(task, spec)
            run.check_spec(run_spec(spec, task, samples, engine.info), overwrite=spec.overwrite)
        start = time.perf_counter()
        done = _answered(run, samples)
        left = [sample for sample in samples if sample.id not in done]
        meter = ask(engine, task, left, run.append, num_done=len(done), model=spec.model.name)
        session = _session(meter, time.perf_counter() - start, num_resumed=len(done))
        records = in_order(samples, run.records())
        result = summary(task, samples, records, spec)
        warnings += task.notes if isinstance(task, HasNotes) else ()
        warnings += cut_replies(section(result["rates"]))
        warnings += [*length_warnings(records, engine.info), *engine.info.get("warnings", ())]
        result |= {"run": session, "engine": dict(engine.info), "warnings": warnings, "provenance": provenance()}
        write_artifacts(task, records, run.path)
        run.finish(result)
        return load_run(run.path)


def cut_replies(rates: Mapping[str, JSON]) -> list[str]:
    """A warning if so many replies were truncated that the score is not a fair measure of the model."""
    cut = section(rates.get("truncated")).get("value")
    if not is_number(cut) or cut <= MOST_CUT:
        return []
    return [f"{100 * cut:.1f} % of the replies were cut at the limit of new tokens; raise task.max_new_tokens"]


def task_context(spec: EvalSpec, engine: Engine | None, *, facts: Mapping[str, JSON] | None = None) -> TaskContext:
    """`facts`: the stored `Engine.info` of a finished run, where no engine is open."""
    return TaskContext(
        protocol=spec.protocol,
        is_chat=spec.model.chat if spec.task.mode == "auto" else spec.task.mode == "chat",
        tokenizer=engine.tokenizer if engine else None,
        sandbox=spec.sandbox,
        hidden_dir=str(run_directory(spec) / HIDDEN) if spec.keep_hidden else None,
        model_facts=dict(engine.info) if engine else dict(facts or {}),
    )


def selected(task: Task, spec: EvalSpec) -> list[Sample]:
    """The samples of this run in the task's order: all, or the seeded subset of `limit`."""
    samples = list(task.samples())
    twice = doubled([sample.id for sample in samples])
    if twice is not None:
        raise DataError(f"task={spec.task.name}: two samples have the id {twice}; an id must name one row of the data")
    if spec.task.limit is None or isinstance(task, DrawsLimit):
        return samples
    return list(draw(samples, spec.task.limit, spec.task.seed))


def run_spec(spec: EvalSpec, task: Task, samples: Sequence[Sample], info: Mapping[str, JSON]) -> dict[str, JSON]:
    """The content of spec.json; its section "decides" must be equal for a run to be resumed."""
    config = dataclasses.asdict(spec)
    return {
        "format": FORMAT,
        "kind": "eval",
        "readings": BOTH_READINGS,
        "config": config,
        "decides": {
            **deciding_settings(config),
            "task_version": task.version,
            "benchmark": dict(task.describe()),
            "num_samples": len(samples),
            "requests_sha256": requests_sha256(task, samples),
            "weights": info.get("weights") or identity(spec.engine, spec.model),
            "chat_template": info.get("chat_template"),
            "packages": deciding_versions(has_programs=isinstance(task, RunsPrograms)),
            **({"task_file_sha256": FROM_FILES[spec.task.name].sha256} if spec.task.name in FROM_FILES else {}),
        },
        "provenance": provenance(),
    }


def deciding_settings(config: Mapping[str, Any]) -> dict[str, JSON]:
    """The keys of a run's configuration that can change its numbers."""
    return {
        **{part: _without(config[part], PLACES.get(part, ())) for part in ("task", "model")},
        "engine": {key: config["engine"].get(key) for key in deciding_keys()},
        "protocol": config["protocol"],
    }


def requests_sha256(task: Task, samples: Iterable[Sample]) -> str:
    """Of the first request of every sample, before any tokenizer: a changed prompt, choice or stop string shows."""
    return text_sha256(f"{sample.id} {task.request(sample, ())!r}" for sample in samples)


def ask(
    engine: Engine,
    task: Task,
    samples: Sequence[Sample],
    keep: Callable[[Record], None],
    *,
    model: str = "",
    num_done: int = 0,
    keep_failed: Callable[[Sample, Request], None] | None = None,
) -> Meter:
    """Ask all samples together, turn by turn; graded ones go to `keep` as they are graded, beside the engine.

    Those that fail on non-finite numbers go to `keep_failed`; without it, EngineError at the end: they are not stored,
    and the run is not finished. EngineError at the end, too, for those that the engine gave no answer.
    """
    meter = Meter()
    what = " · ".join(filter(None, (task.name, model)))
    total = num_done + len(samples)
    with stage(what, total=total, unit="samples", num_before=num_done, tokens=_tokens_of(engine)) as asking:

        def store(record: Record) -> None:
            keep(record)
            read, written = meter.add(record)
            asking.advance(read=read, written=written)

        with Graders(task, store) as graders:
            failed, unanswered = _converse(engine, task, samples, graders)
    if failed and keep_failed is None:
        raise EngineError(failure(engine, failed, len(samples)))
    if keep_failed is not None:
        for sample, request in failed:
            keep_failed(sample, request)
    if unanswered:
        raise EngineError(no_answer(unanswered, len(samples)))
    return meter


def _converse(
    engine: Engine, task: Task, samples: Sequence[Sample], graders: Graders
) -> tuple[list[tuple[Sample, Request]], list[tuple[Sample, str]]]:
    """Ask until every sample is finished, and hand it to the graders.

    Returns those whose answer was not finite, and those without an answer, each with the reason.
    """
    failed: list[tuple[Sample, Request]] = []
    unanswered: list[tuple[Sample, str]] = []
    upcoming: list[tuple[_Conversation, Request]] = []

    def advance(conversation: _Conversation) -> None:
        sample, turns = conversation.sample, tuple(conversation.turns)
        request = task.request(sample, turns)
        if request is None:
            graders.add(Finished(sample=sample, turns=turns, draft=draft_of(engine, sample, turns)))
        else:
            upcoming.append((conversation, request))

    for sample in samples:
        advance(_Conversation(sample))
    while upcoming:
        asked, upcoming = upcoming, []
        num_answers = 0
        for index, answer in engine.run([request for _, request in asked]):
            conversation, request = asked[index]
            num_answers += 1
            if not is_finite(answer):
                failed.append((conversation.sample, request))
                continue
            conversation.turns.append(Turn(request=request, answer=answer))
            advance(conversation)
        lost = engine.failures if isinstance(engine, MayFail) else {}
        unanswered += [(asked[index][0].sample, reason) for index, reason in sorted(lost.items())]
        assert num_answers + len(lost) == len(asked), f"{num_answers} answers to {len(asked)} requests"
    return failed, unanswered


def no_answer(unanswered: Sequence[tuple[Sample, str]], num_asked: int) -> str:
    """How many samples the engine gave no answer, why the first has none, and the way out."""
    sample, reason = unanswered[0]
    return (
        f"{len(unanswered)} of {num_asked} samples have no answer ({sample.id}: {reason}); "
        "the others are stored, the same command asks for the rest"
    )


def failure(engine: Engine, failed: Sequence[tuple[Sample, Request]], num_asked: int) -> str:
    """What failed, where the numbers overflow, and the way out; the first failed sample is looked into."""
    sample, request = failed[0]
    dtype = str(engine.info.get("dtype", "of unknown dtype"))
    where = engine.locate_non_finite(request) if isinstance(engine, LocatesNonFinite) else f"a layer in {dtype}"
    ways_out = {"float16": "model.dtype=bf16 or fp32", "bfloat16": "model.dtype=fp32"}
    way_out = f"try {ways_out[dtype]}" if dtype in ways_out else "look into the weights or the server"
    return (
        f"{len(failed)} of {num_asked} samples failed: non-finite logits ({sample.id}: NaN or infinity from {where}); "
        f"the others are stored, the run is not finished; {way_out}"
    )


class Meter:
    """What this session asked and got. Scored tokens and choices count as answered ones."""

    def __init__(self) -> None:
        self.num_samples = self.num_prompt_tokens = self.num_answer_tokens = 0

    def add(self, record: Record) -> tuple[int, int]:
        """Count a record; returns the tokens of its prompts and of its answers."""
        prompt_tokens = sum(record.num_prompt_tokens)
        answer_tokens = sum(_num_answer_tokens(answer) for answer in record.answers)
        self.num_samples += 1
        self.num_prompt_tokens += prompt_tokens
        self.num_answer_tokens += answer_tokens
        return prompt_tokens, answer_tokens


def _tokens_of(engine: Engine) -> Callable[[], tuple[int, int]] | None:
    """Tokens read and written since now, of an engine that counts while it works: long replies show life, too."""

    def counted() -> tuple[int, int]:
        info = engine.info
        written = as_count(info["generated_tokens"])
        return as_count(info["computed_tokens"]) - written, written

    if not {"computed_tokens", "generated_tokens"} <= set(engine.info):
        return None
    read_before, written_before = counted()
    return lambda: (counted()[0] - read_before, counted()[1] - written_before)


def refuse_mistakes(spec: EvalSpec) -> None:
    """What a task refuses (ConfigError, DataError), before its engine is loaded. Only tasks of ours are known to be
    built without one; those that count in tokens are looked at later."""
    if spec.task.name not in OWN:
        return
    try:
        task = build(spec.task, task_context(spec, None))
        if spec.task.subjects or spec.task.path is not None:
            task.samples()
    except NeedsTokenizer:
        return


def draft_of(engine: Engine, sample: Sample, turns: Sequence[Turn]) -> Record:
    """The record of a finished sample that is not graded yet; its flags are those of the prompt."""
    rendered = [read_by_model(engine, turn.request) for turn in turns]
    was_cut = any(is_cut(engine, turn.request) for turn in turns)
    return Record(
        sample_id=sample.id,
        group=sample.group,
        cluster=sample.cluster,
        target=sample.target,
        prompts=tuple(item.text for item in rendered),
        prompt_sha256=tuple(ids_sha256(item.ids) for item in rendered),
        num_prompt_tokens=tuple(len(item.ids) for item in rendered),
        answers=tuple(turn.answer for turn in turns),
        grade=Grade(score=None, flags=(CUT_PROMPT,) if was_cut else ()),
    )


def summary(task: Task, samples: Sequence[Sample], records: Iterable[Record], spec: EvalSpec) -> dict[str, JSON]:
    """The sections of result.json that depend on the records alone, in the task's order: however often the run was
    killed, and in whatever order the answers came, they are the same bytes."""
    ordered = [record.under(spec.protocol) for record in in_order(samples, records)]
    partial: dict[str, JSON] = {"limit": spec.task.limit} if spec.task.limit is not None else {}
    if spec.task.subjects:
        partial["subjects"] = list(spec.task.subjects)
    if str(task.describe().get("origin", "")).startswith("bundled:"):
        partial["data"] = "bundled sample"
    return {
        "metrics": {name: metric_to_json(metric) for name, metric in task.summarise(ordered).items()},
        "rates": {name: metric_to_json(metric) for name, metric in rates(ordered).items()},
        "n": len(ordered),
        "partial": partial,
    }


def in_order(samples: Sequence[Sample], records: Iterable[Record]) -> list[Record]:
    """The records in the task's order, not in that of the answers."""
    by_id = {record.sample_id: record for record in records}
    return [by_id[sample.id] for sample in samples]


def write_artifacts(task: Task, records: Sequence[Record], directory: Path) -> None:
    """The files a task makes beside its numbers, before result.json says that the run is whole."""
    if not isinstance(task, HasArtifacts):
        return
    for name, content in task.artifacts(records).items():
        if isinstance(content, bytes):
            write_bytes(directory / name, content)
        elif isinstance(content, str):
            write_bytes(directory / name, content.encode("utf-8"))
        else:
            write_json(directory / name, as_object(content))


def _finished(spec: EvalSpec, run: RunDirectory) -> Run | None:
    """An equal, finished run, found without loading the model; None whenever that is not certain.

    StoreError where the run was made with another checkpoint or endpoint than the one at hand, or was damaged since.
    """
    if run.spec() is None:
        return None
    try:
        weights = identity(spec.engine, spec.model)
    except QwenEvalError:  # no checkpoint at hand: opening the engine reports what is missing
        return None
    run.refuse_changes({"weights": weights})
    damage = damage_of(run.path)
    if damage is not None and not damage.is_rebuildable:
        raise StoreError(f"{run.path}: {damage.reason} with {run.elsewhere}")
    if damage is not None or not (run.path / RESULT).exists():
        return None  # the records are kept: what is missing is asked, and the result is made from them again
    stored = load_run(run.path)
    if not set(SHOWN) <= set(stored.result):
        return None
    try:
        facts = {**stored.engine_info, "weights": weights}
        task = build(spec.task, task_context(spec, None, facts=facts))
        now = run_spec(spec, task, selected(task, spec), facts)
    except QwenEvalError:  # a task that needs the tokenizer; opening the engine reports any other mistake
        return None
    return None if differences(stored.decides, now["decides"]) else replace(stored, was_finished=True)


def _answered(run: RunDirectory, samples: Sequence[Sample]) -> set[str]:
    """The ids of the samples with a record; StoreError for a record that does not belong to one of them."""
    ids = [record.sample_id for record in run.records()]
    known = {sample.id for sample in samples}
    stranger = doubled(ids) or next((name for name in ids if name not in known), None)
    if stranger is not None:
        raise StoreError(f"{run.path}: records.jsonl has sample {stranger} twice or of another run; {run.way_out}")
    return set(ids)


def _session(meter: Meter, run_s: float, *, num_resumed: int) -> dict[str, JSON]:
    """Of the session that finished the run: what earlier sessions asked is `num_resumed` samples, of unknown time."""
    return {
        "run_s": run_s,
        "num_samples": meter.num_samples,
        "num_resumed": num_resumed,
        "num_prompt_tokens": meter.num_prompt_tokens,
        "num_answer_tokens": meter.num_answer_tokens,
    }


def _num_answer_tokens(answer: Answer) -> int:
    if isinstance(answer, Completions):
        return sum(item.num_tokens for item in answer.completions)
    return len(answer.token_ids) if isinstance(answer, TokenLogprobs) else sum(answer.num_tokens)


def _without(section: Mapping[str, Any], keys: Iterable[str]) -> dict[str, JSON]:
    return {key: value for key, value in section.items() if key not in keys}
