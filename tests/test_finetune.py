"""Fine-tuning: what is trained, that it learns, what it takes, and that the plan says so before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_eval.config import ModelSpec
from qwen_eval.core import ConfigError
from qwen_eval.models.checkpoint import Placement, random_model
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.training import Lora, Tuner, make_trainable
from qwen_eval.models.training_cost import METHODS, TuningCost, num_lora_parameters, num_trainable
from qwen_eval.models.transformer import Transformer
from qwen_eval.profile.__main__ import main
from qwen_eval.profile.finetune import FinetuneSpec, Tuning, check, run_grid, tunings
from qwen_eval.profile.finetune_child import measure, open_model
from qwen_eval.report.finetune import finetune_tables, plan_table
from qwen_eval.report.runs import load_run

QWEN = {"model_type": "qwen", "kv_channels": 128, "seq_length": 2048, "no_bias": True, "tie_word_embeddings": False}
SIZES = {
    "1.8B": (2048, 24, 16, 11008, 151936), "7B": (4096, 32, 32, 22016, 151936), "14B": (5120, 40, 40, 27392, 152064),
    "72B": (8192, 80, 64, 49152, 152064),
}  # fmt: skip
TINY_QWEN2 = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


def published(size: str) -> ModelConfig:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return ModelConfig.from_hf({**QWEN, **dict(zip(keys, SIZES[size]))})


def tiny(fields: dict[str, Any] = TINY_QWEN2) -> Transformer:
    placement = Placement(device=torch.device("cpu"), dtype=torch.float32, packed=None, from_dense=None)
    return random_model(ModelConfig.from_hf(fields), placement, 0)


def nano(**keys: Any) -> ModelSpec:
    return ModelSpec(**{"name": "qwen-nano", "asset": "qwen-nano", "dtype": "fp32", "device": "cpu", **keys})


def batches(model: Transformer, num: int = 2, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(model.config.vocab_size, (num, length), generator=generator))


@pytest.mark.parametrize(
    ("size", "num"), [("1.8B", 53_673_984), ("7B", 143_130_624), ("14B", 223_150_080), ("72B", 754_974_720)]
)
def test_adapters_have_the_published_number_of_parameters(size: str, num: int) -> None:
    assert num_lora_parameters(published(size), 64) == num


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [nano(), ModelSpec(name="tiny", weights="random", dtype="fp32", arch=TINY_QWEN2)])
def test_every_method_trains_what_it_says_and_learns(method: str, spec: ModelSpec) -> None:
    quant = "nf4" if method == "qlora" else "none"
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    model, _ = open_model(replace(spec, quant=quant), Tuning(method=method, seq=24))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters = make_trainable(model, method, Lora(rank=8, dropout=0.0))
    assert sum(p.numel() for p in parameters) == num_trainable(model.config, method, 8)
    tuner = Tuner(model, parameters, learning_rate=1e-2)
    data = batches(model)
    losses = [tuner.step(data) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1, losses
    trained = {id(parameter) for parameter in parameters}
    for name, parameter in model.named_parameters():
        if name in before and id(parameter) not in trained:
            assert torch.equal(parameter, before[name]), f"{name} is frozen"


def test_the_loss_before_training_is_that_of_the_engine() -> None:
    model, _ = open_model(nano(), Tuning(method="lora", seq=40))
    ids = batches(model, 1, 40)[0]
    runner = ModelRunner(model)
    (hidden,) = runner.extend(runner.empty_prefix(), ids.tolist(), len(ids), want_hidden=True)
    expected = torch.nn.functional.cross_entropy(model.logits(hidden[:-1]).float(), ids[1:])
    tuner = Tuner(model, make_trainable(model, "lora"))
    assert float(tuner.loss(ids).detach()) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("fields", [TINY_QWEN2, {**TINY_QWEN2, "model_type": "qwen3", "head_dim": 16}])
def test_gradients_are_the_same_with_and_without_checkpointing(fields: dict[str, Any]) -> None:
    gradients = []
    for checkpointing in (True, False):
        torch.manual_seed(0)
        model = tiny(fields)
        parameters = make_trainable(model, "full")
        Tuner(model, parameters, checkpointing=checkpointing).loss(batches(model, 1)[0]).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in parameters])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    model = tiny().double()
    parameters = make_trainable(model, "full")
    tuner, ids = Tuner(model, parameters, checkpointing=False), batches(model, 1)[0]
    tuner.loss(ids).backward()  # type: ignore[no-untyped-call]
    weight = model.layers[1].mlp.down.weight  # type: ignore[union-attr]
    assert isinstance(weight, torch.nn.Parameter)
    assert weight.grad is not None
    slope, step = float(weight.grad[3, 5]), 1e-3
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[3, 5] += sign * step
            values.append(float(tuner.loss(ids)))
            weight[3, 5] -= sign * step
    # the loss is summed in fp32, so the difference has seven digits of it
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-3)


def test_micro_batches_add_up_to_one_step() -> None:
    """Two micro-batches give the gradient of their mean, and the optimizer steps once."""
    model = tiny()
    parameters = make_trainable(model, "full")
    data = batches(model)
    tuner = Tuner(model, parameters)
    with torch.no_grad():
        expected = sum(float(tuner.loss(ids)) for ids in data) / 2
    assert tuner.step(data) == pytest.approx(expected, abs=1e-5)
    assert all(p.grad is None for p in parameters)


def test_sixteen_bit_weights_are_trained_through_fp32_copies() -> None:
    """Steps smaller than bf16's resolution add up; without the copies they would all be lost."""
    placement = Placement(device=torch.device("cpu"), dtype=torch.bfloat16, packed=None, from_dense=None)
    model = random_model(ModelConfig.from_hf(TINY_QWEN2), placement, 0)
    parameters = make_trainable(model, "full")
    norm = model.norm.weight
    tuner, data = Tuner(model, parameters, learning_rate=1e-3), batches(model)
    assert isinstance(norm, torch.nn.Parameter)
    for _ in range(8):
        tuner.step(data)
    assert norm.dtype == torch.bfloat16
    assert not torch.equal(norm, torch.ones_like(norm))  # 1e-3 is a quarter of bf16's step at 1


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "method", "quant", "gib"),
    [("7B", "lora", "none", 20.1), ("7B", "lora_emb", "none", 33.7), ("7B", "qlora", "nf4", 11.5),
     ("14B", "lora", "none", 34.6), ("14B", "lora_emb", "none", 51.2), ("72B", "qlora", "nf4", 61.4)],
)  # fmt: skip
def test_the_plan_is_near_the_published_memory_at_256_tokens(size: str, method: str, quant: str, gib: float) -> None:
    cost = TuningCost(config=published(size), method=method, quant=quant, dtype="bf16", seq=256)
    assert 0.6 * gib < cost.gpu_bytes / 2**30 < 1.05 * gib


def test_shared_memory_falls_with_the_gpus() -> None:
    one = TuningCost(config=published("7B"), method="full", quant="none", dtype="bf16", seq=512)
    zero2, zero3 = (replace(one, gpus=4, sharding=sharding) for sharding in ("zero2", "zero3"))
    assert one.gpu_bytes > zero2.gpu_bytes > zero3.gpu_bytes
    assert zero3.gpu_bytes == (one.gpu_bytes - one.activation_bytes) // 4 + one.activation_bytes


def test_all_methods_are_planned_for_any_model(capsys: pytest.CaptureFixture[str]) -> None:
    spec = FinetuneSpec(
        model=ModelSpec(name="qwen-7b", arch={**QWEN, "hidden_size": 4096, "num_hidden_layers": 32,
                        "num_attention_heads": 32, "intermediate_size": 22016, "vocab_size": 151936}),
        method=list(METHODS), seq=[256, 8192], plan=True, on="A100-SXM4-80GB",
    )  # fmt: skip
    table = plan_table(check(spec))
    rows = [dict(zip(table.columns, (cell.text for cell in row))) for row in table.rows]
    assert len(rows) == 8
    assert [row["fits"] for row in rows] == ["yes"] * 6 + ["no"] * 2  # all parameters do not fit one GPU
    assert rows[0]["trainable"] == "143,130,624"
    assert main(["mode=finetune", "plan=true", "method=lora,full", "seq=256,512", "model=qwen-7b", "on=A100-SXM4-80GB",
                 "gpus=2", "sharding=zero3"]) == 0  # fmt: skip
    assert "2 GPUs, zero3" in " ".join(capsys.readouterr().out.split())


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [nano(), ModelSpec(name="tiny", weights="random", dtype="fp32", arch=TINY_QWEN2)])
def test_a_row_has_the_losses_the_times_and_what_is_trained(method: str, model: ModelSpec) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    spec = FinetuneSpec(model=model, method=[method], seq=[64], accumulation=2, repetitions=2, num_threads=1)
    row = json.loads(json.dumps(measure(spec, Tuning(method=method, seq=64))))
    opened, _ = open_model(model, Tuning(method="full", seq=64))
    assert row["num_trainable"] == num_trainable(opened.config, method, 64)
    assert len(row["step_s"]) == 2
    assert row["losses"][-1] < row["losses"][0]


def test_a_grid_keeps_what_it_has_and_says_what_did_not_fit(tmp_path: Path) -> None:
    spec = FinetuneSpec(model=nano(), method=["lora", "full"], seq=[32], runs_dir=str(tmp_path), quiet=True)
    asked = []

    def measured(spec: FinetuneSpec, tuning: Tuning) -> dict[str, Any]:
        asked.append(tuning.key)
        if tuning.method == "full":
            return {"status": "oom", "reason": "no memory"}
        return {
            "status": "ok",
            "step_s": [1.0, 1.5, 1.25],
            "tok_per_s": [256.0],
            "peak_bytes": 2**30,
            "baseline_bytes": 0,
        }

    path = run_grid(check(spec), measured)
    run_grid(replace(spec, seq=[32, 64]), measured)
    assert asked == ["finetune lora 32", "finetune full 32", "finetune lora 64", "finetune full 64"]
    cells, by_length = finetune_tables([load_run(path)])
    assert [cell.text for cell in by_length.rows[0]] == ["qwen-nano", "LoRA", "1.0G, 1.2s", "1.0G, 1.2s"]
    assert [cell.text for cell in by_length.rows[1]][2:] == ["OOM", "OOM"]
    assert cells.rows[0][3].text == "1.25 [1, 1.5]"


@pytest.mark.slow
def test_the_command_measures_each_method_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Two of the four, since a process takes five seconds: the rows of all are measured above."""
    pytest.importorskip("bitsandbytes")
    arguments = ["mode=finetune", "method=qlora,full", "seq=32", "accumulation=2", "repetitions=1"]
    assert main([*arguments, "model.dtype=fp32", f"runs_dir={tmp_path}", "num_threads=1"]) == 0
    result = json.loads((tmp_path / "profile/finetune/qwen-nano/default/result.json").read_text())
    assert [(row["method"], row["status"]) for row in result["cells"]] == [("qlora", "ok"), ("full", "ok")]
    assert all(row["losses"][1] < row["losses"][0] for row in result["cells"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": ["lorra"]}, "did you mean"),
        ({"mode": ["finetune", "encode"]}, "by itself"),
        ({"seq": [1]}, "at least 2"),
        ({"gpus": 2, "sharding": "zero3"}, "planned, not measured"),
        ({"gpus": 2, "plan": True}, "share by one of"),
        ({"sharding": "zero3", "plan": True}, "share by one of"),
        ({"dropout": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(FinetuneSpec(model=nano(), **keys))


def test_a_gptq_base_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = ModelSpec(name="m", weights="random", quant="gptq-int4", arch=TINY_QWEN2)
    with pytest.raises(ConfigError, match="no backward pass"):
        run_grid(FinetuneSpec(model=model, method=["qlora"], runs_dir=str(tmp_path)))
    assert [t.key for t in tunings(FinetuneSpec(method=["lora", "lora"], seq=[8, 8]))] == ["finetune lora 8"]
