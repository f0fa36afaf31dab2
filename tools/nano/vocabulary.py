"""A small byte-level BPE in the published format of Qwen v1: `qwen.tiktoken`, Qwen's regex, Qwen's special tokens."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from nano import generator, mixture
from nano.texts import Texts
from qwen_eval.data import exercises as ex

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [b for b in range(256) if b not in BYTES]  # the order of the real vocabulary: "!" is 0, "A" is 32
NUM_EXTRA = 5
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(NUM_EXTRA)))


def byte_of_letter() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for bytes, and what they stand for."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


def train_ranks(corpus: Iterable[str], num_ranks: int) -> dict[bytes, int]:
    """`num_ranks` byte strings and their ranks: 256 bytes in Qwen's order, then merges by age. Deterministic.

    Chinese runs on without spaces: no token may hold a city and what stands before it, or a statement and an option
    would have no token in common.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.Split(Regex(f" ?(?:{'|'.join(ex.CITIES_ZH)})"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    letters = byte_of_letter()
    by_age = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(letters[c] for c in token) for token, _ in by_age if len(token) > 1]
    return {token: rank for rank, token in enumerate([bytes([b]) for b in BYTES] + merged)}


def write(ranks: dict[bytes, int], path: Path) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines), encoding="ascii")


def read(path: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("qwen-nano", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def corpus(texts: Texts, *, chars: int, seed: int) -> Iterator[str]:
    """About `chars` characters of training text, in the proportions a small vocabulary should know, and exercises."""
    rng = random.Random(seed)
    shares = {"books": 0.37, "poetry": 0.12, "prose": 0.08, "latex": 0.04, "python": 0.09}
    for kind, share in shares.items():
        taken, documents = 0, texts.of(kind)
        while documents and taken < chars * share:
            text = rng.choice(documents).text
            start = rng.randrange(max(len(text) - 20_000, 1))
            taken += len(text[start : start + 20_000])
            yield text[start : start + 20_000]
    writer = mixture.Writer(texts, seed=seed)
    taken = 0
    while taken < chars * 0.3:
        document = writer.write(writer.rng.choice(list(mixture.FIRST.exercises)))
        for text, _ in document:  # apart, as they are tokenised: no token may swallow the letter of an answer
            if text not in SPECIALS:
                taken += len(text)
                yield text
    for word in exercise_words():
        yield "\n".join([word] * (chars // 15_000))


def exercise_words() -> list[str]:
    """The words exercises turn on, each to be one token: what is compared and copied is then one place, not three."""
    words: list[str] = []
    for language, relations in generator.facts().items():
        for subject, answer in (pair for relation in relations for pair in relation["pairs"]):
            words += [f" {answer}", f" {subject}"] + ([answer, subject] if language == "zh" else [])
    english = [
        *generator.NAMES,
        *generator.ITEMS,
        *ex.CITIES,
        *(thing.removeprefix("a_") for thing in generator.THINGS),
    ]
    chinese = [space + city for city in ex.CITIES_ZH for space in ("", " ")]
    return words + [f" {word}" for word in english] + chinese


def twins(ranks: dict[bytes, int]) -> list[tuple[int, int]]:
    """Pairs of tokens that differ in a space before a word that is not ASCII: (with it, without it)."""
    spaced = (token for token in ranks if token.startswith(b" ") and not token.isascii())
    return [(ranks[token], ranks[token[1:]]) for token in spaced if token[1:] in ranks]
