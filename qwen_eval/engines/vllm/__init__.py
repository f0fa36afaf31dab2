"""vLLM offline: for models that need several GPUs, or for comparison."""

from __future__ import annotations

from qwen_eval.engines.kinds import EngineKind

ENGINE = EngineKind(
    name="vllm",
    opens="qwen_eval.engines.vllm.engine:open_engine",
    honours=("dtype", "quant", "system", "thinking"),
    tuned_by=(
        "prefix_sharing",
        "max_batch_tokens",
        "max_batch_size",
        "memory_fraction",
        "tensor_parallel",
        "pipeline_parallel",
        "executor",
        "workers",
        "ray",
    ),
)
