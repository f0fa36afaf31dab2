"""Tokens per byte by language: counts are the tokenizers' own, the text comes back, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_gsm8k import DATA

from qwen_eval.core import ConfigError, DataError, ModelError
from qwen_eval.models.hub import asset_dir
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.profile.tokens import TokensSpec, compare, main, measure, tables_of, texts_of


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "en.txt").write_text("All human beings are born free.", encoding="utf-8")
    (folder / "fr.txt").write_text("ne\u0301s libres", encoding="utf-8")  # decomposed: Qwen's NFC joins it
    return folder


def test_the_declaration_is_there_in_twenty_languages_and_the_vocabulary_gives_it_back() -> None:
    measured = measure(TokensSpec(repetitions=1))
    found = measured.found["qwen-nano"]
    assert len(found) == 20
    assert {result.round_trip for result in found.values()} <= {"exact", "NFC"}
    tokenizer = load_tokenizer(asset_dir("qwen-nano"))
    for language, text in texts_of(TokensSpec()).items():
        assert found[language].num_tokens == len(tokenizer.encode(text)), language
        assert found[language].num_bytes == len(text.encode("utf-8"))
    assert found["en"].per_byte < found["th"].per_byte  # qwen-nano learned from English and Chinese
    assert measured.relative["qwen-nano"] == dict.fromkeys(found, 1.0)


def test_the_published_vocabulary_needs_fewer_tokens_than_the_miniature_everywhere() -> None:
    measured = measure(TokensSpec(tokenizers=[str(DATA), "qwen-nano"], repetitions=2))
    ratios = measured.relative["qwen-nano"]
    assert min(ratios.values()) > 1.5
    assert measured.sizes == {DATA.name: 151_851, "qwen-nano": 4_096}
    assert all(len(values) == 2 and min(values) > 0 for values in measured.mb_per_s.values())
    assert [table.name for table in tables_of(measured)] == [
        "tokens",
        "tokens-byte",
        "tokens-character",
        "tokens-language",
    ]


def test_a_text_of_ones_own_and_what_normalising_changes(texts: Path) -> None:
    measured = measure(TokensSpec(text=str(texts), repetitions=1))
    assert {language: result.round_trip for language, result in measured.found["qwen-nano"].items()} == {
        "en": "exact", "fr": "NFC",
    }  # fmt: skip
    english = measured.found["qwen-nano"]["en"]
    assert (english.num_bytes, english.num_characters) == (31, 31)
    assert [table.name for table in tables_of(measured)] == ["tokens", "tokens-byte", "tokens-character"]


def test_a_directory_with_tokenizer_json_stands_beside_and_may_lose_text(texts: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "All": 1, "human": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    measured = measure(
        TokensSpec(tokenizers=["qwen-nano", str(folder)], text=str(texts), baseline="words", repetitions=1)
    )
    assert measured.found["words"]["en"].num_tokens == 7
    assert measured.found["words"]["en"].round_trip == "lossy"
    assert measured.relative["qwen-nano"]["en"] == measured.found["qwen-nano"]["en"].num_tokens / 7


def test_files_are_written_by_their_endings(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = [str(tmp_path / name) for name in ("t.json", "t.svg", "t.csv")]
    compare(TokensSpec(text=str(texts), repetitions=1, out=out))
    tables = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert "tokens-byte" in json.dumps(tables)
    assert (tmp_path / "t.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert "Tokens per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ({"tokenizers": ["qwen-giant"]}, ModelError, "not in this package"),
        ({"tokenizers": ["no/such"]}, ModelError, "no such directory"),
        ({"tokenizers": ["qwen-nano", "qwen-nano"]}, ConfigError, "each once"),
        ({"text": "no/such"}, DataError, "no directory with .txt files"),
        ({"languages": ["xx"]}, ConfigError, "no such text"),
        ({"baseline": "other"}, ConfigError, "not among"),
        ({"repetitions": 0}, ConfigError, "at least 1"),
    ],
)
def test_mistakes_are_named(spec: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        measure(TokensSpec(**spec))  # type: ignore[arg-type]


def test_the_command_takes_bare_lists_and_refuses_unknown_endings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["languages=en,zh", "repetitions=1"]) == 0
    assert "en" in capsys.readouterr().out
    assert main(["out=tokens.doc"]) == 2
    assert "must end in one of" in capsys.readouterr().err
