"""The native engine: our own Qwen transformer, prefix-shared scoring, continuously batched generation."""

from __future__ import annotations

from qwen_eval.engines.kinds import MODEL_OPTIONS, EngineKind

ENGINE = EngineKind(
    name="native",
    opens="qwen_eval.engines.native.engine:open_engine",
    honours=MODEL_OPTIONS,
    tuned_by=(
        "prefix_sharing", "max_batch_tokens", "max_batch_size", "prefill_chunk", "kernels",
        "memory_fraction", "num_threads", "workers", "ray",
    ),
    keeps_hidden=True,
)  # fmt: skip
