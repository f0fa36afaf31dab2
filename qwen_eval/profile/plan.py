"""`plan=true`: the predicted time and memory of each cell, and whether it fits; nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import (
    CUDA_CONTEXT_BYTES,
    MAX_CHUNK,
    PREFILL_CHUNK,
    Cost,
    checkpoint_bytes,
    kv_token_bytes,
    num_parameters,
    published_peak_bytes,
    weight_bytes,
)
from qwen_eval.models.machine import Device
from qwen_eval.models.quant.formats import FORMATS, quant_format
from qwen_eval.profile.cells import GridCell, cells, cost_of, quant_of, shape_of
from qwen_eval.profile.config import ProfileSpec
from qwen_eval.tables import Cell, Table, number_cell, text_cell, to_terminal
from qwen_eval.terminal import terminal_width

GIB = 2**30


def plan_tables(spec: ProfileSpec, device: Device, *, is_packed: bool) -> list[Table]:
    """Two tables: the model in every precision, and the cells of the grid in the one asked for."""
    config = shape_of(spec.model)
    return [_precisions(spec, config, device, is_packed), _cells(spec, config, device, is_packed)]


def usable_bytes(spec: ProfileSpec, device: Device) -> int:
    """What tensors may take: `memory_gib`, else what is free; on a GPU less its context."""
    if spec.memory_gib is not None:
        whole = int(spec.memory_gib * GIB)
        return whole - (0 if device.kind == "cpu" else CUDA_CONTEXT_BYTES)
    return device.free_bytes - (0 if device.kind == "cpu" else CUDA_CONTEXT_BYTES)


def _precisions(spec: ProfileSpec, config: ModelConfig, device: Device, is_packed: bool) -> Table:
    chosen = quant_of(spec.model)
    rows = []
    for quant, form in FORMATS.items():
        held = weight_bytes(config, quant, device.dtype, is_packed=is_packed)
        files = None if form.is_made_here else checkpoint_bytes(config, quant)
        rows.append((
            text_cell(quant if quant != "none" else device.dtype, tone="good" if quant == chosen else ""),
            _gib(held), _gib(files), text_cell("asked for" if quant == chosen else None),
        ))  # fmt: skip
    token = [kv_token_bytes(config, kv, device.dtype) for kv in ("auto", "int8")]
    cache = f"cache {token[0] / 1024:.1f} KiB a token in {device.dtype}, {token[1] / 1024:.1f} KiB in int8 with scales"
    notes = (
        f"{num_parameters(config):,} parameters; {config.num_layers} layers; {cache}",
        "weights: as this engine holds them; files: the tensors of the published checkpoint.",
    )
    columns = ("precision", "weights GiB", "files GiB", "")
    return Table(
        name="plan-weights", title=f"{spec.model.name}: weights", columns=columns, rows=tuple(rows), notes=notes
    )


def _cells(spec: ProfileSpec, config: ModelConfig, device: Device, is_packed: bool) -> Table:
    memory = usable_bytes(spec, device)
    rows = tuple(_row(spec, cell, config, device, memory, is_packed) for cell in cells(spec))
    columns = (
        "what", "batch", "context", "new tokens", "weights GiB", "cache GiB", "activations GiB", "peak GiB", "fits",
        "largest batch", "prefill at least ms", "decode at most tokens/s", "original's law GiB",
    )  # fmt: skip
    what = "memory_gib" if spec.memory_gib is not None else f"free on {device.name}"
    context = "" if device.kind == "cpu" else f", less a CUDA context of {CUDA_CONTEXT_BYTES / GIB:.2f} GiB (assumed)"
    notes = (
        f"fits: peak within {memory / GIB:.2f} GiB, {what}{context}.",
        _ceiling(device),
        "original's law: fitted to the published cells (A100, original code, 16-bit cache, batch 1).",
    )
    optional = ("original's law GiB", "activations GiB", "cache GiB", "weights GiB", "largest batch")
    title = f"{spec.model.name}: cells"
    return Table(name="plan", title=title, columns=columns, rows=rows, notes=notes, optional=optional, num_keys=4)


def _row(
    spec: ProfileSpec, cell: GridCell, config: ModelConfig, device: Device, memory: int, is_packed: bool
) -> tuple[Cell, ...]:
    chunk = MAX_CHUNK if device.kind == "cuda" else PREFILL_CHUNK
    cost = cost_of(spec, cell, config, dtype=device.dtype, is_packed=is_packed, prefill_chunk=chunk)
    cost = cost.with_head_copy(device.kind, memory)
    size = (cell.batch, cell.prompt_tokens, cell.new_tokens)
    peak = cost.peak_bytes(*size)
    fits = peak <= memory
    prefill_s, step_s = floor_s(cost, cell, device)
    at_most = None if step_s is None or cell.new_tokens == 1 else cell.batch / step_s
    return (
        text_cell(cell.name), *(number_cell(n, 0) for n in size), _gib(cost.held_bytes),
        _gib(cost.kv_bytes(cell.batch, cell.length)), _gib(cost.activation_bytes(*size)), _gib(peak),
        text_cell("yes" if fits else "no", tone="good" if fits else "bad"),
        number_cell(cost.max_batch(memory, cell.prompt_tokens, cell.new_tokens), 0),
        number_cell(None if prefill_s is None else prefill_s * 1000, 1), number_cell(at_most, 1),
        _gib(original_law(config, cost.quant, cell)),
    )  # fmt: skip


def floor_s(cost: Cost, cell: GridCell, device: Device) -> tuple[float | None, float | None]:
    """(prefill, mean decode step): the time below which this device's bandwidth and FLOP/s do not let them fall."""
    bandwidth, flops = device.best_bandwidth, device.best_flops
    if bandwidth is None or flops is None:
        return None, None
    batch, length = cell.batch, cell.prompt_tokens + cell.new_tokens / 2
    traffic, work = cost.prefill_traffic_bytes(batch, cell.prompt_tokens), cost.prefill_flops(batch, cell.prompt_tokens)
    step = max(cost.decode_traffic_bytes(batch, length) / bandwidth, cost.decode_flops(batch, length) / flops)
    return max(traffic / bandwidth, work / flops), step


def original_law(config: ModelConfig, quant: str, cell: GridCell) -> int | None:
    """The published law where it speaks of such a cell: Qwen v1, one sequence, generating or encoding."""
    if config.family != "qwen" or cell.batch != 1 or cell.mode == "serve" or quant_format(quant).is_made_here:
        return None
    return published_peak_bytes(config, quant, cell.seq, cell.mode)


def _ceiling(device: Device) -> str:
    if device.best_bandwidth is None or device.best_flops is None:
        return f"no ceiling: {device.name} is not measured and not known."
    how = "measured" if device.bandwidth else "data sheet"
    return (
        f"ceiling: {device.name}, {device.best_bandwidth / 1e9:.1f} GB/s and {device.best_flops / 1e12:.2f} TFLOP/s "
        f"in {device.dtype} ({how})."
    )


def _gib(value: int | None) -> Cell:
    return number_cell(None if value is None else value / GIB, 3 if value is not None and value < GIB else 2)


def texts(tables: Sequence[Table]) -> str:
    """For the terminal at hand."""
    width = terminal_width()
    return "\n".join(to_terminal(table, width) for table in tables)
