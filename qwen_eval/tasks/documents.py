"""Long texts: plain files, jsonl, parquet or a hub dataset, as documents; and documents as token streams."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_eval.core import DataError, Tokenizer
from qwen_eval.data.rows import Source

ENDINGS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Document:
    id: str
    text: str


def read_documents(source: Source, *, text_key: str, hub_config: str | None = None, split: str = "") -> list[Document]:
    """Every text of the source in the order of file names and rows: a text file is one document, a row another.

    Blank texts are left out. DataError where no row has `text_key`, or nothing is left.
    """
    if source.is_hub:
        found = _rows(source.hub_rows(hub_config, split), f"{source.origin} {split}", text_key)
    else:
        names = [name for name in source.names("*") if name.endswith(ENDINGS)]
        if not names:
            raise DataError(f"{source.origin}: no file that ends in {', '.join(ENDINGS)}")
        found = [document for name in names for document in _documents(source, name, text_key)]
    kept = [document for document in found if document.text.strip()]
    if not kept:
        raise DataError(f"{source.origin}: the texts are empty; pass task.path=<a text, jsonl or parquet file>")
    return kept


def _documents(source: Source, name: str, text_key: str) -> list[Document]:
    if name.endswith(".parquet"):
        return _rows(source.parquet(name), name, text_key)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _rows(source.jsonl(name), name, text_key)
    return [Document(id=name, text=source.text(name))]


def _rows(rows: Sequence[dict[str, Any]], name: str, text_key: str) -> list[Document]:
    for i, row in enumerate(rows):
        if not isinstance(row.get(text_key), str):
            raise DataError(
                f"{name} row {i + 1}: no text under {text_key!r}; it has {', '.join(map(str, row))}; "
                "pass task.text_key="
            )
    return [Document(id=f"{name}#{i}", text=row[text_key]) for i, row in enumerate(rows)]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Token ids of one document, or of several one behind another. `starts[i]` is where document `names[i]` begins."""

    id: str
    ids: tuple[int, ...]
    text: str
    names: tuple[str, ...]
    starts: tuple[int, ...] = (0,)

    def document_at(self, position: int) -> str:
        return self.names[bisect_right(self.starts, position) - 1]


def token_streams(documents: Sequence[Document], tokenizer: Tokenizer, *, as_one: bool) -> list[Stream]:
    """One stream a document, or one of all of them with the end-of-text token after each (where there is one)."""
    streams = [
        Stream(id=document.id, ids=tuple(tokenizer.encode(document.text)), text=document.text, names=(document.id,))
        for document in documents
    ]
    return [_joined(streams, end_of_text(tokenizer))] if as_one else streams


def _joined(streams: Sequence[Stream], separator: int | None) -> Stream:
    ids: list[int] = []
    starts = []
    for stream in streams:
        starts.append(len(ids))
        ids += [*stream.ids, *([] if separator is None else [separator])]
    return Stream(
        id="stream", ids=tuple(ids), text="".join(stream.text for stream in streams),
        names=tuple(stream.id for stream in streams), starts=tuple(starts),
    )  # fmt: skip


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of `<|endoftext|>`; None in a vocabulary without it."""
    ids = tokenizer.encode(END_OF_TEXT, parse_special=True)
    return ids[0] if len(ids) == 1 else None
