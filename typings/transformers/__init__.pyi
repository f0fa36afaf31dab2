"""What this package uses of transformers 4.51 and later, whose own annotations change from release to release.

Only calls that are made here are typed; a call that is new here is added here.
"""

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

class PretrainedConfig: ...
class BatchEncoding(dict[str, list[int]]): ...
class Cache: ...

class CausalLMOutputWithPast:
    logits: Tensor
    past_key_values: Cache | None

class GenerationConfig:
    eos_token_id: int | list[int] | None
    def __init__(
        self,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
    ) -> None: ...
    def to_diff_dict(self) -> dict[str, Any]: ...

_Watch = Callable[[Tensor, Tensor], Tensor]

class LogitsProcessorList(list[_Watch]): ...
class StoppingCriteriaList(list[_Watch]): ...

class PreTrainedModel(nn.Module):
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def get_input_embeddings(self) -> nn.Embedding: ...
    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast: ...
    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
    ) -> Tensor: ...

class PreTrainedTokenizerBase:
    added_tokens_decoder: dict[int, AddedToken]
    chat_template: str | dict[str, str] | None
    special_tokens_map: dict[str, str]
    pad_token_id: int | None
    eos_token_id: int | None
    def __len__(self) -> int: ...
    def __call__(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> BatchEncoding: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = ...
    ) -> str: ...
    def add_tokens(self, new_tokens: Iterable[str], special_tokens: bool = False) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...

class AutoTokenizer:
    @staticmethod
    def from_pretrained(
        name: str | PathLike[str],
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
    ) -> PreTrainedTokenizerBase: ...

class AutoConfig:
    @staticmethod
    def from_pretrained(
        name: str, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> PretrainedConfig: ...

class AutoModelForCausalLM:
    @staticmethod
    def from_config(config: PretrainedConfig, **options: object) -> PreTrainedModel: ...
    @staticmethod
    def from_pretrained(
        name: str, *, revision: str | None = None, trust_remote_code: bool = False, **options: object
    ) -> PreTrainedModel: ...

class BitsAndBytesConfig:
    def __init__(self, **options: object) -> None: ...
