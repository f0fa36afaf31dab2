"""Tables of fine-tuning profiles: memory and seconds a step by method and length, as published; the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_eval.core import JSON
from qwen_eval.models.machine import known
from qwen_eval.profile.cells import shape_fields
from qwen_eval.profile.finetune import METHOD_NAMES, FinetuneSpec, config_of, cost_of, tunings
from qwen_eval.profile.measure import median
from qwen_eval.report.published import published_tables
from qwen_eval.report.runs import ProfileCell, RunSet, profile_cells
from qwen_eval.report.settings import run_names, with_runs
from qwen_eval.runs.run import Run, load_run
from qwen_eval.runs.store import write_bytes
from qwen_eval.tables import Cell, Table, number_cell, print_tables, render, text_cell, to_terminal
from qwen_eval.terminal import terminal_width

GIB = 2**30
RANDOM = "†"
FORMS = {"md": "finetune.md", "csv": "finetune.csv", "tex": "finetune.tex"}
SHORT = {"oom": "OOM"}
Row = Mapping[str, Any]


def finetune_cells(run: Run) -> list[ProfileCell]:
    return [cell for cell in profile_cells(run) if cell.get("mode") == "finetune"]


def finetune_tables(runs: Sequence[Run]) -> list[Table]:
    """Every cell, then method by length as published; [] where nothing was fine-tuned."""
    found = [(run, cell) for run in runs for cell in finetune_cells(run)]
    return [_cells(found), _by_length(found)] if found else []


def _cells(found: Sequence[tuple[Run, ProfileCell]]) -> Table:
    rows = []
    for run, cell in found:
        state = str(cell.get("status", "ok")) + (f": {cell['reason']}" if cell.get("reason") else "")
        rows.append((
            text_cell(_label(run)), text_cell(_method(cell)), number_cell(_number(cell.get("seq")), 0),
            step_cell(cell),
            number_cell(median(_floats(cell.get("tok_per_s"))), 0), _gib(cell.get("peak_bytes")),
            _gib(_own_bytes(cell)), _gib(cell.get("predicted_bytes")),
            number_cell(_number(cell.get("num_trainable")), 0),
            _share(cell.get("prefill_share")), text_cell(state, tone="" if state == "ok" else "bad"),
        ))  # fmt: skip
    columns = (
        "model", "method", "tokens", "s/step", "tokens/s", "peak GiB", "without libraries", "predicted", "trainable",
        "FLOP/s share", "state",
    )  # fmt: skip
    accumulation = sorted({str(cell.get("accumulation")) for _, cell in found})
    notes = [
        f"s/step: {' or '.join(accumulation)} micro-batches of one sequence and the optimizer; median [min, max].",
        "predicted: GiB from the shape alone. trainable: parameters. FLOP/s share: of what was measured on the device.",
    ]
    notes += [f"{RANDOM} random weights of this shape."] if any(_is_random(run) for run, _ in found) else []
    table = Table(
        name="finetune", title="Fine-tuning", columns=columns, rows=tuple(rows), notes=tuple(notes), num_keys=3,
        optional=("FLOP/s share", "tokens/s", "predicted", "without libraries", "trainable"),
    )  # fmt: skip
    return with_runs(table, _names(found), at=1)


def _by_length(found: Sequence[tuple[Run, ProfileCell]]) -> Table:
    lengths = sorted({int(cell["seq"]) for _, cell in found})
    held: dict[tuple[str, str, str], dict[int, Cell]] = {}
    owners = {}
    for run, cell in found:
        key = (_label(run), _method(cell), str(run.path))
        held.setdefault(key, {})[int(cell["seq"])] = _published_form(cell)
        owners[key] = run
    rows = tuple(
        (text_cell(key[0]), text_cell(key[1]), *(row.get(length, text_cell(None)) for length in lengths))
        for key, row in held.items()
    )
    columns = ("model", "method", *map(str, lengths))
    table = Table(
        name="finetune-published", title="Fine-tuning: GiB, s/step by length", columns=columns, rows=rows, num_keys=2
    )
    return with_runs(table, run_names([(" ".join(key[:2]), [run]) for key, run in owners.items()]), at=1)


def _published_form(cell: ProfileCell) -> Cell:
    """`"20.1G, 1.2s"`, as the published table has it; OOM where it did not fit."""
    seconds, peak = median(_floats(cell.get("step_s"))), _number(cell.get("peak_bytes"))
    if seconds is None or peak is None:
        status = str(cell.get("status", ""))
        return text_cell(SHORT.get(status, status), tone="bad", title=str(cell.get("reason") or ""))
    return Cell(text=f"{peak / GIB:.1f}G, {seconds:.2g}s", value=seconds)


def step_cell(cell: ProfileCell) -> Cell:
    seconds = sorted(_floats(cell.get("step_s")))
    middle = median(seconds)
    if middle is None:
        status = str(cell.get("status", ""))
        return text_cell(SHORT.get(status, status), tone="bad", title=str(cell.get("reason") or ""))
    text = f"{middle:.3g} [{seconds[0]:.3g}, {seconds[-1]:.3g}]"
    return Cell(text=text, value=middle, low=seconds[0], high=seconds[-1], n=len(seconds))


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_text(spec: FinetuneSpec) -> str:
    """What each cell will take on this device or the one that `on` names."""
    return to_terminal(plan_table(spec), terminal_width()) + "\n"


def plan_table(spec: FinetuneSpec) -> Table:
    import torch

    from qwen_eval.models.device import DTYPES, probe
    from qwen_eval.models.load import choose_device, choose_dtype

    config = config_of(spec)
    where = torch.device("cuda") if spec.on else choose_device(spec.model.device)
    chosen = choose_dtype(spec.model.dtype, shape_fields(spec.model), where)
    dtype = next(name for name, known_dtype in DTYPES.items() if known_dtype == chosen)
    device = known(spec.on, dtype) if spec.on else probe(where, dtype)
    memory = device.free_bytes if spec.memory_gib is None else int(spec.memory_gib * GIB)
    rows = []
    for tuning in tunings(spec):
        cost = cost_of(spec, tuning, config, dtype)
        floor_s = None if device.best_flops is None else cost.step_flops / device.best_flops
        rows.append((
            text_cell(METHOD_NAMES[tuning.method]), number_cell(tuning.seq, 0), number_cell(cost.trainable, 0),
            _gib(cost.weight_bytes), _gib(cost.gradient_bytes + cost.optimizer_bytes), _gib(cost.activation_bytes),
            _gib(cost.gpu_bytes), _gib(spec.gpus * cost.gpu_bytes),
            text_cell("yes" if cost.gpu_bytes <= memory else "no", tone="good" if cost.gpu_bytes <= memory else "bad"),
            number_cell(floor_s, 2),
        ))  # fmt: skip
    columns = (
        "method", "tokens", "trainable", "weights GiB", "gradients, optimizer GiB", "activations GiB", "a GPU GiB",
        "all GPUs GiB", "fits", "at least s/step",
    )  # fmt: skip
    shared = f"{spec.gpus} GPUs, {spec.sharding}; " if spec.gpus > 1 else ""
    checkpointing = f"{'with' if spec.checkpointing else 'without'} gradient checkpointing"
    notes = (
        f"{shared}{device.name} in {dtype}; {checkpointing}; {spec.accumulation} micro-batches of one sequence a step.",
        "fits: a GPU within its memory; fragments and what the communication needs are not in it.",
    )
    title = f"{spec.model.name}: fine-tuning"
    optional = ("all GPUs GiB", "activations GiB", "gradients, optimizer GiB", "weights GiB")
    return Table(
        name="finetune-plan", title=title, columns=columns, rows=tuple(rows), notes=notes, optional=optional, num_keys=2
    )


# --- a run -----------------------------------------------------------------------------------------------------------


def run_tables(path: Path, *, published: bool) -> list[Table]:
    run = load_run(path)
    beside = published_tables(RunSet(runs=(run,), unreadable=())) if published else []
    return finetune_tables([run]) + [table for table in beside if table.rows]


def print_run(path: Path, *, published: bool) -> None:
    """The tables on the terminal, and in the forms of files beside result.json."""
    tables = run_tables(path, published=published)
    for form, name in FORMS.items():
        write_bytes(path / name, render(tables, form).encode("utf-8", "replace"))
    print_tables(tables)
    print(f"{path}: {', '.join(['result.json', *FORMS.values()])}")


# --- cells -----------------------------------------------------------------------------------------------------------


def _names(found: Iterable[tuple[Run, ProfileCell]]) -> list[str] | None:
    found = list(found)
    members = list({id(run): run for run, _ in found}.values())
    names = run_names([(_label(run), [run]) for run in members])
    if names is None:
        return None
    name_of = {id(run): name for run, name in zip(members, names)}
    return [name_of[id(run)] for run, _ in found]


def _method(cell: ProfileCell) -> str:
    return METHOD_NAMES.get(str(cell.get("method")), str(cell.get("method")))


def _label(run: Run) -> str:
    return run.label + (RANDOM if _is_random(run) else "")


def _is_random(run: Run) -> bool:
    return bool(run.engine_info.get("is_random")) or run.model_spec.get("weights") == "random"


def _own_bytes(cell: ProfileCell) -> float | None:
    peak = _number(cell.get("peak_bytes"))
    return None if peak is None else peak - float(cell.get("baseline_bytes") or 0)


def _floats(values: JSON) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list) else []


def _number(value: JSON) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _gib(value: JSON) -> Cell:
    number = _number(value)
    return number_cell(None if number is None else number / GIB, 2 if number is None or number >= GIB else 3)


def _share(value: JSON) -> Cell:
    number = _number(value)
    return text_cell(None) if number is None else Cell(text=f"{100 * number:.0f} %", value=number)
