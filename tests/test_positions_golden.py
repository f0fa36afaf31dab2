"""Positions and sampling against tables of the original code: NTK alphas, rotary angles, LogN, probabilities."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_eval.core import Sampling
from qwen_eval.engines.native.sampling import distribution
from qwen_eval.models.rope import inverse_frequencies, logn_factors, ntk_alpha


def test_alpha_of_every_recorded_length(golden: Path) -> None:
    table = json.loads((golden / "model" / "ntk_alpha_table.json").read_text())
    found = {s: {length: ntk_alpha(int(length), int(s)) for length in lengths} for s, lengths in table.items()}
    assert found == table


def test_rotary_angles_of_every_recorded_base_and_alpha(golden: Path) -> None:
    recorded = load_file(golden / "model" / "rope_logn.safetensors")
    positions = recorded["positions"].float()
    cases = {key.rsplit(".", 1)[0] for key in recorded if key.startswith("d")}
    assert cases
    for case in cases:
        found = re.fullmatch(r"d(\d+)\.b(\d+)\.a([\d.]+)", case)
        assert found is not None, case
        dim, base, alpha = int(found[1]), float(found[2]), float(found[3])
        frequencies = inverse_frequencies(dim, base, alpha)
        assert torch.allclose(frequencies, recorded[f"{case}.inv_freq"], rtol=1e-6, atol=0)
        angles = torch.outer(positions, recorded[f"{case}.inv_freq"])
        assert torch.equal(torch.cat((angles, angles), -1).cos(), recorded[f"{case}.cos"])
        assert torch.equal(torch.cat((angles, angles), -1).sin(), recorded[f"{case}.sin"])


def test_logn_factors_of_every_recorded_training_length(golden: Path) -> None:
    recorded = load_file(golden / "model" / "rope_logn.safetensors")
    for key in (key for key in recorded if key.startswith("logn.S")):
        found = logn_factors(recorded["positions"].long(), int(key.removeprefix("logn.S")))
        assert torch.allclose(found, recorded[key], rtol=1e-6, atol=0)


def test_logn_goes_on_where_the_original_table_ended() -> None:
    """The released table holds 32,767 entries: longer sequences raised."""
    (factor,) = logn_factors(torch.tensor([99_999]), 2048).tolist()
    assert factor == pytest.approx(math.log(100_000) / math.log(2048))


FORCED_SCORE = 2.0**15  # what the original writes over the score of endoftext once a stop word has been read


def is_forced_to_end(ids: list[int], stops: list[list[int]], eos_id: int) -> bool:
    """Whether the original forces endoftext next: prompt and reply together end with another stop word."""
    return any(ids[-len(stop) :] == stop for stop in stops if stop != [eos_id])


def sampling_of(case: dict[str, Any]) -> Sampling:
    keys = ("temperature", "top_p", "top_k", "repetition_penalty")
    return Sampling(**{"temperature": 1.0, **{key: case[key] for key in keys if case.get(key) is not None}})


def test_probabilities_after_all_processors(golden: Path) -> None:
    cases = json.loads((golden / "model" / "sampling.json").read_text())
    recorded = load_file(golden / "model" / "sampling.safetensors")
    for name, case in cases.items():
        for row, logits in enumerate(recorded[f"{name}.logits"]):
            ids = recorded[f"{name}.input_ids"][row].tolist()
            eos = case["eos_token_id"]
            if is_forced_to_end(ids, case.get("stop_words_ids") or [], eos):
                logits = logits.clone()
                logits[eos] = FORCED_SCORE  # the original forces its end token; our engine has ended by then
            found = distribution(logits, ids, sampling_of(case))
            assert torch.allclose(found, recorded[f"{name}.probs"][row], atol=1e-6), (name, row)
