"""transformers: every model that it can load, at its own speed."""

from __future__ import annotations

from qwen_eval.engines.kinds import EngineKind

ENGINE = EngineKind(
    name="hf",
    opens="qwen_eval.engines.hf.engine:open_engine",
    honours=("dtype", "quant", "attention", "weights", "system", "thinking"),
    tuned_by=("max_batch_size", "num_threads"),
)
