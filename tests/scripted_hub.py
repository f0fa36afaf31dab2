"""A hub on loopback that speaks the protocols of the Hugging Face hub and of ModelScope, and fails as a test wants."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = (".parquet", ".safetensors", ".zip")  # kept with a sha256, other files with the id of git's blob


@dataclass(frozen=True, kw_only=True)
class Published:
    """One revision of a repository."""

    files: Mapping[str, bytes]

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(self.files.items()))).hexdigest()

    def facts(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"size": len(data), "blobId": blob, "lfs": large if name.endswith(LARGE) else None}

    def etag(self, name: str) -> str:
        facts = self.facts(name)
        return str(facts["lfs"]["sha256"] if facts["lfs"] else facts["blobId"])


class ScriptedHub(ThreadingHTTPServer):
    """`seen`: every request. What goes wrong: `status` of every answer, `num_cut` bodies that end half-way, `spoiled`
    files that come with another content than is stated, `gated` repositories."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Published]] = {}
        self.seen: list[str] = []
        self.ranges: list[str] = []
        self.status: int | None = None
        self.num_cut = 0
        self.spoiled: set[str] = set()
        self.gated: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, name: str, files: Mapping[str, bytes], *, revision: str = "main") -> Published:
        """`name`: "datasets/OWNER/NAME" or "models/OWNER/NAME". The first revision is also the default one."""
        published = Published(files=files)
        revisions = self.repositories.setdefault(name, {"master": published})
        revisions[revision] = revisions[published.commit] = published
        return published

    def publish_folder(self, name: str, folder: Path) -> Published:
        names = sorted(path for path in folder.rglob("*") if path.is_file())
        return self.publish(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in names})

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), {k: v[0] for k, v in parse_qs(parts.query).items()}
        self.server.seen.append(f"{self.command} {self.path}")
        if self.server.status is not None:
            self._send(b"{}", status=self.server.status, headers={"Retry-After": "0"})
        elif path.startswith("api/v1/"):
            self._modelscope(path.removeprefix("api/v1/"), query)
        elif path.startswith("api/"):
            self._api(path.removeprefix("api/"))
        else:
            self._resolve(path)

    # --- Hugging Face ---

    def _api(self, path: str) -> None:
        kind, owner, name, *rest = path.split("/")
        revision = "/".join(rest[1:]) if rest else "main"
        published = self._published(f"{kind}/{owner}/{name}", revision)
        if published is None:
            return
        if rest and rest[0] == "tree":
            rows = []
            for file in published.files:
                facts = published.facts(file)
                large = {**facts["lfs"], "oid": facts["lfs"]["sha256"]} if facts["lfs"] else None
                row = {"type": "file", "path": file, "size": facts["size"], "oid": facts["blobId"]}
                rows.append({**row, "lfs": large} if large else row)
            self._json(rows)
            return
        siblings = [{"rfilename": file, **published.facts(file)} for file in published.files]
        self._json({"id": f"{owner}/{name}", "sha": published.commit, "siblings": siblings})

    def _resolve(self, path: str) -> None:
        parts = path.split("/")
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        owner, name, _, revision, *file = parts
        published = self._published(f"{kind}/{owner}/{name}", revision)
        if published is None:
            return
        found = "/".join(file)
        if found not in published.files:
            self._send(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{published.etag(found)}"', "X-Repo-Commit": published.commit}
        if found.endswith(LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(published.files[found]))}
        self._file(found, published.files[found], headers)

    def _published(self, name: str, revision: str) -> Published | None:
        """None after an answer that there is no such thing."""
        revisions = self.server.repositories.get(name)
        if name in self.server.gated:
            self._send(b"{}", status=403, headers={"X-Error-Code": "GatedRepo"})
        elif revisions is None:
            self._send(b"{}", status=401, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in revisions:
            self._send(b"{}", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return revisions[revision]
        return None

    # --- ModelScope ---

    def _modelscope(self, path: str, query: Mapping[str, str]) -> None:
        kind, owner, name, *rest = path.split("/")
        revisions = self.server.repositories.get(f"{kind}/{owner}/{name}", {})
        published = revisions.get(query.get("Revision", "master"))
        if published is None or rest[:1] != ["repo"]:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
        elif len(rest) == 1:
            data = published.files.get(query["FilePath"])
            if data is None:
                self._json({"Code": 404, "Message": "not found", "Success": False}, status=404)
            else:
                self._file(query["FilePath"], data, {})
        else:
            rows = [
                {"Path": file, "Name": file.rpartition("/")[2], "Type": "blob", "Size": len(data),
                 "Sha256": hashlib.sha256(data).hexdigest(), "Revision": published.commit}
                for file, data in published.files.items()
            ]  # fmt: skip
            self._json({"Code": 200, "Success": True, "Data": {"Files": rows, "TotalCount": len(rows)}})

    # --- answers ---

    def _file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        if name in self.server.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        span, status = self.headers.get("Range"), 200
        if span:
            self.server.ranges.append(span)
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers |= {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
            data, status = data[start : end + 1], 206
        is_cut = self.command == "GET" and self.server.num_cut > 0 and len(data) > 1
        self.server.num_cut -= is_cut
        self._send(data, status=status, headers={**headers, "Accept-Ranges": "bytes"}, is_cut=is_cut)

    def _json(self, value: Any, *, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status=status, headers={"Content-Type": "application/json"})

    def _send(self, data: bytes, *, status: int = 200, headers: Mapping[str, str], is_cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        if is_cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[ScriptedHub]:
    hub = ScriptedHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def use(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both clients ask the hub at `url` and keep their files in `home`; forget what was known of other hubs."""
    from huggingface_hub import constants
    from modelscope_hub import _download

    from qwen_eval.hubs import snapshots

    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "ms"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # its client reads the environment once, when it is imported
    monkeypatch.setattr(_download, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.0)  # it would wait for seconds
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    snapshots.forget()
