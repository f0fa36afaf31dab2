"""Repositories on a hub: fetched whole, resumed, checked, found again without a network; faults are one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_hub import ScriptedHub, serving, use

from qwen_eval.hubs import snapshots
from qwen_eval.hubs.repository import HubError, Repository

WEIGHTS = bytes(range(256)) * 1000
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"twice", "README.md": b"# read me"}
HUBS = ("huggingface", "modelscope")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedHub]:
    with serving() as server:
        use(server.url, tmp_path, monkeypatch)
        server.publish("models/org/tiny", FILES)
        yield server
    snapshots.forget()


def tiny(hub: str = "huggingface", *, name: str = "org/tiny", revision: str | None = None) -> Repository:
    return Repository(id=name, hub=hub, revision=revision, wanted=lambda _: ["*.json", "*.safetensors"])


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix}


@pytest.mark.parametrize("which", HUBS)
def test_the_wanted_files_are_fetched_once_and_found_without_the_hub(
    which: str, hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshots.fetch(tiny(which))
    assert {"config.json", "model.safetensors"} == names(folder)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    hub.seen.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert snapshots.fetch(tiny(which)) == folder == snapshots.cached(tiny(which))
    assert hub.seen == []


@pytest.mark.parametrize("which", HUBS)
def test_a_broken_body_is_resumed_where_it_broke(which: str, hub: ScriptedHub) -> None:
    large = WEIGHTS * 100  # its half is more than the clients write at once
    hub.publish("models/org/large", {"model.safetensors": large})
    hub.num_cut = 1
    folder = snapshots.fetch(tiny(which, name="org/large"))
    assert (folder / "model.safetensors").read_bytes() == large
    assert [span for span in hub.ranges if not span.startswith("bytes=0-")]


@pytest.mark.parametrize("which", HUBS)
def test_a_wrong_digest_is_refused_and_the_file_removed(which: str, hub: ScriptedHub, tmp_path: Path) -> None:
    hub.spoiled = {"model.safetensors"}
    with pytest.raises(HubError, match="fetch it again") as error:
        snapshots.fetch(tiny(which))
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(WEIGHTS)]
    assert which == "modelscope" or snapshots.cached(tiny(which)) is None
    hub.spoiled = set()
    assert (snapshots.fetch(tiny(which)) / "model.safetensors").read_bytes() == WEIGHTS


def test_small_files_are_checked_by_the_id_of_their_blob(hub: ScriptedHub) -> None:
    hub.spoiled = {"config.json"}
    with pytest.raises(HubError, match=r"^config\.json: digest"):
        snapshots.fetch(tiny())


def test_a_revision_is_fetched_beside_the_default_one(hub: ScriptedHub) -> None:
    hub.publish("models/org/tiny", {**FILES, "config.json": b'{"a": 1}'}, revision="v2")
    assert (snapshots.fetch(tiny(revision="v2")) / "config.json").read_bytes() == b'{"a": 1}'
    assert (snapshots.fetch(tiny()) / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("which", HUBS)
@pytest.mark.parametrize(
    ("repository", "says"),
    [
        ({"name": "org/absent"}, "the hub has no such model"),
        ({"revision": "v9"}, "no (such )?revision"),
    ],
)
def test_what_is_not_there_is_said(which: str, repository: dict[str, str], says: str, hub: ScriptedHub) -> None:
    with pytest.raises(HubError, match=says) as error:
        snapshots.fetch(tiny(which, **repository))
    assert not error.value.is_passing


def test_a_gated_repository_says_what_to_do(hub: ScriptedHub) -> None:
    hub.gated = {"models/org/tiny"}
    with pytest.raises(HubError, match="accept its licence"):
        snapshots.fetch(tiny())


@pytest.mark.parametrize("which", HUBS)
@pytest.mark.parametrize(("status", "says"), [(500, "answers with status 500"), (429, "asks to wait")])
def test_a_hub_in_trouble_is_named_unless_a_copy_is_cached(
    which: str, status: int, says: str, hub: ScriptedHub
) -> None:
    hub.status = status
    with pytest.raises(HubError, match=says) as error:
        snapshots.fetch(tiny(which))
    assert (error.value.is_passing, error.value.is_silent) == (True, False)
    hub.status = None
    folder = snapshots.fetch(tiny(which))
    hub.status = status
    assert snapshots.fetch(tiny(which)) == folder


@pytest.mark.parametrize("which", HUBS)
def test_a_dead_hub_is_not_asked_again_for_each_repository(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(HubError, match="cannot be reached") as first:
        snapshots.fetch(tiny(which))
    with pytest.raises(HubError) as second:
        snapshots.fetch(tiny(which, name="org/other"))
    assert first.value is second.value
    assert first.value.is_silent


def test_a_repository_without_a_wanted_file_is_refused(hub: ScriptedHub) -> None:
    with pytest.raises(HubError, match=r"no file there is named \*\.gguf"):
        snapshots.fetch(Repository(id="org/tiny", wanted=lambda _: ["*.gguf"]))


def test_a_fetch_that_was_interrupted_is_no_copy(hub: ScriptedHub) -> None:
    few = Repository(id="org/tiny", wanted=lambda _: ["*.json"])
    snapshots.fetch(few)
    assert snapshots.cached(few) is not None
    assert snapshots.cached(tiny()) is None
