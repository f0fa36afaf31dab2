"""One model over several devices: which of them holds which layers. A block is never split.

Layers follow one another from device to device, the embeddings before them and the head after them; a tied head stays
with the embeddings. accelerate finds the places, as it does for transformers' `device_map="auto"`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qwen_eval.core import ModelError
from qwen_eval.models.cost import largest

# A model goes to no more devices than hold it with this share of their free memory left for caches and activations: a
# hidden state on its way to another device is time lost, and captured steps are of one device.
LEFT_FREE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Room:
    device: torch.device
    free_bytes: int


def layer_map(
    units: Mapping[str, int], rooms: Sequence[Room], *, is_tied: bool = False, is_all: bool = False
) -> dict[str, torch.device]:
    """The device of each unit. `units`: bytes of "embed", "layers.0" ..., "norm", "head", in this order.

    As few of the rooms, from the first on, as hold the weights and leave `LEFT_FREE`; all of them with `is_all`, or
    where fewer do not. ModelError where all together do not hold the weights.
    """
    wanted = sum(units.values()) / (1 - LEFT_FREE)
    for count in range(len(rooms) if is_all else 1, len(rooms) + 1):
        few = rooms[:count]
        if count < len(rooms) and sum(room.free_bytes for room in few) < wanted:
            continue
        found = _placed(units, few, is_tied)
        if found is not None:
            return found
    raise ModelError(_too_small(units, rooms))


def _too_small(units: Mapping[str, int], rooms: Sequence[Room]) -> str:
    free = ", ".join(f"{room.device} {_gib(room.free_bytes)}" for room in rooms)
    return (
        f"the weights need {_gib(sum(units.values()))}, in whole blocks of {_gib(units['layers.0'])}; free: {free}; "
        "use more or emptier devices, or quantized weights"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes ({num_bytes / 2**30:.2f} GiB)"


def _placed(units: Mapping[str, int], rooms: Sequence[Room], is_tied: bool) -> dict[str, torch.device] | None:
    """With as much memory left on the fullest device as can be; None where the weights do not fit."""
    if len(rooms) == 1:
        return dict.fromkeys(units, rooms[0].device) if sum(units.values()) <= rooms[0].free_bytes else None
    skeleton, free = _skeleton(units, is_tied), [room.free_bytes for room in rooms]
    grain = max(1, sum(units.values()) >> 10)
    spare = largest(lambda grains: _filled(skeleton, free, grains * grain) is not None, min(free) // grain)
    found = _filled(skeleton, free, spare * grain)
    return None if found is None else {unit: rooms[_of(found, unit)].device for unit in units}


def _filled(skeleton: nn.Module, free: Sequence[int], spare: int) -> dict[str, int] | None:
    """accelerate's map, by the index of the device, when `spare` bytes are kept on each; None where it does not fit."""
    from accelerate import infer_auto_device_map

    budget = {i: max(0, num_bytes - spare) for i, num_bytes in enumerate(free)}
    with _quiet():
        found = infer_auto_device_map(skeleton, budget, no_split_module_classes=[_Unit.__name__], clean_result=False)
    return dict(found) if set(found.values()) <= set(budget) else None


class _Unit(nn.Module):
    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        empty = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)


def _skeleton(units: Mapping[str, int], is_tied: bool) -> nn.Module:
    """A model of the sizes alone: what quantized weights take no dtype tells."""
    model = nn.Module()
    model.add_module("embed", _Unit(units["embed"]))
    model.add_module("layers", nn.ModuleList(_Unit(n) for name, n in units.items() if name.startswith("layers.")))
    model.add_module("norm", _Unit(units["norm"]))
    model.add_module("head", _Unit(units["head"]))
    if is_tied:
        model.get_submodule("head").weight = model.get_submodule("embed").weight
    return model


def _of(found: Mapping[str, int], unit: str) -> int:
    """Layers that lie together are named as one."""
    return found[unit] if unit in found else found[unit.split(".")[0]]


@contextmanager
def _quiet() -> Iterator[None]:
    """accelerate warns of devices that are no GPUs of this machine, as the CPU in a list is."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
