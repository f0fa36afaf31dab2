"""Which model an OpenAI-compatible endpoint serves: its URL, and what its `/models` says of the model asked for."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping

from qwen_eval.core import JSON, EngineError

TIMEOUT_S = 10.0
MAX_BYTES = 16 << 20
BUSY = (408, 429, 500, 502, 503, 504)  # the list is there, and not to be had now
# What stays the same while a server runs; vLLM and llama.cpp put the time of the request into "created".
LASTING = ("id", "root", "parent", "owned_by", "max_model_len", "context_length", "meta", "quantization", "digest")


def endpoint_identity(url: str, name: str) -> str:
    """`"api:http://localhost:8000/v1 qwen2.5-7b-instruct sha256:0123456789abcdef"`; EngineError when nobody answers.

    The hash is of the server's entry for the model; "unlisted" where it has no list, or the model is not in it.
    """
    url = url.rstrip("/")
    entry = _entry(_listed(url), name)
    if entry is None:
        return f"api:{_public(url)} {name} unlisted"
    text = json.dumps({key: entry[key] for key in LASTING if key in entry}, sort_keys=True)
    return f"api:{_public(url)} {name} sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _listed(url: str) -> JSON:
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            listed: JSON = json.loads(reply.read(MAX_BYTES))
            return listed
    except urllib.error.HTTPError as error:
        if error.code not in BUSY:
            return None  # no such list here, or not for us
        raise EngineError(f"{_public(url)}/models: the server answers {error.code}; try again later") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise EngineError(f"{_public(url)}: no server answers ({reason}); check engine.base_url=") from None
    except (ValueError, RecursionError):
        return None


def _entry(listed: JSON, name: str) -> Mapping[str, JSON] | None:
    rows = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(rows, list):
        return None
    return next((row for row in rows if isinstance(row, dict) and row.get("id") == name), None)


def _public(url: str) -> str:
    """Without a user and password, which have no place in a record."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
