"""Two profiles of one device, compared cell by cell and quantity by quantity: never an average of unlike cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen_eval.core import Metric
from qwen_eval.metrics import mean
from qwen_eval.report.comparison import Comparison, Margins
from qwen_eval.report.paired import Difference, speed_ratio
from qwen_eval.report.runs import ProfileCell, device_name, profile_cells
from qwen_eval.runs.run import Run

GIB = 2**30
LOAD_FLOOR_S = 1.0  # a shorter load is judged as this long: below it the state of the disk's cache decides
SHAPE = ("name", "batch", "prompt_tokens", "new_tokens", "kv_cache", "attention")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One measured number of a cell; `value` turns what is stored into what is shown and compared."""

    name: str
    key: str
    unit: str
    higher_is_better: bool
    value: Callable[[float], float] = float


QUANTITIES = (
    Quantity(name="throughput", key="tok_per_s", unit="tok/s", higher_is_better=True),
    Quantity(name="decode", key="decode_tok_per_s", unit="tok/s", higher_is_better=True),
    Quantity(name="prefill", key="prefill_tok_per_s", unit="tok/s", higher_is_better=True),
    Quantity(name="first token", key="ttft_s", unit="ms", higher_is_better=False, value=lambda s: 1e3 * s),
    Quantity(name="memory", key="peak_bytes", unit="GiB", higher_is_better=False, value=lambda n: n / GIB),
    Quantity(name="load", key="load_s", unit="s", higher_is_better=False, value=lambda s: max(s, LOAD_FLOOR_S)),
)  # fmt: skip


def compare_speed(first: Run, second: Run, margins: Margins, label: str) -> list[Comparison]:
    """One comparison for each cell and quantity of the reference; a cell that is gone is not comparable."""
    base = Comparison(
        task=first.task, label=label, family="speed", metric="", first=None, second=None,
        paths=(first.path, second.path), pair=label,
    )  # fmt: skip
    devices = device_name(first), device_name(second)
    if devices[0] != devices[1] or "unknown" in devices:
        return [replace(base, not_comparable=(f"device: {devices[0]} against {devices[1]}",))]
    sides = [profile_cells(run) for run in (first, second)]
    if not sides[0]:
        return [replace(base, not_comparable=("the reference has no cell",))]
    doubled = [name for side in sides for name, times in Counter(map(cell_name, side)).items() if times > 1]
    if doubled:
        return [replace(base, not_comparable=(f"two cells of one shape: {doubled[0]}",))]
    now = {_shape(cell): cell for cell in sides[1]}
    found = [item for cell in sides[0] for item in _compare_cell(base, cell, now.get(_shape(cell)), margins)]
    new = [cell_name(cell) for cell in sides[1] if _shape(cell) not in set(map(_shape, sides[0]))]
    notes = (f"without a reference: {', '.join(new)}",) if new else ()
    return [replace(found[0], notes=notes), *found[1:]]


def _compare_cell(
    base: Comparison, first: ProfileCell, second: ProfileCell | None, margins: Margins
) -> list[Comparison]:
    base = replace(base, label=f"{base.label} {cell_name(first)}".strip())
    if _state(first) != "ok":
        return [replace(base, not_comparable=(f"the reference of this cell is {_state(first)}",))]
    if second is None:
        return [replace(base, not_comparable=("the cell is gone",))]
    if _state(second) != "ok":
        return [replace(base, failures=(f"the cell is {_state(second)}: {second.get('reason') or 'no reason given'}",))]
    measured = [quantity for quantity in QUANTITIES if _is_judged(quantity, first)]
    if not measured:
        return [replace(base, not_comparable=("nothing was measured in the reference of this cell",))]
    return [_compare_quantity(base, quantity, first, second, margins) for quantity in measured]


def _compare_quantity(
    base: Comparison, quantity: Quantity, first: ProfileCell, second: ProfileCell, margins: Margins
) -> Comparison:
    values = [_numbers(cell, quantity) for cell in (first, second)]
    base = replace(
        base, label=f"{base.label} {quantity.name}", metric=quantity.key, higher_is_better=quantity.higher_is_better
    )
    odd = [_odd(side) for side in values]
    if odd[0]:
        return replace(base, not_comparable=(f"{quantity.name} of the reference is {odd[0]}",))
    if not values[1]:
        return replace(base, not_comparable=(f"{quantity.name} was not measured",))
    if odd[1]:
        return replace(base, failures=(f"{quantity.name} is {odd[1]}",))
    a, b = ([quantity.value(value) for value in side] for side in values)
    is_once = min(len(a), len(b)) < 2
    margin = margins.memory if quantity.name == "memory" else margins.once if is_once else margins.speed
    first_metric, second_metric = _metric(a, quantity), _metric(b, quantity)
    return replace(
        base, first=first_metric, second=second_metric, margin=math.log1p(margin),
        difference=_once(a, b) if is_once else speed_ratio(a, b),
    )  # fmt: skip


def _once(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The log ratio of the means without an interval."""
    delta = math.log(math.fsum(second) / len(second)) - math.log(math.fsum(first) / len(first))
    return Difference(delta=delta, n=len(first) + len(second), num_clusters=1, test="one measurement")


def cell_name(cell: ProfileCell) -> str:
    """`"decode, batch 1, 1 + 2048 tokens"`."""
    parts = [str(cell.get("name") or "cell")]
    parts += [f"batch {cell['batch']}"] if cell.get("batch") is not None else []
    parts += [f"{cell.get('prompt_tokens')} + {cell.get('new_tokens')} tokens"] if cell.get("new_tokens") else []
    parts += [f"{cell[key]} {word}" for key, word in (("kv_cache", "cache"), ("attention", "attention"))
              if cell.get(key) not in (None, "auto")]  # fmt: skip
    return ", ".join(parts)


def _shape(cell: ProfileCell) -> tuple[str, ...]:
    return tuple(str(cell.get(key)) for key in SHAPE)


def _state(cell: ProfileCell) -> str:
    return str(cell.get("status", "ok"))


def _is_judged(quantity: Quantity, cell: ProfileCell) -> bool:
    """Measured at all; the total only where its parts are not, and no prefill of a single token."""
    if not _numbers(cell, quantity):
        return False
    if quantity.name == "throughput":
        return not any(_numbers(cell, other) for other in QUANTITIES[1:3])
    return quantity.name != "prefill" or int(cell.get("prompt_tokens") or 0) > 1


def _numbers(cell: ProfileCell, quantity: Quantity) -> list[float]:
    raw = cell.get(quantity.key)
    values = raw if isinstance(raw, list) else [] if raw is None else [raw]
    return [float(value) if isinstance(value, (int, float)) else math.nan for value in values]


def _odd(values: Sequence[float]) -> str:
    """`"nan"`: the first value that is no positive finite number, or nothing."""
    return next((f"{value:g}" for value in values if not (math.isfinite(value) and value > 0)), "")


def _metric(values: Sequence[float], quantity: Quantity) -> Metric:
    return replace(mean(list(values), unit=quantity.unit), higher_is_better=quantity.higher_is_better)
