"""Which model an OpenAI-compatible endpoint serves: its URL, and what its `/models` says of the model asked for."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping

from qwen_eval.core import JSON, EngineError

TIMEOUT_S = 10.0  # without a byte
TOTAL_S = 30.0
MAX_NAME = 200
MAX_BYTES = 16 << 20
BUSY = (408, 429, 500, 502, 503, 504)  # the list is there, and not to be had now
# What stays the same while a server runs; vLLM and llama.cpp put the time of the request into "created".
LASTING = ("id", "root", "parent", "owned_by", "max_model_len", "context_length", "meta", "quantization", "digest")


def only_model(url: str, key: str | None) -> str:
    """The name of the one model that a server has; EngineError where it has several, or does not say."""
    names = _names(_listed(checked_url(url), key))
    if len(names) == 1:
        return names[0]
    if not names:
        raise EngineError(f"{public_url(url)}/models: the server names no model; pass engine.api_model=NAME")
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise EngineError(f"{public_url(url)}: {len(names)} models are served; pass engine.api_model= one of {shown}")


def _names(listed: JSON) -> list[str]:
    rows = listed.get("data") if isinstance(listed, dict) else None
    names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [name for name in names if isinstance(name, str) and 0 < len(name) <= MAX_NAME]


def endpoint_identity(url: str, name: str, key: str | None = None) -> str:
    """`"api:http://localhost:8000/v1 qwen2.5-7b-instruct sha256:0123456789abcdef"`; EngineError when nobody answers.

    The hash is of the server's entry for the model; "unlisted" where it has no list, or the model is not in it.
    """
    url = checked_url(url)
    entry = _entry(_listed(url, key), name)
    if entry is None:
        return f"api:{public_url(url)} {name} unlisted"
    text = json.dumps({key: entry[key] for key in LASTING if key in entry}, sort_keys=True)
    return f"api:{public_url(url)} {name} sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Another server is another endpoint, and the key is not for it."""


def _listed(url: str, key: str | None) -> JSON:
    """What `/models` says; None for a server that has no such list."""
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as reply:
            listed: JSON = json.loads(_body(reply))
            return listed
    except urllib.error.HTTPError as error:
        if error.code not in BUSY:
            return None  # no such list here, or not for us
        raise EngineError(f"{public_url(url)}/models: the server answers {error.code}; try again later") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise EngineError(f"{public_url(url)}: no server answers ({reason}); check engine.base_url=") from None
    except (ValueError, RecursionError):
        return None


def _body(reply: http.client.HTTPResponse) -> bytes:
    """Up to its bounds in bytes and in time."""
    parts, size, end = [], 0, time.monotonic() + TOTAL_S
    while size < MAX_BYTES and (part := reply.read1(1 << 16)):
        if time.monotonic() > end:
            raise TimeoutError(f"no whole list of models in {TOTAL_S:.0f} s")
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _entry(listed: JSON, name: str) -> Mapping[str, JSON] | None:
    rows = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(rows, list):
        return None
    return next((row for row in rows if isinstance(row, dict) and row.get("id") == name), None)


def checked_url(url: str) -> str:
    """The address of an API without its last slash; EngineError where no request could be sent there."""
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, half a bracket
        has_host, parts = False, urllib.parse.SplitResult("http", "", "", "", "")
    if parts.scheme not in ("http", "https"):
        raise EngineError(f"engine.base_url={url}: no http:// or https:// before it; pass engine.base_url=http://{url}")
    if not has_host or not url.isascii() or not url.isprintable() or " " in url:
        raise EngineError(f"engine.base_url={public_text(url)}: not an address; it looks like http://HOST:PORT/v1")
    return url.rstrip("/")


def public_text(url: str) -> str:
    return url.rpartition("@")[2]


def public_url(url: str) -> str:
    """Without a user and password, which have no place in a record."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
