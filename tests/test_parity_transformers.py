"""Our block against transformers on random tiny Qwen1.5/2, Qwen2.5 (GQA, YaRN) and Qwen3 checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_eval.engines.native.generation import Generator, Row
from qwen_eval.models.checkpoint import Placement, load
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.runner import ModelRunner

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # wide: greedy choices must not hang on rounding
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
QWEN2: dict[str, Any] = {"model_type": "qwen2", "num_key_value_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "qwen2.5 grouped, tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2.5 yarn": {
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen2 sliding window": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen2 windows by layer_types": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2 yarn, ramp not truncated": {**QWEN2, "rope_scaling": {**YARN, "truncate": False}},
    "qwen2 yarn with scales": {**QWEN2, "rope_scaling": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}},
    "qwen2 yarn with one scale": {**QWEN2, "rope_scaling": {**YARN, "mscale": 1.5}},
    "qwen2 yarn with its factor stated": {**QWEN2, "rope_scaling": {**YARN, "attention_factor": 1.7}},
    "qwen2 yarn with other betas": {**QWEN2, "rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2}},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "qwen3 with biases": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelRunner]:
    """The same weights in transformers and in our engine, through a checkpoint on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**SHAPE, **VARIANTS[request.param]}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).float().eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # biases and norms start as constants: a swap of two would not show
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    ours, _ = load(folder, config, Placement(device=torch.device("cpu"), dtype=torch.float32))
    return theirs, ModelRunner(ours)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in (7, 30, 95)]


def test_logits_agree(both: tuple[Any, ModelRunner]) -> None:
    theirs, ours = both
    for ids in prompts():
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        found = ours.model.logits(ours.packed([ids], [len(ids)]))
        assert (found - expected).abs().max() <= 1e-4


def test_greedy_ids_agree_padded_or_not(both: tuple[Any, ModelRunner]) -> None:
    theirs, ours = both
    rows = prompts()
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    options: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    batch = theirs.generate(padded, attention_mask=mask, **options)[:, width:]
    alone = [theirs.generate(torch.tensor([r]), **options)[0, len(r) :] for r in rows]
    generator = Generator(ours, _Silent(), max_slots=3)
    found = {
        row.index: row.tokens
        for row in generator.run(
            [Row(index=i, prompt=tuple(r), max_new_tokens=20, end_ids=frozenset()) for i, r in enumerate(rows)]
        )
    }
    for i in range(len(rows)):
        assert found[i] == alone[i].tolist()
        assert found[i] == batch[i].tolist()


class _Silent:
    """A tokenizer that is never asked for text."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"."
