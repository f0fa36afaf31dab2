"""How well tokenizers compress text, language by language: tokens per byte and per character, round trip, speed.

The bundled text is one in 20 languages, the Universal Declaration of Human Rights, so that languages compare too: the
same content takes more tokens in one than in another. Published compression ratios of Qwen are read off a picture and
are of another corpus: they are not put beside these.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen_eval import cli
from qwen_eval.core import ConfigError, DataError, ModelError
from qwen_eval.profile.measure import median
from qwen_eval.runs.store import write_bytes
from qwen_eval.tables import Cell, Table, number_cell, print_tables, render, text_cell

USAGE = """
python -m qwen_eval.tokens [key=value ...]

The embedded vocabulary:       python -m qwen_eval.tokens
Any tokenizers side by side:   python -m qwen_eval.tokens tokenizers=DIR/Qwen-7B,DIR/xlm-roberta-base
Relative to one of them:       python -m qwen_eval.tokens tokenizers=DIR/Qwen-7B,DIR/xlmr baseline=DIR/xlmr
Your own text:                 python -m qwen_eval.tokens text=DIR out=tokens.csv,tokens.svg

A tokenizer is qwen-nano, qwen-tiny or a directory with qwen.tiktoken, tokenizer.json or what transformers reads.
text= is a directory of .txt files named by their languages.

Exit code: 0 done, 2 a mistake.
"""
UDHR = Path(__file__).parents[1] / "assets" / "samples" / "udhr"
FORMS = ("md", "csv", "tex", "json", "svg", "png")
MOST_BYTES = 64 << 20  # of the text of one language
REFERENCE = "en"  # the language that others' tokens are compared with


@dataclass(kw_only=True)
class TokensSpec:
    tokenizers: list[str] = field(default_factory=lambda: ["qwen-nano"])
    text: str | None = None  # a directory of .txt files, one a language; null: the bundled declaration
    languages: list[str] = field(default_factory=list)  # only these
    baseline: str | None = None  # sizes are relative to this tokenizer; null: the first
    repetitions: int = 3  # of the timed encoding of all text
    out: list[str] = field(default_factory=list)  # files: .md .csv .tex .json .svg .png


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer as this measurement needs it. `encode` adds no special tokens."""

    name: str
    size: int
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """One text in one vocabulary. `round_trip`: "exact", "NFC" (equal once normalised) or "lossy"."""

    num_bytes: int
    num_characters: int
    num_tokens: int
    round_trip: str

    @property
    def per_byte(self) -> float:
        return self.num_tokens / self.num_bytes

    @property
    def per_character(self) -> float:
        return self.num_tokens / self.num_characters


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`found[name][language]`; `mb_per_s[name]` has a value a repetition, over all text."""

    languages: Sequence[str]
    sizes: Mapping[str, int]
    found: Mapping[str, Mapping[str, Compression]]
    mb_per_s: Mapping[str, Sequence[float]]
    baseline: str
    is_parallel: bool  # one text in all languages

    @cached_property
    def relative(self) -> dict[str, dict[str, float]]:
        """Tokens over the baseline's, by tokenizer and language."""
        base = self.found[self.baseline]
        return {
            name: {language: row[language].num_tokens / base[language].num_tokens for language in self.languages}
            for name, row in self.found.items()
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.run(argv, config_name="tokens", schema=TokensSpec, job=compare, usage=USAGE)


def compare(spec: TokensSpec) -> None:
    """Measure, print, write."""
    forms = [form_of(name) for name in check(spec).out]
    measured = measure(spec)
    tables = tables_of(measured)
    for name, form in zip(spec.out, forms):
        is_plot = form in ("svg", "png")
        write_bytes(Path(name), plot(measured, form) if is_plot else render(tables, form).encode("utf-8", "replace"))
    print_tables(tables)
    if spec.out:
        print(", ".join(spec.out))


def check(spec: TokensSpec) -> TokensSpec:
    """ConfigError for what needs no file to be seen wrong."""
    if spec.repetitions < 1:
        raise ConfigError(f"repetitions={spec.repetitions}: must be at least 1")
    if not spec.tokenizers or len(set(spec.tokenizers)) < len(spec.tokenizers):
        raise ConfigError(f"tokenizers={','.join(spec.tokenizers)}: name one or more, each once")
    for name in spec.out:
        form_of(name)
    return spec


def form_of(name: str) -> str:
    form = Path(name).suffix.removeprefix(".")
    if form not in FORMS:
        raise ConfigError(f"out={name}: must end in one of .{', .'.join(FORMS)}")
    return form


# --- what is compared ------------------------------------------------------------------------------------------------


def texts_of(spec: TokensSpec) -> dict[str, str]:
    """Text by language, in the order of `languages`, else of the names."""
    folder = UDHR if spec.text is None else Path(spec.text).expanduser()
    files = {file.stem: file for file in sorted(folder.glob("*.txt"))} if folder.is_dir() else {}
    if not files:
        raise DataError(f"text={spec.text}: no directory with .txt files; name them by language, such as en.txt")
    for language in spec.languages:
        if language not in files:
            raise ConfigError(f"languages={language}: no such text; there are {', '.join(files)}")
    return {language: _read(files[language]) for language in spec.languages or files}


def _read(file: Path) -> str:
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file}: {file.stat().st_size} bytes, more than {MOST_BYTES}; take a part of it")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable as UTF-8 ({error})") from None
    if not text:
        raise DataError(f"{file}: empty")
    return text


def vocabularies(names: Sequence[str]) -> list[Vocabulary]:
    """The tokenizers, labelled by the last part of their directory, by all of it where two have the same."""
    short = [Path(name).expanduser().resolve().name for name in names]
    labels = [name if short.count(last) > 1 else last for name, last in zip(names, short)]
    return [_vocabulary(name, label) for name, label in zip(names, labels)]


def _vocabulary(name: str, label: str) -> Vocabulary:
    from qwen_eval.models.hub import asset_dir

    folder = Path(name).expanduser()
    if not folder.is_dir():
        if "/" in name:
            raise ModelError(f"tokenizers={name}: no such directory")
        folder = asset_dir(name)
    if (folder / "qwen.tiktoken").is_file():
        return _tiktoken(folder, label)
    if (folder / "tokenizer.json").is_file():
        return _tokenizer_json(folder, label)
    return _transformers(folder, label)


def _tiktoken(folder: Path, label: str) -> Vocabulary:
    """Qwen v1, as its `tokenizer(text)`: NFC first. Nothing is remembered, which would flatter its speed."""
    from qwen_eval.models.tokenizer import QwenTokenizer, load_tokenizer

    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, QwenTokenizer)
    return Vocabulary(
        name=label,
        size=tokenizer.vocab_size,
        encode=lambda text: tokenizer.encode_allowing(text, ()),
        decode=tokenizer.decode,
    )


def _tokenizer_json(folder: Path, label: str) -> Vocabulary:
    from tokenizers import Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ModelError(f"{folder}/tokenizer.json: not a readable tokenizer ({error}); get the file again") from None
    return Vocabulary(
        name=label,
        size=tokenizer.get_vocab_size(),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
    )


def _transformers(folder: Path, label: str) -> Vocabulary:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever it raises, the directory holds no tokenizer that can be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"tokenizers={folder}: no qwen.tiktoken, no tokenizer.json, and not otherwise ({reason})"
        ) from None
    return Vocabulary(
        name=label,
        size=len(tokenizer),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=lambda ids: tokenizer.decode(list(ids), clean_up_tokenization_spaces=False),
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(spec: TokensSpec) -> Measured:
    texts, names = texts_of(check(spec)), vocabularies(spec.tokenizers)
    labels = [vocabulary.name for vocabulary in names]
    given = dict(zip(spec.tokenizers, labels))
    baseline = given.get(spec.baseline or spec.tokenizers[0], spec.baseline)
    if baseline not in labels:
        raise ConfigError(f"baseline={spec.baseline}: not among tokenizers={','.join(labels)}")
    return Measured(
        languages=list(texts),
        sizes={vocabulary.name: vocabulary.size for vocabulary in names},
        found={v.name: {language: compression(v, text) for language, text in texts.items()} for v in names},
        mb_per_s={v.name: speeds(v, list(texts.values()), spec.repetitions) for v in names},
        baseline=str(baseline),
        is_parallel=spec.text is None,
    )


def compression(vocabulary: Vocabulary, text: str) -> Compression:
    ids = vocabulary.encode(text)
    back = vocabulary.decode(ids)
    same = unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)
    return Compression(
        num_bytes=len(text.encode("utf-8")),
        num_characters=len(text),
        num_tokens=len(ids),
        round_trip="exact" if back == text else "NFC" if same else "lossy",
    )


def speeds(vocabulary: Vocabulary, texts: Sequence[str], repetitions: int) -> list[float]:
    """Megabytes of UTF-8 encoded a second, a value a repetition; `compression` was the warm-up."""
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for text in texts:
            vocabulary.encode(text)
        found.append(num_bytes / 1e6 / (time.perf_counter() - start))
    return found


# --- showing ---------------------------------------------------------------------------------------------------------


def tables_of(measured: Measured) -> list[Table]:
    return [_overview(measured), _per_byte(measured), _per_character(measured), *_premium(measured)]


def _overview(measured: Measured) -> Table:
    rows = []
    for name, of_language in measured.found.items():
        results = list(of_language.values())
        tokens, size = sum(r.num_tokens for r in results), sum(r.num_bytes for r in results)
        base = sum(r.num_tokens for r in measured.found[measured.baseline].values())
        kinds = {result.round_trip for result in results}
        worst = next(kind for kind in ("lossy", "NFC", "exact") if kind in kinds)
        speed = sorted(measured.mb_per_s[name])
        text = f"{median(speed):.1f} [{speed[0]:.1f}, {speed[-1]:.1f}]"
        rows.append((
            text_cell(name), number_cell(measured.sizes[name], 0), number_cell(tokens, 0),
            number_cell(tokens / size, 4), number_cell(size / tokens, 2), number_cell(tokens / base, 3),
            text_cell(worst, tone="bad" if worst == "lossy" else ""),
            Cell(text=text, value=median(speed), low=speed[0], high=speed[-1], n=len(speed)),
        ))  # fmt: skip
    columns = ("tokenizer", "vocabulary", "tokens", "per byte", "bytes/token", "relative", "round trip", "MB/s")
    notes = (
        f"relative: tokens over those of {measured.baseline}; all languages together, by their bytes.",
        "round trip: decoding gives the text exactly, its NFC form, or not (lossy). MB/s: median [min, max].",
    )
    return Table(name="tokens", title="Tokenizers", columns=columns, rows=tuple(rows), notes=notes)


def _per_byte(measured: Measured) -> Table:
    """Tokens per byte, and for every tokenizer but the baseline its size relative to that."""
    names = list(measured.found)
    others = [name for name in names if name != measured.baseline]
    rows = tuple(
        (
            text_cell(language), number_cell(measured.found[names[0]][language].num_bytes, 0),
            *(number_cell(measured.found[name][language].per_byte, 4) for name in names),
            *(number_cell(measured.relative[name][language], 3) for name in others),
        )
        for language in measured.languages
    )  # fmt: skip
    columns = ("language", "bytes", *names, *(f"{name} / {measured.baseline}" for name in others))
    return Table(name="tokens-byte", title="Tokens per byte of UTF-8", columns=columns, rows=rows)


def _per_character(measured: Measured) -> Table:
    names = list(measured.found)
    rows = tuple(
        (
            text_cell(language), number_cell(measured.found[names[0]][language].num_characters, 0),
            *(number_cell(measured.found[name][language].per_character, 3) for name in names),
        )
        for language in measured.languages
    )  # fmt: skip
    columns = ("language", "characters", *names)
    return Table(name="tokens-character", title="Tokens per character", columns=columns, rows=rows)


def _premium(measured: Measured) -> list[Table]:
    """What a language costs more than English, for the same content."""
    if not measured.is_parallel or REFERENCE not in measured.languages:
        return []
    names = list(measured.found)
    english = {name: measured.found[name][REFERENCE].num_tokens for name in names}
    rows = tuple(
        (
            text_cell(language),
            *(number_cell(measured.found[name][language].num_tokens / english[name], 2) for name in names),
        )
        for language in measured.languages
    )
    title = "Tokens of the same text, relative to English"
    return [Table(name="tokens-language", title=title, columns=("language", *names), rows=rows)]


def plot(measured: Measured, form: str) -> bytes:
    """Tokens per byte by language; relative to the baseline where there are several tokenizers."""
    from qwen_eval.figures import bars

    if len(measured.found) == 1:
        series = {n: {lang: row.per_byte for lang, row in found.items()} for n, found in measured.found.items()}
        return bars(series, form, y="tokens per byte")
    return bars(measured.relative, form, y=f"tokens relative to {measured.baseline}")
