"""The cost model against reality: tensors of built models, bytes held, the published cells, memory of a process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from qwen_eval.cli import conf_dir
from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Answer, Generate, Prompt
from qwen_eval.engines.native import engine as native
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import (
    Cost,
    batch_limits,
    checkpoint_bytes,
    kv_token_bytes,
    num_parameters,
    published_peak_bytes,
    weight_bytes,
)
from qwen_eval.models.kv_cache import Slots
from qwen_eval.models.load import open_forward
from qwen_eval.models.quant.bnb import BnbLinear
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.transformer import Transformer
from qwen_eval.report.ledger import Published, ledger

GIB = 2**30
V1 = {
    "model_type": "qwen", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 128,
    "intermediate_size": 768, "vocab_size": 768, "seq_length": 2048,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 768, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 512, "vocab_size": 768,
}  # fmt: skip


@lru_cache
def model_yaml(name: str) -> Any:
    """A model of conf/ with its defaults below it; Hydra does the same at a hundred times the cost."""
    own = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
    below = [str(default).removesuffix("@_here_") for default in own.pop("defaults", []) if default != "_self_"]
    folder = "family/" if name.startswith("family/") else ""
    below = [name if "/" in name else folder + name for name in below if name != "model_schema"]
    return OmegaConf.merge(*(model_yaml(name) for name in below), own)


@lru_cache(maxsize=1)
def named_archs() -> dict[str, dict[str, Any]]:
    names = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
    found = {name: OmegaConf.to_object(model_yaml(name)) for name in names}
    return {name: fields.get("arch", {}) for name, fields in found.items() if isinstance(fields, dict)}


@lru_cache
def num_tensor_elements(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def test_the_parameters_of_every_named_model_are_those_of_its_tensors() -> None:
    configs = {name: ModelConfig.from_hf(arch) for name, arch in named_archs().items() if arch}
    assert len(configs) > 50
    # a few layers tell all: every layer is alike, and building 80 of them takes long
    short = {name: replace(config, num_layers=3, windows=()) for name, config in configs.items()}
    assert {name: num_parameters(c) for name, c in short.items()} == {
        n: num_tensor_elements(c) for n, c in short.items()
    }


@pytest.mark.parametrize("name", ["qwen-1.8b", "qwen-72b", "qwen2-0.5b", "qwen3-14b"])
def test_the_parameters_of_whole_models_are_those_of_their_tensors(name: str) -> None:
    config = ModelConfig.from_hf(named_archs()[name])
    assert num_parameters(config) == num_tensor_elements(config)


def held_bytes(model: torch.nn.Module) -> int:
    """Every parameter and buffer once; of bitsandbytes' linears also what hides in their quantization state."""
    tensors = {
        id(tensor): tensor.nbytes
        for module in model.modules()
        for tensor in itertools.chain(module._parameters.values(), module._buffers.values())
        if tensor is not None
    }
    hidden = [m.weight_bytes - m.inner.weight.data.nbytes for m in model.modules() if isinstance(m, BnbLinear)]
    return sum(tensors.values()) + sum(hidden)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("quant", ["none", "gptq-int4", "gptq-int8", "nf4", "int8"])
@pytest.mark.parametrize("arch", [V1, QWEN2, QWEN3], ids=lambda arch: str(arch["model_type"]))
def test_weight_bytes_are_what_a_model_holds(arch: dict[str, Any], quant: str, dtype: str) -> None:
    if quant in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    spec = ModelSpec(name="x", weights="random", arch=arch, quant=quant, dtype=dtype, device="cpu")
    forward = open_forward(spec).forward
    packed = any("int4pack" in str(getattr(module, "kernel", "")) for module in forward.model.modules())
    predicted = weight_bytes(ModelConfig.from_hf(arch), quant, dtype, is_packed=packed)
    assert predicted == pytest.approx(held_bytes(forward.model), rel=1e-3)


@pytest.mark.parametrize("quant", ["gptq-int4", "gptq-int8"])
def test_random_packed_weights_are_of_the_usual_size_and_the_same_for_a_seed(quant: str) -> None:
    def weight(seed: int) -> torch.Tensor:
        spec = ModelSpec(name="x", weights="random", arch=QWEN2, quant=quant, dtype="fp32", device="cpu", seed=seed)
        opened = open_forward(spec)
        assert opened.facts["is_random"] is True
        held: torch.Tensor = opened.forward.model.get_submodule("layers.1.mlp.down").weight
        return held

    first = weight(1)
    assert torch.equal(first, weight(1))
    assert not torch.equal(first, weight(2))
    assert float(first.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("kv_cache", "dtype"), [("auto", "bf16"), ("auto", "fp32"), ("int8", "bf16"), ("int8", "fp32")]
)
def test_cache_bytes_are_what_a_prefix_holds(kv_cache: str, dtype: str) -> None:
    spec = ModelSpec(name="x", weights="random", arch=QWEN2, kv_cache=kv_cache, dtype=dtype, device="cpu")
    prefix = open_forward(spec).forward.grown(None, list(range(1, 8)), 7)
    assert prefix.num_bytes == 7 * kv_token_bytes(ModelConfig.from_hf(QWEN2), kv_cache, dtype)


# --- published -------------------------------------------------------------------------------------------------------


def published_memory() -> Iterator[Published]:
    """The cells of Qwen v1's profile tables that give a peak, one GPU model, BF16 and GPTQ."""
    for row in ledger():
        if row.benchmark == "memory" and row.table in ("inference_profile", "inference_memory") and row.value:
            yield row


def law_bytes(row: Published, mode: str) -> int:
    config = ModelConfig.from_hf(named_archs()[row.model.lower()])
    quant = {"BF16": "none", "Int8": "gptq-int8", "Int4": "gptq-int4"}[str(row.variant)]
    length = int(row.setting.get("gen_tokens") or row.setting["tokens"])
    return published_peak_bytes(config, quant, length, mode)


def test_the_law_gives_the_published_bf16_cells() -> None:
    cells = {(row.model, row.value): row for row in published_memory() if row.variant == "BF16"}
    assert len(cells) >= 7
    for row in cells.values():
        # the cards print "2048" of the 7B and 14B from encoding, which their Chinese editions say
        nearest = min(abs(law_bytes(row, mode) / GIB / float(row.value or 0) - 1) for mode in ("generate", "encode"))
        assert nearest < 0.02, (row.model, row.setting, row.value)


def test_published_checkpoint_sizes_follow_their_layout() -> None:
    """Codes, scales, zeros, group indices and biases of AutoGPTQ, counted by hand for the 7B."""
    config = ModelConfig.from_hf(named_archs()["qwen-7b-chat"])
    assert checkpoint_bytes(config, "gptq-int4") == pytest.approx(5.459 * GIB, rel=1e-3)
    assert checkpoint_bytes(config, "gptq-int8") == pytest.approx(8.498 * GIB, rel=1e-3)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    cost = Cost(config=ModelConfig.from_hf(V1), dtype="bf16")
    memory = cost.weight_bytes + 50 * 2**20
    batch = cost.max_batch(memory, 64, 64)
    assert batch > 1
    assert cost.peak_bytes(batch, 64, 64) <= memory < cost.peak_bytes(batch + 1, 64, 64)
    assert cost.max_batch(cost.weight_bytes, 64, 64) == 0


def test_batch_limits_shrink_with_memory_and_never_reach_zero() -> None:
    config = ModelConfig.from_hf(V1)
    limits = [batch_limits(config, "auto", "bf16", free, max_tokens=4096) for free in (0, 4 * 2**20, 40 * 2**20, GIB)]
    assert (limits[0].packed_tokens, limits[0].cached_tokens) == (1, 1)
    assert limits[-1].packed_tokens == 4096
    assert [limit.packed_tokens for limit in limits] == sorted(limit.packed_tokens for limit in limits)
    assert limits[2].cached_tokens == (40 * 2**20 - 40 * 2**20 // 3) // kv_token_bytes(config, "auto", "bf16")


def test_an_engine_short_of_memory_runs_fewer_sequences_at_once_with_the_same_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = ModelSpec(name="x", asset="qwen-tiny", weights="random", dtype="fp32", device="cpu")
    requests = [Generate(prompt=Prompt.raw(f"Question {i}"), max_new_tokens=8) for i in range(9)]
    seen: list[int] = []
    slots = ModelRunner.slots

    def counted(self: ModelRunner, num_slots: int, capacity: int) -> Slots:
        seen.append(num_slots)
        return slots(self, num_slots, capacity)

    monkeypatch.setattr(ModelRunner, "slots", counted)

    def answers(free_bytes: int) -> dict[int, Answer]:
        monkeypatch.setattr(native, "memory_bytes", lambda device: (free_bytes, free_bytes))
        return dict(native.open_engine(EngineSpec(), spec).run(requests))

    assert answers(2**30) == answers(100_000)
    assert seen[0] == 9  # no more slots than rows
    assert 1 <= seen[1] < 9


def test_int8_halves_the_cache_less_its_scales() -> None:
    config = ModelConfig.from_hf(V1)
    assert kv_token_bytes(config, "int8", "bf16") / kv_token_bytes(config, "auto", "bf16") == (128 + 4) / 256
