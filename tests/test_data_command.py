"""`python -m qwen_eval.data`: rows and checkpoints from a hub, what is printed of them, and runs that use them."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet
from scripted_hub import ScriptedHub, serving, use

from qwen_eval import cli
from qwen_eval.__main__ import main as evaluate
from qwen_eval.config import TaskSpec
from qwen_eval.core import DataError
from qwen_eval.data.__main__ import main
from qwen_eval.data.catalogue import CARDS
from qwen_eval.data.sources import SAMPLES, open_source
from qwen_eval.hubs import snapshots
from qwen_eval.models.hub import asset_dir
from qwen_eval.runs import preview_command
from qwen_eval.tasks.registry import OWN, TaskContext, build, task_class

GSM8K = [json.loads(line) for line in (SAMPLES / "gsm8k" / "test.jsonl").read_text().splitlines()[:3]]
PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedHub]:
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        use(server.url, tmp_path, monkeypatch)
        yield server
    snapshots.forget()


def table(rows: Sequence[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


def publish_gsm8k(hub: ScriptedHub, rows: Sequence[dict[str, Any]] = GSM8K, **revision: str) -> bytes:
    """On both hubs, each under its own name."""
    data = table(rows)
    for name in ("openai/gsm8k", "AI-ModelScope/gsm8k"):
        hub.publish(f"datasets/{name}", {"main/test-00000-of-00001.parquet": data, "README.md": b"-"}, **revision)
    return data


def samples(name: str, **keys: Any) -> list[str]:
    spec = task_class(name).Spec(**{"name": name, "data": "hub", **keys})
    return [sample.id for sample in build(spec, TaskContext()).samples()]


# --- what is known of each benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_every_task_is_in_the_catalogue_and_on_the_page(name: str) -> None:
    card = CARDS[name]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    for fact in (card.licence, card.rows, card.hub_id, card.modelscope_id, *card.layout, card.source.split()[0]):
        assert fact is None or fact in row, (name, fact)


@pytest.mark.parametrize("name", OWN)
def test_the_hub_of_the_catalogue_is_that_of_the_task(name: str) -> None:
    keys = yaml.safe_load((cli.conf_dir() / "task" / f"{name}.yaml").read_text())
    assert keys.get("hub_id", task_class(name).Spec(name=name).hub_id) == (CARDS[name].hub_id or None)


def test_no_card_is_of_a_task_that_is_gone() -> None:
    assert set(CARDS) == set(OWN)


# --- get -----------------------------------------------------------------------------------------------------------


def test_get_says_what_came_and_a_run_reads_it_offline(
    hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = publish_gsm8k(hub)
    commit = hub.repositories["datasets/openai/gsm8k"]["main"].commit
    assert main(["get", "gsm8k"]) == 0
    said = capsys.readouterr().out
    assert "gsm8k: openai/gsm8k from the Hugging Face hub; licence: MIT" in said
    assert f"1 file, {len(data):,} bytes, revision {commit}" in said
    assert f"sha256 {hashlib.sha256(data).hexdigest()}" in said
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.seen.clear()
    assert samples("gsm8k") == ["test/0", "test/1", "test/2"]
    assert hub.seen == []


def test_rows_of_modelscope_are_read_from_the_printed_directory(
    hub: ScriptedHub, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_gsm8k(hub)
    assert main(["get", "gsm8k", "hub=modelscope"]) == 0
    said = capsys.readouterr().out
    (place,) = [line.strip().removeprefix("in ") for line in said.splitlines() if line.startswith("  in ")]
    assert samples("gsm8k", path=place) == ["test/0", "test/1", "test/2"] == samples("gsm8k")


def test_a_broken_download_is_resumed(hub: ScriptedHub) -> None:
    publish_gsm8k(hub)
    hub.num_cut = 1
    assert main(["get", "gsm8k"]) == 0


def test_every_subject_of_an_exam_is_fetched_at_once(hub: ScriptedHub) -> None:
    row = {"question": "Q?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}
    names = [f"{subject}/{split}-00000-of-00001.parquet" for subject in ("anatomy", "law") for split in ("test", "dev")]
    files = dict.fromkeys(names, table([row] * 5)) | {"auxiliary_train/train-00000-of-00001.parquet": b"large"}
    hub.publish("datasets/cais/mmlu", files)
    assert main(["get", "mmlu"]) == 0
    assert not [line for line in hub.seen if "auxiliary_train" in line]
    num_before = len(hub.seen)
    assert len(samples("mmlu", subjects=["anatomy"], shots=5)) == 5
    assert len(hub.seen) <= num_before + 3  # that the copy is up to date, not one request a file


def test_an_official_archive_is_read_as_it_is(hub: ScriptedHub) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for split in ("val", "dev"):
            archive.writestr(f"{split}/law_{split}.csv", "id,question,A,B,C,D,answer\n" + "0,问?,甲,乙,丙,丁,B\n" * 5)
    hub.publish("datasets/ceval/ceval-exam", {"ceval-exam.zip": stream.getvalue()})
    assert main(["get", "ceval"]) == 0
    assert len(samples("ceval", subjects=["law"])) == 5


def test_a_revision_is_pinned(hub: ScriptedHub, capsys: pytest.CaptureFixture[str]) -> None:
    publish_gsm8k(hub)
    publish_gsm8k(hub, GSM8K[:1], revision="v2")
    assert main(["get", "gsm8k", "revision=v2"]) == 0
    assert "task.revision=v2" in capsys.readouterr().out
    assert (samples("gsm8k", revision="v2"), len(samples("gsm8k"))) == (["test/0"], 3)


def test_what_needs_no_hub_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "humaneval", "nano", "model=qwen-nano"]) == 0
    assert [line.split(";")[0] for line in capsys.readouterr().out.splitlines()] == [
        "humaneval: nothing to fetch", "nano: nothing to fetch", "qwen-nano: nothing to fetch",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["get"], "name tasks or model="),
        (["fetch", "mmlu"], "one of get, list"),
        (["get", "mmul"], 'did you mean "mmlu"'),
        (["get", "model=qwen-7b-chatt"], 'did you mean "qwen-7b-chat"'),
        (["get", "mmlu", "hub=hugging"], "one of huggingface, modelscope"),
        (["get", "mmlu", "ceval", "revision=v1"], "revision=v1: a revision is one repository's"),
        (["get", "cmmlu", "hub=modelscope"], "no copy of cmmlu is known there"),
        (["get", "--force", "mmlu"], "--force: no such option"),
        (["get", "mmlu", "revisoin=v1"], "revisoin"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"status": 500}, "answers with status 500"),
        ({"status": 429}, "asks to wait"),
        ({"gated": {"datasets/openai/gsm8k"}}, "accept its licence"),
        ({"spoiled": {"main/test-00000-of-00001.parquet"}}, "it was removed, fetch it again"),
        ({"repositories": {}}, "the hub has no such dataset"),
    ],
)
def test_a_failing_hub_is_one_line_and_the_others_are_fetched(
    fault: dict[str, Any], says: str, hub: ScriptedHub, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_gsm8k(hub)
    for name, value in fault.items():
        setattr(hub, name, value)
    assert main(["get", "gsm8k", "nano"]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("openai/gsm8k")]
    assert says in line
    assert "nano: nothing to fetch" in said.out


def test_without_a_network_get_is_one_line(
    hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["get", "gsm8k"]) == 2
    assert capsys.readouterr().err == "openai/gsm8k: HF_HUB_OFFLINE is set and no copy is cached\n"


def test_a_file_that_was_damaged_in_the_cache_is_found_by_get(
    hub: ScriptedHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = publish_gsm8k(hub)
    assert main(["get", "gsm8k"]) == 0
    (blob,) = [path for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.stat().st_size == len(data)
               and not path.is_symlink()]  # fmt: skip
    blob.chmod(0o644)
    blob.write_bytes(data[:-1] + b"x")
    assert main(["get", "gsm8k"]) == 2
    assert "it was removed, fetch it again" in capsys.readouterr().err
    assert main(["get", "gsm8k"]) == 0


def test_list_says_what_is_here(hub: ScriptedHub, capsys: pytest.CaptureFixture[str]) -> None:
    publish_gsm8k(hub)
    main(["get", "gsm8k"])
    capsys.readouterr()
    assert main(["list"]) == 0
    rows = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert (rows["gsm8k"], rows["mmlu"]) == ("yes", "no")


# --- runs ----------------------------------------------------------------------------------------------------------


def test_missing_rows_name_the_page_and_the_command(hub: ScriptedHub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qwen_eval\.data get mmlu.*docs/data\.md"):
        samples("mmlu", path=str(tmp_path))
    with pytest.raises(DataError, match=r"qwen_eval\.data get gsm8k.*docs/data\.md"):
        samples("gsm8k")  # the scripted hub has none


def test_a_hub_in_trouble_is_never_replaced_by_the_sample(hub: ScriptedHub) -> None:
    hub.status = 500
    with pytest.raises(DataError, match="answers with status 500"):
        open_source(TaskSpec(name="gsm8k", hub_id="openai/gsm8k"), bundled="gsm8k")


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        (("task=gsm8k",), "test.jsonl"),
        (("task=csv",), "rows.csv"),
    ],
)
def test_a_file_and_its_folder_are_the_same_rows(
    keys: tuple[str, ...], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    text = (
        (SAMPLES / "gsm8k" / "test.jsonl").read_text() if place.endswith("jsonl") else "question,A,B,answer\n1?,x,y,B\n"
    )
    (tmp_path / "rows" / place).write_text(text)
    arguments = [*keys, "engine=fake", "model=qwen-nano", "limit=1", "run_dir=run"]
    assert evaluate([*arguments, f"task.path=rows/{place}"]) == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    capsys.readouterr()
    assert evaluate([*arguments, "task.path=rows"]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").read_bytes() == before


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_hub_is_evaluated_by_its_name(
    hub: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish_folder("models/org/tiny", asset_dir("qwen-nano"))
    arguments = ["task=nano", "model.path=org/tiny", "limit=2", "task.max_new_tokens=2"]
    assert preview_command.main([*arguments, "samples=1"]) == 0, capsys.readouterr().err
    assert not [line for line in hub.seen if "safetensors" in line]  # a preview needs no weights
    assert evaluate(arguments) == 0, capsys.readouterr().err
    (result,) = tmp_path.glob("runs/eval/nano/tiny/*/result.json")
    before = result.read_bytes()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert evaluate(arguments) == 0, capsys.readouterr().err  # found again without a network
    assert result.read_bytes() == before


@pytest.mark.parametrize("which", ["huggingface", "modelscope"])
def test_get_fetches_a_checkpoint(which: str, hub: ScriptedHub, capsys: pytest.CaptureFixture[str]) -> None:
    files = hub.publish_folder("models/org/tiny", asset_dir("qwen-nano")).files
    hub.repositories.clear()
    hub.publish("models/org/tiny", {"modeling.py": b"evil()", **files})
    assert main(["get", "model=org/tiny", f"hub={which}"]) == 0
    said = capsys.readouterr().out
    weights = files["model.safetensors"]
    assert f"model.safetensors  {len(weights):,} bytes  sha256 {hashlib.sha256(weights).hexdigest()}" in said
    assert "model.path=org/tiny" in said
    assert "modeling.py" not in said + " ".join(hub.seen)


def test_a_path_that_is_neither_here_nor_on_the_hub_says_both(
    hub: ScriptedHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(["task=nano", "model.path=org/tyni"]) == 2
    err = capsys.readouterr().err
    assert (
        "model.path=org/tyni: no such directory is here; as a hub id, model.hub_id=org/tyni: the hub has no such" in err
    )
    assert err.count("\n") == 1
