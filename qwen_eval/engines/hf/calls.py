"""What transformers is handed with a batch: padded rows, how tokens are drawn, what watches the batch; and what is
read of a model's settings.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch

from qwen_eval.engines.hf_tokenizer import HfTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Padded(TypedDict):
    """Rows of one length as the model takes them."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Drawn(TypedDict, total=False):
    """Of a generation that is sampled."""

    temperature: float
    top_k: int
    top_p: float


class Extras(TypedDict, total=False):
    """What only some models take."""

    position_ids: torch.Tensor
    logits_to_keep: int


class Overflow:
    """Watches the logits of a batch; a row with NaN or an infinity ends there. Read by the host once, at the end."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.rows_B = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.rows_B |= ~torch.isfinite(scores).all(-1)
        return scores.masked_fill(self.rows_B[:, None], 0.0)  # sampling from NaN would end the whole batch

    def ends(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return self.rows_B


class StopStrings:
    """Ends a row once the text generated for it has a stop string; `width` tokens are the prompt."""

    def __init__(self, tokenizer: HfTokenizer, stop: tuple[str, ...], width: int) -> None:
        self._tokenizer, self._stop, self._width = tokenizer, stop, width
        self._window = max(len(text.encode()) for text in stop) + 8  # a token is at least a byte, except special ones

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        tails = input_ids[:, self._width :][:, -self._window :].tolist()
        found = [first_stop(self._tokenizer.decode(tail), self._stop) is not None for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    found = [at for at in (text.find(item) for item in stop) if at >= 0]
    return min(found) if found else None


def named_ends(model: PreTrainedModel) -> frozenset[int]:
    """The end tokens of generation_config.json."""
    found: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(i for i in (found if isinstance(found, list) else [found]) if i is not None)


def is_stretched(model: PreTrainedModel) -> bool:
    """Whether positions follow the length of what is fed at a time: chunks of a text would be read otherwise."""
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    return (rope.get("rope_type") or rope.get("type")) in ("dynamic", "longrope")
