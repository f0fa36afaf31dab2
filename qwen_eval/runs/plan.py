"""`plan=true`: what an evaluation will take, before it is run: tokens, memory, time, and the price at an endpoint.

The rows, the tokenizer and the configuration are read, but no weights; nothing is asked and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_eval.config import EvalSpec
from qwen_eval.core import JSON, ConfigError, ModelError, QwenEvalError, Request, Sample, Task, Tokenizer
from qwen_eval.engines.api.account import Prices, read_prices
from qwen_eval.engines.api.replies import Usage
from qwen_eval.engines.kinds import kind
from qwen_eval.engines.options import check_options
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import (
    CUDA_CONTEXT_BYTES,
    CUDA_HEAD_BYTES,
    BatchLimits,
    Cost,
    batch_limits,
    num_linear_weights,
    prefill_bytes,
)
from qwen_eval.models.cpu import cpu_flags
from qwen_eval.models.hub import local_checkpoint_dir
from qwen_eval.models.lora import base_of
from qwen_eval.models.machine import Device, known, numpy_device
from qwen_eval.models.overrides import read_config, with_overrides
from qwen_eval.models.quant.formats import detected, quant_format
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.runs.evaluate import selected
from qwen_eval.runs.planned_work import BYTES_PER_TOKEN, Work, work_of
from qwen_eval.runs.preview import read_tokenizer
from qwen_eval.runs.resumable import Resumable, resumable
from qwen_eval.runs.run import Run, SessionCounts, load_run
from qwen_eval.tables import Cell, Table, number_cell, text_cell
from qwen_eval.tasks.registry import TaskContext, build

GIB = 2**30
GPU_SIGNS = ("/dev/nvidiactl", "/dev/dxg")
MOST_TOKENS = {"cpu": 4096, "cuda": 16384}  # of one packed forward, as the engine takes them
MOST_SLOTS = {"cpu": 64, "cuda": 256}
MOST_EARLIER = 50  # runs that are looked at


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What is asked of the model. `tokenizer` is None where none is at hand."""

    task: Task
    samples: list[Sample]
    stored: Resumable
    work: Work
    tokenizer: Tokenizer | None
    config: ModelConfig | None


@dataclass(frozen=True, kw_only=True)
class Memory:
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    free_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


def plan_tables(spec: EvalSpec) -> list[Table]:
    """One table of what is known, each row with where it comes from."""
    warnings = check_options(spec.engine, spec.model, keep_hidden=spec.keep_hidden)
    if spec.on is not None:
        known(spec.on, "bf16")  # a typo is said before rows are read
    asked = what_is_asked(spec)
    rows = [*_tokens(spec, asked), *_machine(spec, asked), *_earlier(spec, asked), *_price(spec, asked)]
    notes = [*_notes(spec, asked), *(f"warning: {warning}" for warning in warnings)]
    return [
        Table(
            name="plan",
            title=f"{spec.task.name} · {spec.model.name}: plan",
            columns=("", "value", "how it is known"),
            rows=tuple(rows),
            notes=tuple(notes),
        )
    ]


def what_is_asked(spec: EvalSpec) -> PlannedRun:
    """The first request of every sample, in tokens."""
    tokenizer, facts = _tokenizer(spec)
    context = TaskContext(
        protocol=spec.protocol,
        is_chat=spec.model.chat if spec.task.mode == "auto" else spec.task.mode == "chat",
        tokenizer=tokenizer,
        sandbox=spec.sandbox,
        model_facts=facts,
    )
    task = build(spec.task, context)
    samples = selected(task, spec)
    config = _config(spec)
    return PlannedRun(
        task=task,
        samples=samples,
        stored=resumable(spec, samples),
        work=_work(spec, [_first(task, sample) for sample in samples], tokenizer, config),
        tokenizer=tokenizer,
        config=config,
    )


def _first(task: Task, sample: Sample) -> Request:
    request = task.request(sample, ())
    assert request is not None, sample.id
    return request


def _tokenizer(spec: EvalSpec) -> tuple[Tokenizer | None, dict[str, JSON]]:
    """That of the checkpoint on this machine, or of `engine.tokenizer=`; None where there is neither."""
    model_at = kind(spec.engine.name).model_at
    if model_at == "server":
        folder = spec.engine.tokenizer
        return (None if folder is None else load_tokenizer(Path(folder), system=spec.model.system)), {}
    if model_at == "nowhere":
        return None, {}
    try:
        tokenizer, facts = read_tokenizer(spec.model)
    except ModelError:
        if spec.model.path is not None or not spec.model.arch:
            raise
        return None, {}  # not fetched yet: its shape is in conf/model
    return tokenizer, dict(facts)


def _config(spec: EvalSpec) -> ModelConfig | None:
    if kind(spec.engine.name).model_at != "checkpoint":
        return None
    return with_overrides(ModelConfig.from_hf(_fields(spec)), spec.model)


def _fields(spec: EvalSpec) -> dict[str, JSON]:
    """config.json of the checkpoint, or `model.arch` where it is not on this machine."""
    try:
        return read_config(base_of(local_checkpoint_dir(spec.model)), spec.model)
    except ModelError:
        if spec.model.path is not None or not spec.model.arch:
            raise
        return dict(spec.model.arch)


def _work(spec: EvalSpec, requests: list[Request], tokenizer: Tokenizer | None, config: ModelConfig | None) -> Work:
    def ids_of(request: Request) -> tuple[int, ...]:
        if tokenizer is not None:
            return tuple(tokenizer.render(request.prompt))
        messages = request.prompt.messages or ()
        text = request.prompt.text or "\n".join(message.content for message in messages)
        return tuple(text.encode("utf-8", "replace"))

    return work_of(
        requests,
        ids_of,
        tokenizer.encode if tokenizer is not None else lambda text: list(text.encode()),
        shares=spec.engine.name == "native" and spec.engine.prefix_sharing and spec.model.kv_cache != "int8",
        alpha_length=config.train_length if config is not None and config.dynamic_ntk else None,
        is_estimate=tokenizer is None,
    )


# --- rows ------------------------------------------------------------------------------------------------------------


def _tokens(spec: EvalSpec, asked: PlannedRun) -> Iterator[tuple[Cell, Cell, Cell]]:
    work = asked.work
    how = f"estimate: a token every {BYTES_PER_TOKEN} bytes, no tokenizer is at hand" if work.is_estimate else "counted"
    part = [f"limit={spec.task.limit}"] if spec.task.limit is not None else []
    part += [f"subjects={','.join(spec.task.subjects)}"] if spec.task.subjects else []
    yield _row("samples", len(asked.samples), ", ".join(part) or "all")
    yield _row("tokens of the prompts", work.prompt_tokens, how)
    if work.read_tokens != work.prompt_tokens:
        yield _row("tokens to read", work.read_tokens, f"shared beginnings once: {100 * work.shared_part:.0f} % less")
    if work.most_new_tokens:
        yield _row("tokens to write, at most", work.most_new_tokens, _at_their_limit(work.num_replies))


def _at_their_limit(num_replies: int) -> str:
    return "1 reply at its limit" if num_replies == 1 else f"{num_replies:,} replies at their limit"


def _machine(spec: EvalSpec, asked: PlannedRun) -> Iterator[tuple[Cell, Cell, Cell]]:
    """Memory and the least time, where the model runs on this machine or on the device that `on` names."""
    if asked.config is None:
        return
    device, is_packed = device_of(spec)
    cost = Cost(
        config=asked.config, quant=_quant(spec), dtype=device.dtype, kv_cache=spec.model.kv_cache, is_packed=is_packed
    )
    free = device.free_bytes - (0 if device.kind == "cpu" else CUDA_CONTEXT_BYTES)
    cost = cost.with_head_copy(device.kind, free)
    usable = int(free * spec.engine.memory_fraction)
    if cost.held_bytes >= usable:
        how = f"do not fit: {usable / GIB:.2f} GiB to use on {device.name}"
        yield _gib("weights, GiB", cost.held_bytes, how)
        return
    limits = batch_limits(
        asked.config,
        spec.model.kv_cache,
        device.dtype,
        usable - cost.held_bytes,
        max_tokens=MOST_TOKENS[device.kind],
        head_bytes=CUDA_HEAD_BYTES if device.kind == "cuda" else 0,
        is_captured=device.kind == "cuda" and spec.engine.kernels != "plain",
    )
    memory = memory_of(spec, asked.work, cost, limits, device, free)
    form = f"in {device.dtype}" if cost.quant == "none" else cost.quant
    copy_gib = round(cost.head_copy_bytes / GIB, 2)
    copied = f", of which at most {copy_gib:.2f} for a packed copy of the head" if copy_gib else ""
    yield _gib("weights, GiB", memory.weight_bytes, form + copied)
    yield _gib("cache and activations, GiB", memory.peak_bytes - memory.weight_bytes, "cost model")
    fits = "fits" if memory.peak_bytes <= memory.free_bytes else "does not fit"
    yield _gib("peak, GiB", memory.peak_bytes, f"{fits}: {memory.free_bytes / GIB:.2f} GiB free on {device.name}")
    seconds = least_s(asked.work, cost, limits, device, spec)
    if seconds is not None:
        how = _ceiling(device, asked.work)
        num_workers = min(spec.engine.workers, len(asked.samples))
        if num_workers > 1 and "workers" in kind(spec.engine.name).tuned_by:
            seconds, how = seconds / num_workers, f"{num_workers} workers, {how}"
        yield text_cell("time, at least"), text_cell(clock(seconds)), text_cell(how)


def memory_of(spec: EvalSpec, work: Work, cost: Cost, limits: BatchLimits, device: Device, free: int) -> Memory:
    packed = min(limits.packed_tokens, max(work.read_tokens, 1))
    cached = min(limits.cached_tokens, work.longest * _slots(spec, work, limits, device))
    activations = prefill_bytes(cost.config, packed, cost.dtype, num_sequences=2, kv_cache=cost.kv_cache)
    return Memory(
        weight_bytes=cost.held_bytes,
        kv_bytes=cached * cost.kv_token_bytes,
        activation_bytes=activations,
        free_bytes=free,
    )


def _slots(spec: EvalSpec, work: Work, limits: BatchLimits, device: Device) -> int:
    """Replies that are written side by side; texts that are only read are held one at a time."""
    most = spec.engine.max_batch_size or MOST_SLOTS[device.kind]
    fits = limits.cached_tokens // max(work.longest, 1)
    return max(1, min(most, work.num_replies, fits))


def least_s(work: Work, cost: Cost, limits: BatchLimits, device: Device, spec: EvalSpec) -> float | None:
    """Below this the device's bandwidth and FLOP/s do not let the run fall; None for an unknown device."""
    if device.best_bandwidth is None or device.best_flops is None:
        return None
    c = cost.config
    dense = 2.0 * num_linear_weights(c)
    attention = 4.0 * c.num_layers * c.num_heads * c.head_dim * work.attended
    flops = work.read_tokens * dense + attention + 2.0 * work.scored_rows * c.vocab_size * c.hidden_size
    num_forwards = math.ceil(work.read_tokens / limits.packed_tokens)
    read_s = max(flops / device.best_flops, num_forwards * cost.read_bytes / device.best_bandwidth)
    slots = _slots(spec, work, limits, device)
    length = work.longest - work.most_new_tokens / max(work.num_replies, 1) / 2
    step = max(
        cost.decode_traffic_bytes(slots, length) / device.best_bandwidth,
        cost.decode_flops(slots, length) / device.best_flops,
    )
    return read_s + math.ceil(work.most_new_tokens / slots) * step


def _ceiling(device: Device, work: Work) -> str:
    bandwidth, flops = device.best_bandwidth or 0.0, device.best_flops or 0.0
    how = "measured" if device.bandwidth else "data sheet"
    full = ", every reply at its limit" if work.most_new_tokens else ""
    return f"ceilings of {device.name}: {bandwidth / 1e9:.1f} GB/s, {flops / 1e12:.2f} TFLOP/s ({how}){full}"


def _earlier(spec: EvalSpec, asked: PlannedRun) -> Iterator[tuple[Cell, Cell, Cell]]:
    """The time by the last run of this task with this model here."""
    found = earlier_run(spec)
    if found is None:
        return
    run, session = found
    to_ask = len(asked.samples) - asked.stored.num_stored
    seconds = session.run_s / session.num_samples * to_ask
    written = session.num_answer_tokens / session.num_samples * to_ask
    how = f"as in {run.path}: {session.num_samples / session.run_s:.3g} samples/s"
    if asked.work.most_new_tokens:
        yield _row("tokens to write, expected", round(written), f"as in {run.path}")
    yield text_cell("time, expected"), text_cell(clock(seconds)), text_cell(how)


def earlier_run(spec: EvalSpec) -> tuple[Run, SessionCounts] | None:
    """The newest finished run of the same task, model and engine whose last session asked something."""
    folder = Path(spec.runs_dir) / "eval" / spec.task.name / spec.model.name
    results = sorted(folder.glob("*/result.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in results[:MOST_EARLIER]:
        try:
            run = load_run(file.parent)
            session = run.session
        except QwenEvalError:
            continue
        engine = run.decides.get("engine")
        is_same = isinstance(engine, dict) and engine.get("name") == spec.engine.name
        if is_same and session is not None and session.num_samples and session.run_s > 0:
            return run, session
    return None


def _price(spec: EvalSpec, asked: PlannedRun) -> Iterator[tuple[Cell, Cell, Cell]]:
    if kind(spec.engine.name).model_at != "server" or spec.engine.prices is None:
        return
    name = spec.engine.api_model or spec.model.hub_id or spec.model.name
    prices = read_prices(spec.engine.prices, name)
    how = f"{spec.engine.prices}, nothing cached" + (", every reply at its limit" if asked.work.most_new_tokens else "")
    yield _money("price, at most", prices, asked.work.most_new_tokens, asked, how)
    found = earlier_run(spec)
    if found is not None:
        run, session = found
        written = round(session.num_answer_tokens / session.num_samples * len(asked.samples))
        yield _money("price, expected", prices, written, asked, f"replies as long as in {run.path}")


def _money(what: str, prices: Prices, written: int, asked: PlannedRun, how: str) -> tuple[Cell, Cell, Cell]:
    usage = Usage(prompt_tokens=asked.work.prompt_tokens, cached_tokens=0, completion_tokens=written)
    cost = prices.cost(usage)
    return text_cell(what), Cell(text=f"{cost:,.4g} {prices.currency}".rstrip(), value=cost), text_cell(how)


def _notes(spec: EvalSpec, asked: PlannedRun) -> Iterator[str]:
    stored = asked.stored
    if stored.refusal is not None:
        yield f"warning: the run would be refused: {stored.refusal}"
    if stored.num_stored:
        num = f"{stored.num_stored} of {len(asked.samples)} samples"
        yield f"stored already: {num}; the run asks only the others, and the rows above count all."
    if spec.on is not None and asked.config is None:
        yield f"warning: on={spec.on} has no effect with engine={spec.engine.name}, which runs no model here"
    yield "Of samples with several turns the first is counted. Nothing was loaded, asked or written."


def _row(what: str, value: int, how: str) -> tuple[Cell, Cell, Cell]:
    return text_cell(what), number_cell(value, 0), text_cell(how)


def _gib(what: str, value: int, how: str) -> tuple[Cell, Cell, Cell]:
    return text_cell(what), number_cell(value / GIB, 3 if value < GIB else 2), text_cell(how)


def clock(seconds: float) -> str:
    """`0.4` -> `"0.4 s"`, `75` -> `"1:15"`, `3700` -> `"1:01:40"`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# --- the device ------------------------------------------------------------------------------------------------------


def device_of(spec: EvalSpec) -> tuple[Device, bool]:
    """The device that the model would run on, or the one that `on` names; and whether packed weights stay packed."""
    is_stored = quant_format(_quant(spec)).is_stored
    if spec.on is not None:
        dtype = spec.model.dtype if spec.model.dtype != "auto" else "bf16"
        return known(spec.on, dtype), dtype == "bf16"
    if spec.model.device != "cpu" and any(Path(sign).exists() for sign in GPU_SIGNS):
        return _with_torch(spec, is_stored)
    if spec.model.device not in ("auto", "cpu"):
        raise ConfigError(
            f"model.device={spec.model.device}: no CUDA device here; use model.device=cpu, or plan with on="
        )
    flags = cpu_flags()
    if "amx_tile" in flags:
        return _with_torch(spec, is_stored)
    can_pack = bool({"avx2", "avx512f"} & flags)
    is_bf16 = "avx512_bf16" in flags or (is_stored and can_pack)
    dtype = spec.model.dtype if spec.model.dtype != "auto" else ("bf16" if is_bf16 else "fp32")
    return numpy_device(dtype), dtype == "bf16" and can_pack


def _with_torch(spec: EvalSpec, is_stored: bool) -> tuple[Device, bool]:
    """As torch measures it, where only torch reaches the device or its instructions."""
    from qwen_eval.models.device import DTYPES, probe
    from qwen_eval.models.load import choose_device, choose_dtype
    from qwen_eval.models.quant.kernels import has_packed

    where = choose_device(spec.model.device)
    dtype = choose_dtype(spec.model.dtype, _fields(spec), where, is_packed=is_stored)
    name = next(name for name, known_dtype in DTYPES.items() if known_dtype == dtype)
    return probe(where, name), has_packed(dtype, where)


def _quant(spec: EvalSpec) -> str:
    packed = _fields(spec).get("quantization_config") if spec.model.weights != "random" else None
    found = detected(packed) if spec.model.quant == "none" and isinstance(packed, dict) else None
    return found.name if found else spec.model.quant
