"""The text that a model is quantized on, as token sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_eval.core import DataError, Message, Prompt
from qwen_eval.models.tokenizer import ChatTokenizer
from qwen_eval.quantize.config import QuantizeSpec

BUNDLED = Path(__file__).parents[1] / "assets" / "calibration" / "text.txt"
ROLES = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT files


def calibration_sequences(spec: QuantizeSpec, tokenizer: ChatTokenizer) -> list[list[int]]:
    """At most `num_sequences` sequences, evenly spread over the file; the same for the same file.

    Texts run together, an end-of-text token between them, and are cut every `sequence_tokens`; chats are one sequence
    each, their end cut off.
    """
    path = Path(spec.calibration) if spec.calibration else BUNDLED
    if not path.is_file():
        raise DataError(f"calibration={path}: no such file; a .txt, or a .jsonl of {{'text'}} or {{'messages'}} rows")
    chats, stream = _read(path, tokenizer)
    size = spec.sequence_tokens
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    if len(pieces) > 1 and len(pieces[-1]) < size // 2:
        pieces.pop()
    found = [ids[:size] for ids in chats] + [piece for piece in pieces if piece]
    if not found:
        raise DataError(f"calibration={path}: holds no text")
    step = max(1.0, len(found) / spec.num_sequences)
    return [found[int(i * step)] for i in range(min(spec.num_sequences, len(found)))]


def _read(path: Path, tokenizer: ChatTokenizer) -> tuple[list[list[int]], list[int]]:
    """(ids of each chat, ids of all texts)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [], tokenizer.encode(text)
    chats, stream = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            if "text" in row:
                stream += [*tokenizer.encode(row["text"]), tokenizer.endoftext_id]
            else:
                chats.append(tokenizer.render(Prompt(messages=_messages(row))))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{path}:{number}: neither {{'text'}} nor {{'messages'}} ({error})") from error
    return chats, stream


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    turns: list[dict[str, Any]] = row["messages"] if "messages" in row else row["conversations"]
    pairs = [(turn.get("role") or turn["from"], turn.get("content") or turn["value"]) for turn in turns]
    return tuple(Message(role=ROLES.get(role, role), content=content) for role, content in pairs)
