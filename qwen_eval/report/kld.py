"""Exact KL divergence of two models' next-token distributions from their final hidden states, never from stored logits.

A run with `keep_hidden=true` keeps, per scored position, the final hidden state (after the last norm); the lm_head is
read from the checkpoint. Logits exist here only for one chunk of positions at a time and in fp32.
"""

# T positions, D hidden size of the reference, E of the tested model, V vocabulary

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
import torch

from qwen_eval.config import ModelSpec, RopeSpec
from qwen_eval.core import DataError, QwenEvalError
from qwen_eval.metrics import mean
from qwen_eval.models.head import read_head
from qwen_eval.models.hidden import HiddenStates
from qwen_eval.report.comparison import Divergence, Side
from qwen_eval.runs.run import Run
from qwen_eval.runs.store import HIDDEN

Piece: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # KL of each position, whether the most likely tokens agree
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
CHUNK_LOGITS = 32 * 1024 * 1024  # fp32 logits of one chunk and model: 128 MiB


def divergence_of_runs(first: Side, second: Side) -> tuple[Divergence | None, list[str]]:
    """Of the same texts whose hidden states both runs kept; None and a note where it cannot be had."""
    states = [HiddenStates(side.run.path / HIDDEN) for side in (first, second)]
    known = states[0].keys() & states[1].keys()
    texts = [(item.prompt_sha256, item.draw) for item in first.items.values() if item.prompt_sha256 in known]
    if not texts:
        return None, ["no KLD: the two runs kept no text of the same tokens"]
    try:
        heads = _head_of(first.run), _head_of(second.run)
        return divergence_of_texts(states[0], states[1], heads, texts), []
    except (QwenEvalError, OSError) as error:
        return None, [f"no KLD: {error}"]


def _head_of(run: Run) -> torch.Tensor:
    """The lm_head of the very checkpoint of a run; ModelError where another one lies there now."""
    return read_head(_model_spec(run), fingerprint=str(run.engine_info.get("weights") or ""))


def _model_spec(run: Run) -> ModelSpec:
    known = {item.name for item in fields(ModelSpec)}
    values: dict[str, Any] = {key: value for key, value in run.model_spec.items() if key in known}
    return ModelSpec(**{**values, "rope": RopeSpec(**(values.get("rope") or {}))})


def divergence(
    hidden_ref_TD: torch.Tensor,
    head_ref_VD: torch.Tensor,
    hidden_test_TE: torch.Tensor,
    head_test_VE: torch.Tensor,
    *,
    documents: Sequence[Hashable] | None = None,
    chunk: int | None = None,
) -> Divergence:
    """Summary of `token_kld`; the interval is over `documents` (one a position), else there is none."""
    return _summary(list(token_kld(hidden_ref_TD, head_ref_VD, hidden_test_TE, head_test_VE, chunk=chunk)), documents)


def token_kld(
    hidden_ref_TD: torch.Tensor,
    head_ref_VD: torch.Tensor,
    hidden_test_TE: torch.Tensor,
    head_test_VE: torch.Tensor,
    *,
    chunk: int | None = None,
) -> Iterator[Piece]:
    """Per chunk of positions: (KL of each position in nats, fp32; whether the most likely tokens agree).

    Raises DataError where the two do not hold the same positions or vocabulary.
    """
    if len(hidden_ref_TD) != len(hidden_test_TE):
        raise DataError(f"{len(hidden_ref_TD)} positions against {len(hidden_test_TE)}: not the same text")
    vocabulary = min(len(head_ref_VD), len(head_test_VE))
    if abs(len(head_ref_VD) - len(head_test_VE)) > 1024:  # rows beyond the shared ones are padding, at most 1,024
        raise DataError(f"vocabularies of {len(head_ref_VD)} and {len(head_test_VE)} rows: not the same tokenizer")
    rows = chunk or max(1, CHUNK_LOGITS // max(vocabulary, 1))
    ref_VD, test_VE = head_ref_VD[:vocabulary].float(), head_test_VE[:vocabulary].float()
    for start in range(0, len(hidden_ref_TD), rows):
        ref_TV = (hidden_ref_TD[start : start + rows].float() @ ref_VD.T).log_softmax(-1)
        test_TV = (hidden_test_TE[start : start + rows].float() @ test_VE.T).log_softmax(-1)
        same_T = ref_TV.argmax(-1) == test_TV.argmax(-1)
        kld_T = (ref_TV.exp() * (ref_TV - test_TV)).sum(-1).clamp_min(0)  # rounding gives -1e-9 for equal rows
        yield kld_T, same_T


def divergence_of_texts(
    first: HiddenStates,
    second: HiddenStates,
    heads: tuple[torch.Tensor, torch.Tensor],
    texts: Sequence[tuple[str, Hashable]],
) -> Divergence:
    """Over the texts that two runs kept, one at a time: (sha256 of its token ids, the document it is of)."""
    pieces: list[Piece] = []
    documents: list[Hashable] = []
    for key, document in texts:
        found = list(token_kld(first.read(key), heads[0], second.read(key), heads[1]))
        documents += [document] * sum(len(kld_T) for kld_T, _ in found)
        pieces += found
    return _summary(pieces, documents)


def _summary(pieces: Sequence[Piece], documents: Sequence[Hashable] | None) -> Divergence:
    kld = np.concatenate([kld_T.cpu().numpy() for kld_T, _ in pieces]) if pieces else np.zeros(0, dtype="float32")
    agree = sum(int(same_T.sum()) for _, same_T in pieces)
    if not len(kld):
        raise DataError("no positions to compare: both runs hold empty hidden states")
    metric = mean([float(x) for x in kld], documents, is_positive=True)
    values = np.percentile(kld, PERCENTILES)
    return Divergence(
        mean=metric.value,
        low=metric.low if documents is not None else None,
        high=metric.high if documents is not None else None,
        percentiles={f"{p:g}": float(v) for p, v in zip(PERCENTILES, values)},
        top1_agreement=agree / len(kld),
        num_tokens=len(kld),
    )
