"""Tables and plots of profile runs: every cell with its ceiling, and the layouts of the published tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qwen_eval.core import JSON
from qwen_eval.figures import lines
from qwen_eval.profile.measure import median
from qwen_eval.report.finetune import finetune_tables
from qwen_eval.report.published import published_tables
from qwen_eval.report.runs import ProfileCell, RunSet, device_name, profile_cells, speeds_of
from qwen_eval.report.settings import run_names, with_runs
from qwen_eval.runs.fields import section
from qwen_eval.runs.run import Run, load_run
from qwen_eval.runs.store import write_bytes
from qwen_eval.tables import Cell, Table, number_cell, render, text_cell
from qwen_eval.terminal import plain_text

GIB = 2**30
RANDOM = "†"
FORMS = {"md": "profile.md", "csv": "profile.csv", "tex": "profile.tex"}
SHORT = {"oom": "OOM"}  # as the published tables print it
NOTES = (
    "tokens/s: generated tokens (of encode: tokens read) of all sequences over the whole time; median [min, max].",
    "first token: until every sequence of the batch has one. token ms: quantiles over all steps of all repetitions.",
)
CEILING_NOTES = (
    "share: the time that bandwidth and FLOP/s (measured after the cell) allow at least, over the time it took.",
    "peak: of tensors on CUDA, of the resident set beyond the libraries' on a CPU. predicted: GiB by the cost model.",
)


def profile_tables(runs: Sequence[Run]) -> list[Table]:
    """All cells of all runs, then speed and memory laid out as published; [] when nothing was measured."""
    if not any(profile_cells(run) for run in runs):
        return []
    explained = [_ceilings(runs)] if any("status" in cell for _, cell in _all(runs)) else []
    return [_cells(runs), *explained, *_layouts(runs), *finetune_tables(runs)]


def _cells(runs: Sequence[Run]) -> Table:
    columns = (
        "model", "precision", "what", "batch", "context", "new tokens", "tokens/s", "first token ms", "token ms p50",
        "p90", "p99", "prefill tokens/s", "peak GiB", "reserved GiB",
    )  # fmt: skip
    rows = []
    for run, cell in _all(runs):
        tpot = cell.get("tpot_s") or {}
        rows.append((
            text_cell(_label(run)), text_cell(run.variant), text_cell(cell.get("name")),
            *(number_cell(_number(cell.get(key)), 0) for key in ("batch", "prompt_tokens", "new_tokens")),
            _speed(cell), _scaled(_middle(cell.get("ttft_s")), 1e3, 1),
            *(_scaled(_number(tpot.get(key)), 1e3, 2) for key in ("p50", "p90", "p99")),
            _scaled(_middle(cell.get("prefill_tok_per_s")), 1, 1), _gib(cell.get("peak_bytes")),
            _gib(cell.get("reserved_bytes")),
        ))  # fmt: skip
    notes = (*NOTES, *_method_notes(runs))
    optional = (
        "reserved GiB",
        "p90",
        "token ms p50",
        "p99",
        "prefill tokens/s",
        "first token ms",
        "new tokens",
        "context",
    )
    table = Table(
        name="profile", title="Speed and memory", columns=columns, rows=tuple(rows), notes=notes, optional=optional,
        num_keys=4,
    )  # fmt: skip
    return with_runs(table, _run_column(runs), at=2)


def _run_column(runs: Sequence[Run]) -> list[str] | None:
    """The text of the column `run` for each row of `_all`; None where no two runs have one name."""
    names = _names(runs)
    if names is None:
        return None
    return [name for run, name in zip(runs, names) for _ in profile_cells(run)]


def _names(runs: Sequence[Run]) -> list[str] | None:
    return run_names([(f"{_label(run)} {run.variant}", [run]) for run in runs])


def _method_notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for method in sorted({str(run.config.get("method")) for run in runs if run.config.get("method")}):
        run = next(run for run in runs if run.config.get("method") == method)
        if method == "readme":
            notes.append("method readme: the published protocol: sampled, one run, no warm-up, peak with loading.")
        else:
            warmup, repeats = run.config.get("warmup_tokens"), run.config.get("repetitions")
            notes.append(f"method {method}: greedy, {repeats} repetitions after a warm-up of {warmup} decode steps.")
    notes.append(f"device: {'; '.join(sorted({_device(run) for run in runs if run.result.get('device')}))}.")
    counters = sorted({str(cell["peak_counter"]) for _, cell in _all(runs) if cell.get("peak_counter")})
    notes += [f"peak: {'; '.join(counters)}."] if counters else []
    if any(_is_random(run) for run in runs):
        notes.append(f"{RANDOM} random weights of this shape: speed and memory only.")
    return notes


def _ceilings(runs: Sequence[Run]) -> Table:
    columns = (
        "model", "precision", "cell", "prefill share", "decode share", "GB/s", "TFLOP/s", "peak GiB", "predicted",
        "load s", "load peak", "J/token", "state",
    )  # fmt: skip
    rows = []
    for run, cell in _all(runs):
        device = cell.get("device") or {}
        state = str(cell.get("status", "ok")) + (f": {cell['reason']}" if cell.get("reason") else "")
        rows.append((
            text_cell(_label(run)), text_cell(run.variant), text_cell(cell.get("key") or cell.get("name")),
            _share(cell.get("prefill_share")), _share(cell.get("decode_share")),
            _scaled(_number(device.get("bandwidth")), 1e-9, 1), _scaled(_number(device.get("flops")), 1e-12, 3),
            _gib(_model_bytes(cell)), _gib(cell.get("predicted_bytes")), _scaled(_number(cell.get("load_s")), 1, 1),
            _gib(cell.get("load_peak_bytes")), _scaled(_number(cell.get("joules_per_token")), 1, 2),
            text_cell(state, tone="" if state == "ok" else "bad"),
        ))  # fmt: skip
    optional = ("J/token", "load peak", "load s", "predicted", "TFLOP/s", "GB/s")
    table = Table(
        name="profile-ceilings", title="Ceilings", columns=columns, rows=tuple(rows), notes=CEILING_NOTES,
        optional=optional, num_keys=3,
    )  # fmt: skip
    return with_runs(table, _run_column(runs), at=2)


# --- as published ----------------------------------------------------------------------------------------------------


def _layouts(runs: Sequence[Run]) -> list[Table]:
    """Speed and memory by length at batch 1, memory by batch: a row a model, precision and cache, a column a size."""
    found = list(_all(runs))
    single = [(run, cell) for run, cell in found if cell.get("batch") in (1, None)]
    batches = {cell.get("batch") for _, cell in found} - {1, None}
    grown = [(run, cell) for run, cell in found if cell.get("mode") == "generate"] if batches else []
    tables = [
        _pivot("profile-speed", "Speed, tokens/s", single, _by_length, _speed),
        _pivot("profile-memory", "Peak memory, GiB", single, _by_length, _memory),
        _pivot("profile-batch", "Peak memory by batch, GiB", grown, _by_batch, _memory),
    ]
    return [table for table in tables if table.rows and len(table.columns) > table.num_keys]


def _pivot(
    name: str,
    title: str,
    found: Iterable[tuple[Run, ProfileCell]],
    column_of: Callable[[ProfileCell], tuple[tuple[int, ...], str]],
    shown: Callable[[ProfileCell], Cell],
) -> Table:
    held: dict[tuple[str, ...], dict[tuple[tuple[int, ...], str], Cell]] = {}
    owners: dict[tuple[str, ...], Run] = {}
    for run, cell in found:
        if cell.get("mode") and cell["mode"] != "finetune":  # has tables of its own
            key = (_label(run), run.variant, _cache(cell), _device(run), str(run.path))
            held.setdefault(key, {})[column_of(cell)] = shown(cell)
            owners[key] = run
    columns = sorted({column for row in held.values() for column in row})
    rows = tuple(
        (*(text_cell(part) for part in key[:4]), *(row.get(column, text_cell(None)) for column in columns))
        for key, row in held.items()
    )
    heads = ("model", "precision", "cache", "device", *(text for _, text in columns))
    table = Table(name=name, title=title, columns=heads, rows=rows, optional=("device", "cache"), num_keys=4)
    return with_runs(table, run_names([(" ".join(key[:4]), [run]) for key, run in owners.items()]), at=2)


def _by_length(cell: ProfileCell) -> tuple[tuple[int, ...], str]:
    seq, new = int(cell["seq"]), int(cell["new_tokens"])
    text = {"generate": f"generate {seq}", "encode": f"encode {seq}"}.get(str(cell["mode"]), f"serve {seq}+{new}")
    return (("generate", "encode", "serve").index(cell["mode"]), seq, new), text


def _by_batch(cell: ProfileCell) -> tuple[tuple[int, ...], str]:
    return (int(cell["seq"]), int(cell["batch"])), f"generate {cell['seq']}, batch {cell['batch']}"


def _cache(cell: ProfileCell) -> str:
    extra = f", {cell['attention']} attention" if cell.get("attention") not in ("auto", None) else ""
    return ("int8" if cell.get("kv_cache") == "int8" else "as the model") + extra


# --- cells -----------------------------------------------------------------------------------------------------------


def _all(runs: Sequence[Run]) -> list[tuple[Run, ProfileCell]]:
    return [(run, cell) for run in runs for cell in profile_cells(run)]


def _device(run: Run) -> str:
    threads = section(run.result.get("device")).get("num_threads")
    return device_name(run) + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")


def _label(run: Run) -> str:
    return run.label + (RANDOM if _is_random(run) else "")


def _is_random(run: Run) -> bool:
    return bool(run.engine_info.get("is_random")) or run.model_spec.get("weights") == "random"


def _speed(cell: ProfileCell) -> Cell:
    speeds = sorted(speeds_of(cell))
    middle = median(speeds)
    if middle is None:
        return _state(cell)
    digits = 1 if middle >= 10 else 2
    text = f"{middle:,.{digits}f}"
    text += f" [{speeds[0]:,.{digits}f}, {speeds[-1]:,.{digits}f}]" if len(speeds) > 1 else ""
    return Cell(text=text, value=middle, low=speeds[0], high=speeds[-1], n=len(speeds), title=f"{len(speeds)} repeats")


def _memory(cell: ProfileCell) -> Cell:
    return _gib(cell["peak_bytes"]) if cell.get("peak_bytes") else _state(cell)


def _state(cell: ProfileCell) -> Cell:
    status = str(cell.get("status", ""))
    return text_cell(SHORT.get(status, status), tone="bad", title=str(cell.get("reason") or ""))


def _model_bytes(cell: ProfileCell) -> float | None:
    peak = _number(cell.get("peak_bytes"))
    return None if peak is None else peak - float(cell.get("baseline_bytes") or 0)


def _middle(values: JSON) -> float | None:
    return median([float(value) for value in values]) if isinstance(values, list) else _number(values)


def _number(value: JSON) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _scaled(value: float | None, scale: float, digits: int) -> Cell:
    return number_cell(None if value is None else value * scale, digits)


def _gib(value: JSON) -> Cell:
    number = _number(value)
    return number_cell(None if number is None else number / GIB, 2 if number is None or number >= GIB else 3)


def _peak_gib(cell: ProfileCell) -> float | None:
    number = _number(cell.get("peak_bytes"))
    return None if number is None else number / GIB


def _share(value: JSON) -> Cell:
    number = _number(value)
    if number is None:
        return Cell(text="–")
    # the ceiling is measured after the cell: where something else ran meanwhile, it came out too low
    return Cell(text=">100 %" if number > 1 else f"{100 * number:.0f} %", value=number)


# --- files -----------------------------------------------------------------------------------------------------------


def run_tables(path: Path, *, published: bool) -> list[Table]:
    """The tables of one run directory, with the published rows of the same model where there are any."""
    run = load_run(path)
    beside = published_tables(RunSet(runs=(run,), unreadable=())) if published else []
    return profile_tables([run]) + [table for table in beside if table.rows]


def write_tables(path: Path, *, published: bool) -> list[Table]:
    """Markdown, CSV and LaTeX beside result.json, replaced in one step each."""
    tables = run_tables(path, published=published)
    for form, name in FORMS.items():
        write_bytes(path / name, render(tables, form).encode("utf-8", "replace"))
    return tables


def write_plots(path: Path) -> list[Path]:
    """tokens/s by length and memory by batch, each where there are two sizes or more."""
    cells = profile_cells(load_run(path))
    speed = _series(cells, "seq", lambda cell: median(speeds_of(cell)), lambda cell: f"batch {cell.get('batch')}")
    memory = _series(cells, "batch", _peak_gib, lambda cell: f"{cell.get('seq')} tokens")
    written = []
    for name, series, x, y in (
        ("speed.svg", speed, "tokens", "tokens/s"),
        ("memory.svg", memory, "sequences at once", "peak GiB"),
    ):
        if series:
            write_bytes(path / name, lines(series, "svg", x=x, y=y))
            written.append(path / name)
    return written


def _series(
    cells: Sequence[ProfileCell],
    axis: str,
    value: Callable[[ProfileCell], float | None],
    rest: Callable[[ProfileCell], str],
) -> dict[str, dict[int, float]]:
    """Lines by the cell's name and `rest`; those of a single point are left out."""
    found: dict[str, dict[int, float]] = {}
    for cell in cells:
        number = value(cell)
        if number is not None:
            found.setdefault(plain_text(f"{cell.get('name')}, {rest(cell)}"), {})[int(cell[axis])] = number
    return {name: points for name, points in found.items() if len(points) > 1}
