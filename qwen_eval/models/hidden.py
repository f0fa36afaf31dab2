"""Final hidden states of scored texts, stored with a run to compare two models exactly (KL divergence).

Per token, logits have the size of the vocabulary, a hidden state that of the model's width. The lm_head is not
copied: it is read again from the checkpoint. At Qwen-7B's size WikiText-2 under llama.cpp's protocol (half of its
299,000 tokens scored) takes 1.1 GiB in bf16.
"""

# R scored rows of one text, E hidden size, V vocabulary

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_eval.core import DataError, StoreError


class HiddenStates:
    """One file per scored text, named by the sha256 of its token ids; written whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, list[Tensor]] = {}

    def add(self, key: str, num_rows: int, rows_RE: Tensor) -> None:
        """Rows come in order, in one or several pieces; the file is written with the last."""
        pieces = self._open.setdefault(key, [])
        pieces.append(rows_RE.cpu())
        if sum(map(len, pieces)) >= num_rows:
            del self._open[key]
            self._write(key, torch.cat(pieces))

    def _write(self, key: str, hidden_RE: Tensor) -> None:
        path = self.directory / f"{key}.safetensors"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")  # two workers may have the same text
            save_file({"hidden": hidden_RE.contiguous()}, str(part))
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: cannot be written ({error}); free space or run with keep_hidden=false") from None

    def keys(self) -> set[str]:
        return {path.stem for path in self.directory.glob("*.safetensors")}

    def read(self, key: str) -> Tensor:
        """[R,E] in the model's dtype."""
        path = self.directory / f"{key}.safetensors"
        try:
            return load_file(str(path))["hidden"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path}: not readable ({error}); run again with tag=NAME keep_hidden=true") from None
