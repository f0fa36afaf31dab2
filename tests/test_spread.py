"""One model over several devices: where its layers go, and that the answers are those of one device.

There is no second device here: `two_devices` makes tensors that say where they lie and fail where two places meet.
"""

from __future__ import annotations

import base64
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_checkpoint_files import DOWN, QUERY, factors, write_adapter
from test_native_engine import answers
from tiny_checkpoint import write_tiny_qwen2
from two_devices import FIRST, SECOND, two_devices

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Choose, ConfigError, Generate, ModelError, Prompt, Request, Sampling, Score
from qwen_eval.engines.native.engine import NativeEngine, open_engine
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import batch_limits, kv_token_bytes, spread_limits, unit_bytes
from qwen_eval.models.load import choose_device, choose_devices
from qwen_eval.models.spread import Room, layer_map

GIB = 2**30
CONF = Path(__file__).parents[1] / "conf" / "model"
GPTQ = Path(__file__).parent / "golden" / "gptq"


def config_of(name: str) -> ModelConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        arch: Any = OmegaConf.to_container(compose(name))
    return ModelConfig.from_hf(arch["arch"])


def rooms(*gibs: float) -> list[Room]:
    return [Room(device=torch.device("cuda", i), free_bytes=int(gib * GIB)) for i, gib in enumerate(gibs)]


def spare(units: Mapping[str, int], places: Mapping[str, torch.device], free: list[Room]) -> int:
    """The bytes left on the fullest device."""
    held: Counter[torch.device] = Counter()
    for unit, device in places.items():
        held[device] += units[unit]
    return min(room.free_bytes - held[room.device] for room in free)


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "quant", "gibs", "num_devices"), [
    ("qwen-72b", "none", (79, 79), 2),  # 134.6 GiB
    ("qwen-72b", "none", (79, 79, 79, 79), 3),  # no more than leave a third of their memory free
    ("qwen-72b", "none", (79, 40, 79), 3),
    ("qwen-72b", "none", (60, 79), 2),
    ("qwen-72b", "none", (1, 79, 79), 2),  # an occupied one is passed over
    ("qwen-72b-chat-int4", "gptq-int4", (23, 23), 2),  # two 24 GiB cards
    ("qwen2.5-0.5b", "none", (0.7, 0.7), 2),  # a tied head
    ("qwen-7b", "none", (79, 79), 1),
])  # fmt: skip
def test_layers_follow_one_another_over_as_few_devices_as_hold_them(
    model: str, quant: str, gibs: tuple[float, ...], num_devices: int
) -> None:
    config = config_of(model)
    units, free = unit_bytes(config, quant, "bf16"), rooms(*gibs)
    places = layer_map(units, free, is_tied=config.tie_embeddings)
    assert list(places) == list(units)
    assert len(set(places.values())) == num_devices
    order = [places[unit].index for unit in units if unit != "head" or not config.tie_embeddings]
    assert order == sorted(order), "embeddings, layers, norm and head go on from device to device"
    assert spare(units, places, free) >= 0
    if config.tie_embeddings:
        assert places["head"] == places["embed"]


@pytest.mark.parametrize("gibs", [(79, 79), (70, 79), (79, 60), (100, 45)])
def test_the_fullest_device_keeps_nearly_as_much_as_the_best_split_would_leave(gibs: tuple[float, ...]) -> None:
    """Within the room that accelerate keeps on the first device, that of the largest unit, and one block."""
    units, free = unit_bytes(config_of("qwen-72b"), "none", "bf16"), rooms(*gibs)
    names = list(units)
    splits = [
        dict(zip(names, itertools.chain([free[0].device] * cut, [free[1].device] * (len(names) - cut))))
        for cut in range(1, len(names))
    ]
    best = max(spare(units, split, free) for split in splits)
    found = spare(units, layer_map(units, free), free)
    assert best - max(units.values()) - units["layers.0"] <= found <= best


def test_devices_that_are_named_are_all_used() -> None:
    units = unit_bytes(config_of("qwen-7b"), "none", "bf16")
    assert len(set(layer_map(units, rooms(79, 79, 79), is_all=True).values())) == 3


def test_weights_that_fit_nowhere_are_refused_in_one_line_with_the_bytes() -> None:
    units = unit_bytes(config_of("qwen-72b"), "none", "bf16")
    with pytest.raises(ModelError) as raised:
        layer_map(units, rooms(79, 40))
    text = str(raised.value)
    assert "\n" not in text
    for number in (sum(units.values()), 79 * GIB, 40 * GIB):
        assert f"{number:,} bytes" in text


def test_batch_sizes_are_those_of_the_device_with_least_room_for_its_layers() -> None:
    config = config_of("qwen-72b")
    limits = spread_limits(config, "auto", "bf16", [(40, 12 * GIB), (40, 6 * GIB)], max_tokens=16384)
    assert limits.cached_tokens == 4 * GIB // (kv_token_bytes(config, "auto", "bf16") // 2)
    alone = batch_limits(config, "auto", "bf16", 9 * GIB, max_tokens=16384)
    assert spread_limits(config, "auto", "bf16", [(80, 9 * GIB)], max_tokens=16384) == alone


@pytest.mark.parametrize(("device", "wanted"), [
    ("cpu", ["cpu"]), ("lazy:0+lazy:1", ["lazy:0", "lazy:1"]), ("cpu+lazy:0", ["cpu", "lazy:0"]),
])  # fmt: skip
def test_devices_are_named_with_a_plus(device: str, wanted: list[str]) -> None:
    assert [str(each) for each in choose_devices(device)] == wanted


@pytest.mark.parametrize("device", ["cpu+cpu", "cpu+nowhere", "cpu+"])
def test_a_list_that_names_no_devices_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.device="):
        choose_devices(device)


def test_what_runs_on_one_device_refuses_several() -> None:
    with pytest.raises(ConfigError, match="name one device"):
        choose_device("cuda:0+cuda:1")


# --- answers ---------------------------------------------------------------------------------------------------------


def requests() -> list[Request]:
    """All kinds: heads that are shared, prompts beyond a chunk, rows that end and make room, drawn tokens."""
    prompts = [Prompt.raw(head + tail) for head in ("head, ", "another head, ") for tail in ("x", "a tail")]
    long = Prompt.raw("a text of many tokens " * 3)
    drawn = Sampling(temperature=0.9, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=3)
    return [
        *(Choose(prompt=prompt, choices=("A", "B")) for prompt in prompts),
        Choose(prompt=prompts[0], choices=("one", "B")),
        Score(prompt=long),
        *(Generate(prompt=prompt, max_new_tokens=2 + i) for i, prompt in enumerate(prompts)),
        Generate(prompt=long, max_new_tokens=3, sampling=drawn),
    ]


def opened(path: Path, device: str, **options: Any) -> NativeEngine:
    spec = ModelSpec(name="tiny", path=str(path), dtype="fp32", attention="eager", device=device, **options)
    return open_engine(EngineSpec(max_batch_size=3, prefill_chunk=48), spec)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("plain"))


def tied(folder: Path, base: Path) -> Path:
    return write_tiny_qwen2(folder / "tied", tied=True, layers=4)


def adapted(folder: Path, base: Path) -> Path:
    return write_adapter(folder / "lora", str(base), {**factors(QUERY, 4, 32, 32), **factors(DOWN, 2, 32, 64)})


def packed(folder: Path, name: str) -> Path:
    """With a vocabulary of bytes."""
    copy = Path(shutil.copytree(GPTQ / name, folder / name))
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (copy / "qwen.tiktoken").write_text("\n".join(lines))
    (copy / "tokenizer_config.json").write_text('{"num_extra_tokens": 4}')
    return copy


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (lambda folder, base: base, {}),
    "tied head": (tied, {}),
    "LoRA": (adapted, {}),
    "int8 cache": (lambda folder, base: base, {"kv_cache": "int8"}),
    "window": (lambda folder, base: base, {"window": "24,4096"}),
    "Int4": (lambda folder, base: packed(folder, "tiny_int4_g128"), {}),
    "Int8": (lambda folder, base: packed(folder, "tiny_int8_g64"), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_two_devices_answers_as_on_one(name: str, plain: Path, tmp_path: Path) -> None:
    make, options = MODELS[name]
    path = make(tmp_path, plain)
    wanted = answers(opened(path, "cpu", **options), requests())
    with two_devices() as seen:
        engine = opened(path, f"{FIRST}+{SECOND}", **options)
        assert not seen.crossings, "weights go straight to their device"
        assert {*map(str, engine.forward.layer_devices)} == {str(FIRST), str(SECOND)}
        found = answers(engine, requests())
        assert engine.info["decode_steps"] == "plain: the model lies on 2 devices"
    assert found == wanted  # to the last bit: the same operations on the same numbers
    assert min(seen.operations[FIRST], seen.operations[SECOND]) > 200
    assert seen.crossings[FIRST, SECOND] > 10


def test_each_device_holds_its_own_weights_only(plain: Path) -> None:
    with two_devices():
        model = opened(plain, f"{FIRST}+{SECOND}").forward.model
        held: Counter[torch.device] = Counter()
        for weight in model.parameters():
            held[weight.device] += weight.nbytes
    units = unit_bytes(model.config, "none", "fp32")
    assert held == {
        FIRST: units["embed"] + units["layers.0"],
        SECOND: units["layers.1"] + units["norm"] + units["head"],
    }


def test_the_stand_in_fails_where_two_devices_meet() -> None:
    with two_devices():
        here, there = torch.ones(2).to(FIRST), torch.ones(2).to(SECOND)
        meetings: list[Callable[[], Any]] = [
            lambda: here + there, lambda: here[torch.tensor([0])], lambda: torch.cat([here, there]),
        ]  # fmt: skip
        for meet in meetings:
            with pytest.raises(AssertionError, match=r"lazy:0"):
                meet()
        assert (here + there.to(FIRST)).cpu().tolist() == [2.0, 2.0]
