"""Final hidden states kept beside a run are those that made its log-probabilities, chunked or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_native_engine import engine_of

from qwen_eval.core import DataError, Prompt, Score, StoreError, ids_sha256
from qwen_eval.models.hidden import HiddenStates


@pytest.mark.parametrize("chunk", [16, 2048])
def test_kept_states_and_the_head_give_the_scores_back(tmp_path: Path, chunk: int) -> None:
    engine, kept = engine_of(chunk=chunk), HiddenStates(tmp_path)
    prompt = Prompt.raw("a text of some forty bytes, to be scored whole")
    ((_, answer),) = engine.run([Score(prompt=prompt, num_context=5, keep_hidden=str(tmp_path))])
    key = ids_sha256(engine.render(prompt).ids)
    assert kept.keys() == {key}
    logprobs = (kept.read(key) @ engine.forward.model.head.weight.T).log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    assert wanted.tolist() == pytest.approx(answer.logprobs, abs=1e-4)


def test_what_cannot_be_written_or_read_is_said_in_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        HiddenStates(blocker).add("key", 1, torch.zeros(1, 4))
    (tmp_path / "key.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="not readable"):
        HiddenStates(tmp_path).read("key")
