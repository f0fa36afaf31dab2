"""Every field of a config.json, nested ones too, is honoured as transformers does, known to be harmless, or refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.core import ModelError
from qwen_eval.models.config import HARMLESS, ModelConfig, read_fields

QWEN2: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 32, "intermediate_size": 64, "vocab_size": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 16},  # max_window_layers is 28 where it is not stated
        {"use_sliding_window": True, "max_window_layers": 2},  # the window is 4,096 where it is not stated
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 2},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 16},
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 32},
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_the_windowed_layers_are_those_of_transformers(model_type: str, fields: dict[str, Any]) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**{**QWEN2, **fields, "model_type": model_type})
    ours = ModelConfig.from_hf({**QWEN2, **fields, "model_type": model_type})
    expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert [ours.window(layer) for layer in range(32)] == expected


def test_a_qwen3_without_head_dim_has_128_as_in_transformers() -> None:
    from transformers import AutoConfig

    fields = {**QWEN2, "model_type": "qwen3"}
    assert ModelConfig.from_hf(fields).head_dim == AutoConfig.for_model(**fields).head_dim == 128


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers() -> None:
    from transformers import AutoConfig

    fields = {**QWEN2, "rope_scaling": {**YARN, "factor": 2.0}, "rope_parameters": {**YARN, "factor": 4.0}}
    ours = ModelConfig.from_hf(fields)
    assert ours.yarn is not None
    assert ours.yarn.factor == AutoConfig.for_model(**fields).rope_parameters["factor"] == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "layernorm"}, "unknown field norm_type='layernorm' may change the maths"),
        ({"use_gate": False}, "unknown field use_gate=False"),
        ({"rope_interleave": 1.0}, "unknown field rope_interleave=1.0"),
        ({"dual_chunk_attention_config": {"chunk_size": 4}}, "unknown field dual_chunk_attention_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
        ({"use_mrope": True}, "use_mrope=True is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads=.* is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"layer_types": ["full_attention"]}, "has 1 entries for 32 layers"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types=.* must be a list of full_attention"),
        ({"layer_types": ["sliding_attention"] * 32}, "use_sliding_window=true is not set"),
        ({"use_sliding_window": True, "max_window_layers": None}, "max_window_layers=None must be a whole number"),
        ({"use_sliding_window": "false"}, "use_sliding_window='false' must be true or false"),
        ({"rope_scaling": {**YARN, "mscale_al_dim": 1.0}}, "rope_scaling.mscale_al_dim=1.0 is unknown for type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters.factor=4.0 is unknown"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention=.* is unknown",
        ),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is unknown"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling type 'llama3' is not supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_scaling type \['yarn'\] is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor='4' must be a positive number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim=15 has 15 channels that turn"),
        ({"hidden_size": 64.5}, "hidden_size=64.5 must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be a positive number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 1024"),
        ({"vocab_size": 10**40}, "vocab_size=an integer of 133 bits must be at most"),
        ({"model_type": ["qwen2"]}, "is not a dense Qwen model"),
        ({"evil\x1b[2J": 1}, r"unknown field evil\\x1b\[2J=1"),
    ],
)
def test_a_field_that_changes_the_maths_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        ModelConfig.from_hf({**QWEN2, **fields})
    assert str(error.value).isprintable()


def test_harmless_fields_change_nothing_whatever_they_say() -> None:
    plain = ModelConfig.from_hf(QWEN2)
    names = [name for group in HARMLESS.values() for name in group.split()]
    names = [name for name in names if name not in ("model_type", "max_position_embeddings")]
    assert len(set(names)) == len(names) > 50
    assert ModelConfig.from_hf({**QWEN2, **dict.fromkeys(names, "anything")}) == plain
    assert ModelConfig.from_hf({**QWEN2, "_name_or_path": "x", "attention_chunk_size": None}) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("[]", "holds a list, not a JSON object"),
        ('{"model_type": "qw', "not readable as JSON"),
        ('{"vocab_size": ' + "9" * 10_000 + "}", "not readable as JSON"),
        (json.dumps({"x": "y" * (17 << 20)}), "not a config of a model"),
    ],
    ids=["brackets", "objects", "list", "cut", "digits", "17 MiB"],
)
def test_a_hostile_config_is_refused_in_one_line_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    start = time.process_time()
    with pytest.raises(ModelError, match=message) as error:
        read_fields(tmp_path / "config.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))
    assert time.process_time() - start < 2
