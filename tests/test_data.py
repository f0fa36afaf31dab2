"""Rows: read as they stand, refused in one line when they cannot be, drawn fairly."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from qwen_eval.__main__ import main as evaluate
from qwen_eval.config import TaskSpec
from qwen_eval.core import ConfigError, DataError, Sample
from qwen_eval.data import sources as data
from qwen_eval.data.files import files_at
from qwen_eval.data.rows import Source
from qwen_eval.data.sources import draw, open_source
from qwen_eval.report.__main__ import main as report

COLUMNS = ("question", "A", "B", "answer")


def source(folder: Path, **files: bytes | str) -> Source:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Source(f"path:{folder}", files_at(folder))


# --- csv -----------------------------------------------------------------------------------------------------------


def test_cells_stay_as_they_stand(tmp_path: Path) -> None:
    rows = source(tmp_path, q__csv="Who?,None,007,A\nNA,4,,B\n").table("q.csv", columns=COLUMNS, header=False)
    assert [row.cells for row in rows] == [
        {"question": "Who?", "A": "None", "B": "007", "answer": "A"},
        {"question": "NA", "A": "4", "B": "", "answer": "B"},
    ]


def test_the_official_scripts_see_what_pandas_guesses(tmp_path: Path) -> None:
    text = "Who?,None,007,A\nNA,4,,B\n"
    rows = source(tmp_path, q__csv=text).table("q.csv", columns=COLUMNS, header=False, as_pandas=True)
    assert [row.cells for row in rows] == [
        {"question": "Who?", "A": "nan", "B": "7.0", "answer": "A"},
        {"question": "nan", "A": "4.0", "B": "nan", "answer": "B"},
    ]


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path: Path) -> None:
    text = b'\xef\xbb\xbfquestion,A,B,answer\r\n"two\nlines",x,y,A\r\n'
    (row,) = source(tmp_path, q__csv=text).table("q.csv", columns=COLUMNS, header=True)
    assert row.cells == {"question": "two\nlines", "A": "x", "B": "y", "answer": "A"}
    assert row.where == "q.csv line 3"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "q.csv: empty"),
        (b"\n\n", "q.csv: empty"),
        (b"question,A,B,answer\n", "q.csv: no rows"),
        (b"question,A,answer\nx,y,A\n", "q.csv: no column B; found question, A, answer"),
        (b"question,A,B,answer\nx,y,z,A\nx,y\n", "q.csv line 3: 2 columns, 4 expected"),
        (b"question,A,B,answer\n\xff\xfe,y,z,A\n", "q.csv: not UTF-8 at byte 20"),
    ],
)
def test_a_damaged_csv_is_refused_with_file_and_line(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(DataError) as error:
        source(tmp_path, q__csv=content).table("q.csv", columns=COLUMNS, header=True)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_csv_with_and_without_header(tmp_path: Path) -> None:
    rows = source(tmp_path, q__csv="a,b\n1,NA\n")
    assert rows.csv("q.csv", header=True) == [{"a": "1", "b": "NA"}]
    assert rows.csv("q.csv", header=False) == [["a", "b"], ["1", "NA"]]


# --- json ----------------------------------------------------------------------------------------------------------


def test_jsonl_plain_and_packed_are_the_same_rows(tmp_path: Path) -> None:
    text = '{"a": 1}\n\n{"a": "\u2028"}\n'
    rows = source(tmp_path, a__jsonl=text, b__jsonl__gz=gzip.compress(text.encode()))
    assert rows.jsonl("missing.jsonl", "a.jsonl") == [{"a": 1}, {"a": "\u2028"}] == rows.jsonl("b.jsonl.gz")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a.jsonl: empty"),
        (b'{"a": 1}\n{"a": \n', "a.jsonl line 2: not JSON"),
        (b"[1]\n", "a.jsonl line 1: list, an object expected"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-6], "a.jsonl: cannot be read"),
    ],
)
def test_damaged_jsonl_is_refused_with_file_and_line(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*$") as error:
        source(tmp_path, a__jsonl=content).jsonl("a.jsonl")
    assert says in str(error.value)


# --- where rows come from ------------------------------------------------------------------------------------------


def test_a_folder_and_its_archives_hold_the_same_rows(tmp_path: Path) -> None:
    folder = tmp_path / "exam"
    (folder / "dev").mkdir(parents=True)
    (folder / "dev" / "law.csv").write_text("x,y,z,A\n")
    with zipfile.ZipFile(tmp_path / "exam.zip", "w") as archive:
        archive.write(folder / "dev" / "law.csv", "dev/law.csv")
    with tarfile.open(tmp_path / "exam.tar.gz", "w:gz") as tar:
        tar.add(folder / "dev", "./dev")
    digests = set()
    for name in ("exam", "exam.zip", "exam.tar.gz"):
        rows = Source(name, files_at(tmp_path / name))
        assert rows.names("dev/*.csv") == ["dev/law.csv"]
        assert rows.csv("dev/law.csv", header=False) == [["x", "y", "z", "A"]]
        digests.add(rows.sha256)
    assert len(digests) == 1


def test_the_digest_covers_what_was_read_in_any_order(tmp_path: Path) -> None:
    first, second = (source(tmp_path, a__txt="1", b__txt="2") for _ in range(2))
    first.text("a.txt"), first.text("b.txt"), second.text("b.txt"), second.text("a.txt")
    assert first.sha256 == second.sha256
    assert source(tmp_path, a__txt="1").sha256 != first.sha256  # nothing read yet
    changed = source(tmp_path, a__txt="1", b__txt="3")
    changed.text("a.txt"), changed.text("b.txt")
    assert changed.sha256 != first.sha256


def test_one_file_stands_for_names_of_its_kind_only(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"a": 1}\n')
    rows = Source("path:mine.jsonl", files_at(tmp_path / "mine.jsonl"))
    assert rows.jsonl("test.jsonl") == [{"a": 1}]
    assert rows.has("train.csv") is None


def test_a_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no a.jsonl or b.jsonl there; pass task.path="):
        source(tmp_path).jsonl("a.jsonl", "b.jsonl")


def test_a_missing_path_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(TaskSpec(name="x", path=str(tmp_path / "nowhere")), bundled="x")


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.tar").write_bytes(io.BytesIO(b"not a tar").getvalue())
    with pytest.raises(DataError, match="cannot be read as an archive"):
        open_source(TaskSpec(name="x", path=str(tmp_path / "data.tar")), bundled="x")


def test_an_unknown_kind_of_data_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean bundled"):
        open_source(TaskSpec(name="x", data="bundeld"), bundled="x")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for key in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_the_bundled_sample_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "samples" / "exam").mkdir(parents=True)
    monkeypatch.setattr(data, "SAMPLES", tmp_path / "samples")
    found = open_source(TaskSpec(name="exam", hub_id="someone/exam"), bundled="exam")
    assert (found.origin, found.is_bundled) == ("bundled:exam", True)
    assert "bundled sample" in caplog.text


@pytest.mark.usefixtures("no_hub")
def test_a_sample_in_place_of_the_benchmark_is_told_everywhere(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CI with quiet=true and no network must not take its number for one of the benchmark."""
    monkeypatch.chdir(tmp_path)
    data._warn_once.cache_clear()
    for name in ("a", "b"):
        assert evaluate(["task=mmlu", "model=qwen-nano", "engine=fake", "limit=4", "quiet=true", f"tag={name}"]) == 0
        assert capsys.readouterr().out.endswith(", bundled sample\n")
    assert [record.message.count("scoring the small bundled sample") for record in caplog.records] == [1]
    a, b = (f"runs/eval/mmlu/qwen-nano/{name}" for name in "ab")
    words = "mmlu: of the sample in the package"
    for arguments, said in (
        ([f"runs={a}", "layout=models"], "mmlu: the sample in the package"),
        ([f"compare={a},{b}"], words),
        ([f"accept={a}", "gate=base"], "(new), of the sample in the package"),
        ([f"runs={a}", "gate=base"], words),
    ):
        assert report(arguments) == 0
        assert said in capsys.readouterr().out


@pytest.mark.usefixtures("no_hub")
def test_an_unreachable_hub_is_one_line_that_says_how_to_get_the_file() -> None:
    with pytest.raises(DataError, match=r"^hub:someone/exam: the hub does not answer[^\n]*task.path="):
        open_source(TaskSpec(name="exam", hub_id="someone/exam", data="hub"), bundled="exam")


# --- draw ----------------------------------------------------------------------------------------------------------


def items(**sizes: int) -> list[Sample]:
    return [Sample(id=f"{group}/{i}", group=group) for group, n in sizes.items() for i in range(n)]


def test_a_smaller_draw_is_part_of_a_larger_one() -> None:
    samples = items(law=37, physics=101, art=5)
    draws = [{s.id for s in draw(samples, limit, seed=7)} for limit in range(1, 144)]
    assert [len(d) for d in draws] == list(range(1, 144))
    assert all(small < large for small, large in itertools.pairwise(draws))


def test_every_group_has_its_share_and_the_order_stays() -> None:
    samples = items(law=30, physics=100, art=10)
    drawn = draw(samples, 70, seed=1234)
    assert all(abs(n - 70 * size / 140) <= 1 for n, size in zip(_counts(drawn), (30, 100, 10)))
    assert drawn == [s for s in samples if s in drawn]
    assert draw(drawn, 70, seed=1234) == drawn


def _counts(samples: list[Sample]) -> list[int]:
    counts = Counter(s.group for s in samples)
    return [counts[g] for g in ("law", "physics", "art")]


def test_the_seed_alone_decides() -> None:
    samples = items(law=50, physics=50)
    assert draw(samples, 10, seed=1) == draw(samples, 10, seed=1) != draw(samples, 10, seed=2)


def test_small_draws_do_not_prefer_large_groups() -> None:
    samples = items(law=10, physics=90)
    first = Counter(draw(samples, 1, seed=seed)[0].group for seed in range(400))
    assert 15 <= first["law"] <= 70  # a tenth of the items: 40 expected


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=r"task\.limit"):
        draw(items(law=3), limit, seed=1)


def test_no_limit_is_everything() -> None:
    samples = items(law=3)
    assert draw(samples, None, seed=1) == samples == draw(samples, 99, seed=1)
    assert json.dumps([s.id for s in samples]) == '["law/0", "law/1", "law/2"]'
