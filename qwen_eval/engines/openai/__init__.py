"""An OpenAI-compatible HTTP API: a server of vLLM, SGLang or llama.cpp, or a hosted model."""

from __future__ import annotations

from qwen_eval.engines.kinds import EngineKind

ENGINE = EngineKind(
    name="openai",
    opens="qwen_eval.engines.openai.engine:open_engine",
    identity="qwen_eval.engines.openai.engine:identity_of",
    honours=("system", "thinking"),  # the server decided the others when it was started
    tuned_by=(
        "base_url", "api_model", "concurrency", "server", "timeout_s", "retries", "retry_share", "tokenizer", "prices",
    ),
    decides=("api_model",),
    model_at="server",
)  # fmt: skip
