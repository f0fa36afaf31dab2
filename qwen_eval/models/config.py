"""`ModelConfig`: the shape and the position rules of one model. The only place that knows config.json field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_eval.core import ModelError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that never change a forward pass at inference: read past without a word.
HARMLESS = _names(
    """
    architectures auto_map attn_dropout_prob attention_dropout emb_dropout_prob attn_pdrop embd_pdrop
    resid_pdrop initializer_range model_type transformers_version tokenizer_class tokenizer_type use_cache
    torch_dtype dtype bos_token_id eos_token_id pad_token_id max_position_embeddings n_positions use_flash_attn
    onnx_safe bf16 fp16 fp32 params_dtype bias_dropout_fusion quantization_config softmax_in_fp32
    use_cache_quantization use_cache_kernel max_window_layers output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_decoder problem_type id2label label2id name_or_path use_sliding_window
    sliding_window layer_types num_extra_tokens task_specific_params pruned_heads rope_type
    """
)
V1_FIELDS = _names(
    """
    hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head kv_channels intermediate_size
    ffn_hidden_size vocab_size padded_vocab_size layer_norm_epsilon rotary_pct rotary_emb_base rope_theta
    seq_length use_dynamic_ntk use_logn_attn no_bias tie_word_embeddings scale_attn_weights activation pos_emb
    apply_residual_connection_post_layernorm
    """
)
LATER_FIELDS = _names(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size
    rms_norm_eps rope_theta rope_scaling rope_parameters hidden_act tie_word_embeddings attention_bias
    """
)
# Fields that must have this value if they are there at all: anything else is another model.
FIXED: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "activation": ("swiglu",),
    "hidden_act": ("silu",),
    "pos_emb": ("rotary",),
    "apply_residual_connection_post_layernorm": (False,),
}


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (https://arxiv.org/abs/2309.00071), as Qwen2.5 and Qwen3 checkpoints may ask for."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Qwen block, all generations. `windows[i]` is the attention window of layer i in tokens, None for all."""

    family: str  # qwen (v1) | qwen2 (1.5, 2, 2.5) | qwen3
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int  # width of one branch
    vocab_size: int
    norm_eps: float
    rope_base: float
    rotary_dim: int
    train_length: int  # v1's seq_length: where dynamic NTK and LogN begin
    dynamic_ntk: bool = False
    logn: bool = False
    qkv_bias: bool = True
    out_bias: bool = False  # of attention output and MLP
    qk_norm: bool = False
    tie_embeddings: bool = False
    yarn: Yarn | None = None
    max_length: int | None = None  # stated by the checkpoint; None: no statement
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def kv_group(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads

    @staticmethod
    def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json. ModelError for another architecture or a field that would change the maths."""
        model_type = fields.get("model_type")
        if model_type == "qwen":
            return _from_v1(fields)
        if model_type in ("qwen2", "qwen3"):
            return _from_later(fields, str(model_type))
        raise ModelError(
            f"config.json: model_type={model_type!r} is not a dense Qwen model (qwen, qwen2, qwen3); use engine=hf"
        )


def _check_fields(fields: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in fields.items():
        if name in FIXED and value not in FIXED[name]:
            raise ModelError(f"config.json: {name}={value!r} is not supported, only {FIXED[name][0]!r}")
        if name in known or name in HARMLESS or name.startswith("_") or isinstance(value, str):
            continue
        if value not in (None, False, 0, 0.0, 1.0) and value != [] and value != {}:
            raise ModelError(
                f"config.json: unknown field {name}={value!r} may change the maths; remove it if it does not"
            )


def _positive(fields: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of `names` that is there; a positive number."""
    for name in names:
        if fields.get(name) is not None:
            value = fields[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ModelError(f"config.json: {name}={value!r} must be a positive number")
            return value
    if default is None:
        raise ModelError(f"config.json: {names[0]} is missing")
    return default


def _from_v1(f: Mapping[str, Any]) -> ModelConfig:
    _check_fields(f, V1_FIELDS)
    hidden = int(_positive(f, "hidden_size", "n_embd"))
    heads = int(_positive(f, "num_attention_heads", "n_head"))
    head_dim = int(_positive(f, "kv_channels", default=128))
    if heads * head_dim != hidden:
        raise ModelError(f"config.json: kv_channels {head_dim} x num_attention_heads {heads} != hidden_size {hidden}")
    has_bias = not f.get("no_bias", True)
    return ModelConfig(
        family="qwen",
        hidden_size=hidden,
        num_layers=int(_positive(f, "num_hidden_layers", "n_layer")),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_size=int(_positive(f, "intermediate_size", "ffn_hidden_size")) // 2,
        vocab_size=int(_positive(f, "vocab_size", "padded_vocab_size")),
        norm_eps=float(_positive(f, "layer_norm_epsilon", default=1e-6)),
        # early 72B files carry both names, with one value
        rope_base=float(_positive(f, "rotary_emb_base", "rope_theta", default=10000.0)),
        rotary_dim=int(head_dim * float(_positive(f, "rotary_pct", default=1.0))),
        train_length=int(_positive(f, "seq_length")),
        dynamic_ntk=bool(f.get("use_dynamic_ntk", True)),
        logn=bool(f.get("use_logn_attn", True)),
        qkv_bias=True,
        out_bias=has_bias,
        tie_embeddings=bool(f.get("tie_word_embeddings", False)),
    )


def _from_later(f: Mapping[str, Any], family: str) -> ModelConfig:
    _check_fields(f, LATER_FIELDS)
    hidden, heads = int(_positive(f, "hidden_size")), int(_positive(f, "num_attention_heads"))
    layers = int(_positive(f, "num_hidden_layers"))
    rope = {**(f.get("rope_scaling") or {}), **(f.get("rope_parameters") or {})}
    head_dim = int(_positive(f, "head_dim", default=hidden // heads))
    max_length = int(_positive(f, "max_position_embeddings", default=32768))
    return ModelConfig(
        family=family,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(_positive(f, "num_key_value_heads", default=heads)),
        head_dim=head_dim,
        mlp_size=int(_positive(f, "intermediate_size")),
        vocab_size=int(_positive(f, "vocab_size")),
        norm_eps=float(_positive(f, "rms_norm_eps", default=1e-6)),
        rope_base=float(rope.get("rope_theta") or _positive(f, "rope_theta", default=10000.0)),
        rotary_dim=head_dim,
        train_length=max_length,
        qkv_bias=family == "qwen2" or bool(f.get("attention_bias", False)),
        out_bias=False,
        qk_norm=family == "qwen3",
        tie_embeddings=bool(f.get("tie_word_embeddings", False)),
        yarn=_yarn(rope, max_length),
        max_length=max_length,
        windows=_sliding_windows(f, layers),
    )


def _yarn(rope: Mapping[str, Any], max_length: int) -> Yarn | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise ModelError(f"config.json: rope_scaling type {kind!r} is not supported, only 'yarn'")
    return Yarn(
        factor=float(_positive(rope, "factor")),
        original_length=int(_positive(rope, "original_max_position_embeddings", default=max_length)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=rope.get("attention_factor"),
    )


def _sliding_windows(f: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """transformers' rule: with use_sliding_window, the layers from max_window_layers on see `sliding_window` tokens."""
    if not f.get("use_sliding_window") or not f.get("sliding_window"):
        return ()
    first = int(f.get("max_window_layers") or 0)
    return tuple(int(f["sliding_window"]) if i >= first else None for i in range(layers))
