"""What engines/vllm/engine.py uses of vLLM 0.8 and later, which is there only where its extra is installed."""

from transformers import PreTrainedTokenizerBase

__version__: str

class SamplingParams:
    def __init__(
        self,
        *,
        n: int = 1,
        max_tokens: int | None = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | list[str] | None = None,
        stop_token_ids: list[int] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        detokenize: bool = True,
        logprob_token_ids: list[int] | None = None,  # since 0.11
    ) -> None: ...

class Logprob:
    logprob: float
    rank: int | None

class CompletionOutput:
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None

class RequestOutput:
    request_id: str
    finished: bool
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]

class EngineCoreClient:
    def shutdown(self) -> None: ...

class LLMEngine:
    engine_core: EngineCoreClient
    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: SamplingParams) -> object: ...
    def abort_request(self, request_ids: list[str]) -> None: ...
    def step(self) -> list[RequestOutput]: ...

class LLM:
    llm_engine: LLMEngine
    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        **engine_args: bool | int | str,
    ) -> None: ...
    def get_tokenizer(self) -> PreTrainedTokenizerBase: ...
