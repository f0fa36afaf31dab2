"""Where the small functions of the block run."""

from __future__ import annotations

import pytest
import torch

from qwen_eval.core import ConfigError
from qwen_eval.models import fused


def test_a_cpu_runs_them_as_written_and_says_so() -> None:
    assert fused.name(torch.device("cpu"), torch.float32) == "plain"
    assert not fused.uses_triton(torch.ones(3))


@pytest.mark.skipif(fused.can_launch(), reason="kernels of Triton run here")
def test_kernels_that_cannot_run_are_an_error_where_they_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"engine.kernels=triton needs CUDA"):
        fused.choose("triton")
