"""The running text of qwen-nano: what is read, under which licence, and what is kept out of training.

Reads `*.jsonl.gz` files with one document a line. Only texts whose licence lets the weights be shipped without
share-alike terms are taken: public-domain books, MIT poetry, Apache-2.0 prose, CC BY 4.0 LaTeX, the Python library.
Without such a folder the standard library of the running Python is the whole text (smoke runs).
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nano.generator import share_of

HELDOUT_SETS = ("诗经", "纳兰性德", "幽梦影")  # whole collections of poetry_zh.jsonl that training never sees
HELDOUT_SHARE = 0.04  # of the other documents, by a hash of their id
SENTENCE = {"en": re.compile(r"(?<=[.!?])\s+"), "zh": re.compile(r"(?<=[。！？])\s*")}


@dataclass(frozen=True, kw_only=True)
class Document:
    kind: str  # books | poetry | prose | latex | python
    id: str
    text: str
    licence: str
    heldout: bool


@dataclass(kw_only=True)
class Texts:
    documents: list[Document] = field(default_factory=list)

    def of(self, kind: str, *, heldout: bool = False) -> list[Document]:
        return [d for d in self.documents if d.kind == kind and d.heldout is heldout]

    @property
    def kinds(self) -> list[str]:
        return sorted({d.kind for d in self.documents})


def clean(text: str) -> str:
    """One kind of line end, no trailing blanks, no runs of empty lines."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read(folder: Path | None) -> Texts:
    """All documents that may be used, training and held-out sides marked."""
    if folder is None:
        return Texts(documents=list(_own_python()))
    return Texts(documents=[*_books(folder), *_chinese(folder), *_latex(folder), *_python(folder)])


def _books(folder: Path) -> Iterator[Document]:
    for name, heldout in (("books_en_train", False), ("books_en_long_heldout", True)):
        for row in rows(folder / f"{name}.jsonl.gz"):
            yield Document(
                kind="books", id=row["id"], text=clean(row["text"]), licence="public domain", heldout=heldout
            )


def _chinese(folder: Path) -> Iterator[Document]:
    for number, row in enumerate(rows(folder / "poetry_zh.jsonl.gz")):
        text = clean(f"{row['title']}\n{row['author']}\n{row['text']}")
        heldout = row["set"] in HELDOUT_SETS
        yield Document(kind="poetry", id=f"{row['set']}:{number}", text=text, licence="MIT", heldout=heldout)
    for row in rows(folder / "docs_zh_prose.jsonl.gz"):
        if row["licence"] == "Apache-2.0":
            yield _hashed("prose", row["id"], row["text"], "Apache-2.0")


def _latex(folder: Path) -> Iterator[Document]:
    for row in rows(folder / "latex_en_cc.jsonl.gz"):
        if row["licence"] == "CC BY 4.0":
            yield _hashed("latex", row["id"], row["text"], "CC BY 4.0")


def _python(folder: Path) -> Iterator[Document]:
    for row in rows(folder / "python_stdlib.jsonl.gz"):
        yield _hashed("python", row["id"], row["text"][:60_000], "PSF-2.0")


def _own_python() -> Iterator[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py"))[:40]:
        yield _hashed("python", path.name, path.read_text(encoding="utf-8")[:20_000], "PSF-2.0")


def _hashed(kind: str, id: str, text: str, licence: str) -> Document:
    heldout = share_of(f"document|{id}") < HELDOUT_SHARE
    return Document(kind=kind, id=id, text=clean(text), licence=licence, heldout=heldout)


class Passages:
    """Cuts sentences for recall contexts. `Passages(texts)(rng, "en", 300)` is about 300 characters.

    `keeps_lines`: every other passage keeps its line ends.
    """

    def __init__(self, texts: Texts, *, heldout: bool, keeps_lines: bool = False) -> None:
        self._keeps_lines = keeps_lines
        english = texts.of("books", heldout=heldout) or texts.of("python", heldout=heldout) or texts.documents
        chinese = texts.of("poetry", heldout=heldout) or english
        self._pools = {"en": [d.text for d in english], "zh": [d.text for d in chinese]}

    def __call__(self, rng: random.Random, language: str, chars: int) -> str:
        chars = chars if language == "en" else chars // 3
        text = rng.choice(self._pools[language])
        while len(text) < 2 * chars:
            text += rng.choice(self._pools[language])
        start = rng.randrange(max(len(text) - 2 * chars, 1))
        window = text[start : start + 2 * chars]
        if not self._keeps_lines or rng.random() < 0.5:
            window = re.sub(r"\s*\n\s*", " " if language == "en" else "", window)
        sentences = SENTENCE[language].split(window)[1:] or [window]
        passage = ""
        while sentences and len(passage) < chars:
            passage += ("" if language == "zh" or not passage else " ") + sentences.pop(0)
        return passage[: 2 * chars]
