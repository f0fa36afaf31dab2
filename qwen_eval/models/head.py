"""The lm_head of a checkpoint alone, for comparing two runs by the hidden states that they kept."""

from __future__ import annotations

from torch import Tensor

from qwen_eval.config import ModelSpec
from qwen_eval.core import ModelError
from qwen_eval.models import checkpoint
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.fingerprint import model_fingerprint
from qwen_eval.models.hub import checkpoint_dir
from qwen_eval.models.load import placement_of
from qwen_eval.models.lora import base_of
from qwen_eval.models.merged import open_tensors
from qwen_eval.models.overrides import read_config


def read_head(spec: ModelSpec, *, fingerprint: str) -> Tensor:
    """The lm_head [V,E] of a model as stored, without loading the rest; ModelError for another checkpoint."""
    if spec.weights == "random":
        raise ModelError(f"model {spec.name}: random weights have no stored lm_head; KL divergence needs a checkpoint")
    directory = checkpoint_dir(spec)
    found = model_fingerprint(spec, directory)
    if found != fingerprint:
        raise ModelError(
            f"{directory}: is another checkpoint now ({found}) than the run's ({fingerprint or 'unknown'})"
        )
    base = base_of(directory)
    fields = read_config(base, spec)
    placement = placement_of(spec, fields, base)
    return checkpoint.read_head(open_tensors(directory), ModelConfig.from_hf(fields), placement)
