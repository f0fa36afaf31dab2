"""A finished run is returned only for the very checkpoint or server that it was made with."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import toy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_tiny_qwen2

from qwen_eval.__main__ import main
from qwen_eval.config import EvalSpec, ModelSpec, check
from qwen_eval.core import ModelError
from qwen_eval.engines.cache import EngineCache
from qwen_eval.models import fingerprint
from qwen_eval.models.fingerprint import directory_fingerprint
from qwen_eval.models.head import read_head
from qwen_eval.models.hub import ASSETS
from qwen_eval.profile.config import ProfileSpec
from qwen_eval.profile.grid import run_spec
from qwen_eval.quantize.__main__ import main as quantize
from qwen_eval.runs.store import differences

Command = Callable[..., tuple[int, str, str]]
ASKS = ("task=toy", "task.num=4", "task.max_new_tokens=2")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """A command line in an empty directory; (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    toy.register()

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main([*ASKS, *arguments])
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "qwen-nano", tmp_path / "nano"))


def change_every_weight(directory: Path, *, by: float = 1e-3) -> None:
    """Another fine-tune of one model: the same names, sizes and headers; sizes and times are put back."""
    file = directory / "model.safetensors"
    before = file.stat()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: tensor + by for name, tensor in load_file(file).items()}, file, metadata=metadata)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def digest_of(run: Path) -> str:
    return str(json.loads((run / "spec.json").read_text())["decides"]["weights"])


# --- the four ways to another model ----------------------------------------------------------------------------------


def test_another_checkpoint_under_the_same_name_is_rejected_with_both_digests(command: Command, nano: Path) -> None:
    other = Path(shutil.copytree(nano, nano.with_name("other")))
    change_every_weight(other)
    assert command("model=qwen-nano", "model.path=nano", "run_dir=r")[0] == 0
    code, _, error = command("model=qwen-nano", "model.path=other", "run_dir=r")
    assert code == 2
    assert error.count("\n") == 1
    for directory in (nano, other):
        assert directory_fingerprint(directory) in error
    assert "run_dir=DIR" in error
    assert "overwrite" not in error
    again = command("model=qwen-nano", "model.path=nano", "run_dir=r")
    assert "was finished before" in again[1]  # a link or a copy of what was run is what was run
    nano.rename(nano.with_name("moved"))
    nano.symlink_to("moved")
    assert "was finished before" in command("model=qwen-nano", "model.path=nano", "run_dir=r")[1]


def test_replaced_weights_of_the_same_size_and_time_are_another_checkpoint(command: Command, nano: Path) -> None:
    asks = ("model=qwen-nano", "model.path=nano", "run_dir=r")
    assert command(*asks)[0] == 0
    change_every_weight(nano)
    code, _, error = command(*asks)
    assert code == 2
    assert digest_of(nano.parent / "r") in error
    assert directory_fingerprint(nano) in error


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_every_engine_knows_its_checkpoint_again(command: Command, tmp_path: Path, engine: str) -> None:
    write_tiny_qwen2(tmp_path / "qwen2")
    asks = (f"engine={engine}", "model.path=qwen2", "model.dtype=fp32", "run_dir=r")
    assert command(*asks)[0] == 0
    assert digest_of(tmp_path / "r") == directory_fingerprint(tmp_path / "qwen2")
    assert "was finished before" in command(*asks)[1]
    change_every_weight(tmp_path / "qwen2")
    assert command(*asks)[0] == 2


def test_a_replaced_checkpoint_does_not_keep_its_old_engine(nano: Path) -> None:
    def cell() -> EvalSpec:
        return check(EvalSpec(task=toy.ToySpec(name="toy"), model=ModelSpec(name="m", path=str(nano), dtype="fp32")))

    engine_cache = EngineCache()
    first = engine_cache.open(cell())
    assert engine_cache.open(cell()) is first
    change_every_weight(nano)
    assert engine_cache.open(cell()) is not first
    engine_cache.close()


def test_the_command_that_quantize_prints_is_another_run(
    command: Command, nano: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("model=qwen-nano", "model.path=nano")[0] == 0
    given = ["model=qwen-nano", "model.path=nano", "group_size=64", "num_sequences=2", "sequence_tokens=64"]
    assert quantize([*given, "quiet=true"]) == 0
    printed = capfd.readouterr().out.splitlines()[-1].partition("python -m qwen_eval ")[2]
    code, said, error = command(*printed.split())
    assert code == 0, error
    assert "was finished before" not in said
    runs = sorted((nano.parent / "runs" / "eval" / "toy").iterdir())
    assert [run.name for run in runs] == ["qwen-nano", "qwen-nano-int4"]
    assert len({digest_of(run / "default") for run in runs}) == 2
    # and under the name of the original it is rejected, not recalled
    path = next(part for part in printed.split() if part.startswith("model.path="))
    assert command("model=qwen-nano", path)[0] == 2


class Endpoint(BaseHTTPRequestHandler):
    entry: dict[str, object]

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [self.entry]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "finish_reason": "stop", "text": "A"}
        choice["logprobs"] = {"top_logprobs": [{"A": -0.1, "B": -2.0}]}  # type: ignore[assignment]
        self._send({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})

    def _send(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[str], tuple[str, type[Endpoint]]]]:
    """Start a server whose model lies in `root`; its URL, and the class whose `entry` is its answer."""
    servers = []

    def start(root: str) -> tuple[str, type[Endpoint]]:
        handler = type("Handler", (Endpoint,), {"entry": {"id": "q", "root": root, "created": len(servers)}})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/v1", handler

    yield start
    for server in servers:
        server.shutdown()


def test_another_endpoint_under_the_same_model_name_is_rejected(
    command: Command, serve: Callable[[str], tuple[str, type[Endpoint]]]
) -> None:
    pytest.importorskip("httpx2")
    asks = (
        "engine=openai",
        "engine.api_model=q",
        "task.texts_only=true",
        "model=toy",
        "model.weights=checkpoint",
        "run_dir=r",
    )
    (url, handler), (other, _) = serve("/models/bf16"), serve("/models/bf16")
    code, _, error = command(*asks, f"engine.base_url={url}")
    assert code == 0, error
    handler.entry = {**handler.entry, "created": 99}  # the time of the request, with vLLM and llama.cpp
    assert "was finished before" in command(*asks, f"engine.base_url={url}/")[1]
    code, _, error = command(*asks, f"engine.base_url={other}")
    assert code == 2
    assert f"api:{url} q" in error
    assert f"api:{other} q" in error
    handler.entry = {**handler.entry, "root": "/models/int4"}  # another model at the same address
    code, _, error = command(*asks, f"engine.base_url={url}")
    assert code == 2
    assert "weights: api:" in error


def test_a_server_that_is_gone_is_not_what_was_run(
    command: Command, serve: Callable[[str], tuple[str, type[Endpoint]]]
) -> None:
    pytest.importorskip("httpx2")
    code, _, error = command(
        "engine=openai", "engine.api_model=q", "task.texts_only=true", "model=toy", "model.weights=checkpoint",
        "engine.base_url=http://127.0.0.1:9/v1",
    )  # fmt: skip
    assert code == 2
    assert "http://127.0.0.1:9/v1: no server answers" in error
    assert error.count("\n") == 1


def test_a_stored_head_is_read_of_the_checkpoint_that_was_run(nano: Path) -> None:
    spec, digest = ModelSpec(name="m", path=str(nano)), directory_fingerprint(nano)
    assert read_head(spec, fingerprint=digest).shape == (4096, 192)
    change_every_weight(nano)
    with pytest.raises(ModelError, match="is another checkpoint now"):
        read_head(spec, fingerprint=digest)


def test_measured_speed_is_of_the_checkpoint_at_hand(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(nano.parent)
    spec = ProfileSpec(model=ModelSpec(name="m", path="nano"))
    before = run_spec(spec)["decides"]
    assert before == run_spec(spec)["decides"]
    change_every_weight(nano)
    assert differences(before, run_spec(spec)["decides"])[0].startswith("weights: sample:")


# --- the fingerprint -------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that is sampled: small enough for a test, with the bound for whole files below it."""
    monkeypatch.setattr(fingerprint, "WHOLE_FILE_BYTES", 1 << 16)
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(0)
    sizes = {"embed": 1 << 20, "norm": 100, "layers.0.w": 300_000, "layers.1.w": 300_000}
    weights = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    save_file(weights, folder / "model.safetensors")
    torch.save(weights, folder / "extra.bin")
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "extra.bin"])
@pytest.mark.parametrize("name", ["embed", "norm", "layers.0.w", "layers.1.w"])
def test_one_changed_tensor_of_a_sampled_file_shows(large: Path, file: str, name: str) -> None:
    before, path = directory_fingerprint(large), large / file
    is_safe = path.suffix == ".safetensors"
    weights = load_file(path) if is_safe else torch.load(path)
    weights[name] = weights[name] + 1e-3
    if is_safe:
        save_file(weights, path)
    else:
        torch.save(weights, path)
    assert directory_fingerprint(large) != before


def test_at_least_4_kib_of_every_tensor_are_read(large: Path) -> None:
    path = large / "model.safetensors"
    with path.open("rb") as file:
        spans = fingerprint._safetensors_spans(file, path.stat().st_size)
    assert spans is not None
    header = spans[0][1]
    tensors = json.loads(path.read_bytes()[8:header])
    for row in tensors.values():
        start, end = (header + at for at in row["data_offsets"])
        assert sum(size for at, size in spans if start <= at < end) >= min(4096, end - start)
    assert sum(size for _, size in spans) < path.stat().st_size / 50


def test_every_byte_counts_in_full(large: Path) -> None:
    path = large / "model.safetensors"
    before = {is_full: directory_fingerprint(large, is_full=is_full) for is_full in (False, True)}
    assert [digest.partition(":")[0] for digest in before.values()] == ["sample", "full"]
    data = bytearray(path.read_bytes())
    data[-1_000_000] ^= 1
    path.write_bytes(data)
    assert directory_fingerprint(large) == before[False]  # one byte between the samples: what `full` is for
    assert directory_fingerprint(large, is_full=True) != before[True]


def test_every_byte_of_a_file_counts_whose_tensors_cannot_be_found(large: Path) -> None:
    """As torch wrote them before 1.6: a changed norm lies between any samples of such a file."""
    path = large / "extra.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    before, data = directory_fingerprint(large), path.read_bytes()
    for at in range(5_000, len(data), len(data) // 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert directory_fingerprint(large) != before
    path.write_bytes(data)
    assert directory_fingerprint(large) == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "vocab.txt", "chat_template.jinja"])
def test_what_the_engines_read_beside_the_weights_counts(large: Path, name: str) -> None:
    before = directory_fingerprint(large)
    (large / name).write_text('{"rope_theta": 1}')
    assert directory_fingerprint(large) != before


@pytest.mark.parametrize("name", ["README.md", "trainer_state.json", "optimizer.pt", "eval_results.json", ".gitignore"])
def test_what_no_engine_reads_does_not_count(large: Path, name: str) -> None:
    before = directory_fingerprint(large)
    (large / name).write_text("x")
    assert directory_fingerprint(large) == before


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x10" + b"\0" * 7 + b'{"a": 3}        ', b"[" * 200_000])
def test_a_damaged_file_has_a_fingerprint_too(large: Path, content: bytes) -> None:
    for name in ("model.safetensors", "extra.bin"):
        (large / name).write_bytes(content + b"x" * (1 << 17))
    before = directory_fingerprint(large)
    (large / "extra.bin").write_bytes(content + b"y" * (1 << 17))
    assert directory_fingerprint(large) != before


def test_only_what_was_read_by_itself_is_not_read_again(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the size and times of one read before, but changed since: the system's own change time tells."""
    monkeypatch.setattr(fingerprint, "SETTLED_NS", 0)
    path = large / "model.safetensors"
    before, times = directory_fingerprint(large), path.stat()
    reads: list[int] = []
    real = fingerprint._update
    monkeypatch.setattr(fingerprint, "_update", lambda *args: (reads.append(1), real(*args)))
    assert directory_fingerprint(large) == before
    assert not reads
    change_every_weight(large)
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert directory_fingerprint(large) != before
