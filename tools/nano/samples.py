"""Make the bundled samples that go with qwen-nano: held-out texts, haystacks, held-out exercises.

python -m nano.samples --texts FOLDER          (in tools/; the texts once, then the exercises from the haystacks)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]
from nano import generator, vocabulary  # noqa: E402
from nano.texts import Document, Passages, Texts, read  # noqa: E402
from qwen_eval.data import exercises as ex  # noqa: E402

SAMPLES = ROOT / "qwen_eval" / "assets" / "samples"
SEED = 20_261
MAX_TOKENS = 250  # of prompt and answer: within qwen-nano's training length
BOOKS = {  # slug: title and first character of the excerpt
    "mysterious_island": "The Mysterious Island",
    "old_curiosity_shop": "The Old Curiosity Shop",
    "lord_jim": "Lord Jim",
    "villette": "Villette",
    "federalist": "The Federalist Papers",
}
EXCERPT = slice(20_000, 56_000)


def title_of(document: Document) -> str:
    return document.id.rsplit("/", 1)[-1].removesuffix(".md")


def excerpt(text: str, part: slice) -> str:
    """Whole paragraphs of a slice."""
    cut = text[part]
    return cut[cut.find("\n\n") + 2 : cut.rfind("\n\n") + 1]


def write_texts(texts: Texts) -> None:
    """Long documents that training never saw, one a file, for perplexity."""
    folder, meta = SAMPLES / "text", []
    folder.mkdir(parents=True, exist_ok=True)
    books = {title_of(d): d for d in texts.of("books", heldout=True)}
    chosen = [(slug, "en", books[title], excerpt(books[title].text, EXCERPT)) for slug, title in BOOKS.items()]
    poems = [d for d in texts.of("poetry", heldout=True) if d.id.startswith("纳兰性德")]
    chosen.append(("nalan", "zh", poems[0], "\n".join(d.text for d in poems)))
    prose = texts.of("prose", heldout=True)
    chosen.append(("paddle_docs", "zh", prose[0], "\n".join(d.text for d in prose)))
    python = next(d for d in texts.of("python", heldout=True) if d.id == "enum.py")
    chosen.append(("enum", "python", python, python.text[:36_000]))
    for slug, language, document, text in chosen:
        (folder / f"{slug}.txt").write_text(text, encoding="utf-8")
        meta.append(_meta(f"{slug}.txt", language, document, text))
    (folder / "META.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_haystacks(texts: Texts) -> None:
    folder = SAMPLES / "haystack"
    folder.mkdir(parents=True, exist_ok=True)
    book = next(d for d in texts.of("books", heldout=True) if title_of(d) == "Looking Backward")
    poems = [d for d in texts.of("poetry", heldout=True) if d.id.startswith("诗经")]
    meta = []
    for name, language, document, text in (
        ("en.txt", "en", book, excerpt(book.text, slice(20_000, 140_000))),
        ("zh.txt", "zh", poems[0], "".join(d.text for d in poems)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        meta.append(_meta(name, language, document, text))
    (folder / "META.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _meta(file: str, language: str, document: Document, text: str) -> dict[str, object]:
    origin = {
        "books": f"{document.id.removesuffix('.md')}, public domain",
        "poetry": f"{document.id.split(':')[0]}, github.com/chinese-poetry/chinese-poetry",
        "prose": "github.com/PaddlePaddle/docs, Chinese API pages one after the other",
        "python": f"{document.id}, the standard library of CPython, Copyright Python Software Foundation",
    }[document.kind]
    return {"file": file, "language": language, "source": origin, "licence": document.licence, "chars": len(text)}


def haystack_passages() -> Passages:
    """Passages out of the bundled haystacks, so that the exercises can be made again from the package alone."""
    documents = [
        Document(kind=kind, id=name, text=(SAMPLES / "haystack" / name).read_text("utf-8"), licence="", heldout=True)
        for kind, name in (("books", "en.txt"), ("poetry", "zh.txt"))
    ]
    return Passages(Texts(documents=documents), heldout=True)


def exercise_rows(vocabulary_file: Path) -> list[dict[str, object]]:
    """The held-out exercises, each with the solved examples that go before it."""
    encoding, passages = vocabulary.encoding(vocabulary.read(vocabulary_file)), haystack_passages()
    test = generator.Source(rng=random.Random(SEED), heldout=True, passage=passages)
    dev = generator.Source(rng=random.Random(SEED + 1), heldout=False, passage=passages)
    plan = (
        ("choice/stated", 90, lambda: test.choice_stated("en")),
        ("choice/stated_zh", 50, lambda: test.choice_stated("zh")),
        ("choice/told", 40, test.choice_told),
        ("fact", 60, test.fact),
        ("fact", 40, lambda: test.fact("zh")),
        ("arithmetic/one", 80, lambda: test.arithmetic(1)),
        ("arithmetic/two", 60, lambda: test.arithmetic(2)),
        ("recall/one", 50, lambda: test.recall("en", chars=test.rng.choice((200, 350, 500)))),
        ("recall/several", 30, lambda: test.recall("en", chars=250, needles=3)),
        ("recall/one", 40, lambda: test.recall("zh", chars=test.rng.choice((150, 300, 450)))),
    )
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    for group, number, make in plan:
        wanted = len(rows) + number
        while len(rows) < wanted:
            exercise = make()
            shots = shots_for(dev, exercise)
            text = whole_text(exercise, shots)
            if text in seen or len(encoding.encode_ordinary(text)) > MAX_TOKENS:
                continue
            seen.add(text)
            rows.append(
                {
                    "id": f"{exercise.kind}/{len(rows)}",
                    "group": group,
                    **_row(exercise),
                    "shots": [_shot(s) for s in shots],
                }
            )
    return rows


def shots_for(dev: generator.Source, exercise: ex.Exercise) -> list[ex.Exercise]:
    if exercise.kind == "arithmetic":
        return [dev.arithmetic() for _ in range(2)]
    if exercise.kind == "recall":
        return []
    if exercise.key.startswith("context|"):
        return [dev.choice_told() for _ in range(2)]
    if exercise.kind == "choice":
        return [dev.choice_stated(exercise.language) for _ in range(5)]
    others = iter(lambda: dev.fact(exercise.language), None)
    return list(islice((other for other in others if other.answer != exercise.answer), 5))


def whole_text(exercise: ex.Exercise, shots: list[ex.Exercise]) -> str:
    if exercise.kind == "choice":
        return ex.few_shot_choice(exercise, shots) + ex.gold(exercise)
    if exercise.kind == "fact":
        return ex.few_shot_facts(exercise, shots) + ex.gold(exercise)
    if exercise.kind == "recall":
        return ex.recall_block(exercise) + ex.gold(exercise)
    return ex.few_shot_arithmetic(exercise, shots) + ex.arithmetic_gold(exercise)


def _row(exercise: ex.Exercise) -> dict[str, object]:
    """The fields that say something."""
    return {name: value for name, value in asdict(exercise).items() if value not in ("", ())}


def _shot(exercise: ex.Exercise) -> dict[str, object]:
    """What a shot does not share with its row."""
    return {name: value for name, value in _row(exercise).items() if name not in ("kind", "topic", "key", "language")}


def lines_of(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="write the texts and haystacks too, from this folder")
    parser.add_argument("--vocabulary", type=Path, default=SAMPLES.parent / "qwen-nano" / "qwen.tiktoken")
    options = parser.parse_args()
    if options.texts:
        texts = read(options.texts)
        write_texts(texts)
        write_haystacks(texts)
    (SAMPLES / "nano" / "test.jsonl").write_text(lines_of(exercise_rows(options.vocabulary)), encoding="utf-8")


if __name__ == "__main__":
    main()
