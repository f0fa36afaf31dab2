"""What each kind of server can and how it is asked: `engine=vllm-server`, `llama-server`, `sglang`, `dashscope`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwen_eval.config import EngineSpec
from qwen_eval.core import JSON, EngineError
from qwen_eval.engines.endpoint import checked_url


@dataclass(frozen=True, kw_only=True)
class Server:
    """`top_logprobs`: the most likely tokens that it names at a position. `has_echo`: it gives the log-probabilities of
    a given text; None where that must be tried. `prefill`: words in the body, or in the last message, for "continue
    this message"; None where it cannot. `has_completions`: it takes raw text.
    """

    url: str
    key_variable: str = "OPENAI_API_KEY"
    top_logprobs: int = 20
    has_completions: bool = True
    has_echo: bool | None = None
    prefill_body: Mapping[str, JSON] = field(default_factory=dict)
    prefill_message: Mapping[str, JSON] = field(default_factory=dict)
    thinking: Literal["template", "body"] = "template"

    def thinking_body(self, switch: str, is_on: bool) -> dict[str, JSON]:
        return {switch: is_on} if self.thinking == "body" else {"chat_template_kwargs": {switch: is_on}}


CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}  # of vLLM and SGLang

SERVERS: Mapping[str, Server] = {
    "openai": Server(url="https://api.openai.com/v1", prefill_body=CONTINUE),
    "vllm": Server(url="http://localhost:8000/v1", has_echo=True, prefill_body=CONTINUE),
    "sglang": Server(url="http://localhost:30000/v1", has_echo=True, prefill_body=CONTINUE),
    "llama-server": Server(url="http://localhost:8080/v1", has_echo=False),  # continues a last assistant message
    "dashscope": Server(
        url="https://dashscope.aliyuncs.com/compatible-mode/v1",
        key_variable="DASHSCOPE_API_KEY",
        top_logprobs=5,
        has_completions=False,
        has_echo=False,
        prefill_message={"partial": True},
        thinking="body",
    ),
}


def server_of(spec: EngineSpec) -> Server:
    return SERVERS[spec.server]


def base_url(spec: EngineSpec) -> str:
    """Where requests go: `engine.base_url`, for `server=openai` OPENAI_BASE_URL, else the server's usual address."""
    named = os.environ.get("OPENAI_BASE_URL") if spec.server == "openai" else None
    return checked_url(spec.base_url or named or server_of(spec).url)


def api_key(spec: EngineSpec) -> str | None:
    """From the environment alone, and never stored."""
    variable = server_of(spec).key_variable
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EngineError(f"{variable}: holds characters that no key has; set it again")
    return key or None


def required_key(spec: EngineSpec) -> str | None:
    """EngineError where a hosted model is asked without a key."""
    key, server = api_key(spec), server_of(spec)
    if key is None and spec.base_url is None and server.url.startswith("https") and "OPENAI_BASE_URL" not in os.environ:
        raise EngineError(
            f"engine={spec.server}: pass engine.base_url=http://HOST:PORT/v1, or set {server.key_variable}"
        )
    return key
