"""`ModelConfig`: the shape and the position rules of one model. The only place that knows config.json field names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qwen_eval.core import ModelError

# Fields that change no forward pass at inference, by the reason why.
HARMLESS: dict[str, str] = {
    "of training only": "attn_dropout_prob attention_dropout emb_dropout_prob attn_pdrop embd_pdrop resid_pdrop"
    " initializer_range bias_dropout_fusion classifier_dropout",
    "names a class, a tool, a version or an origin": "architectures auto_map model_type transformers_version"
    " tokenizer_class tokenizer_type name_or_path unsloth_version unsloth_fixed onnx_safe",
    "the dtype, which is model.dtype's": "torch_dtype dtype bf16 fp16 fp32 params_dtype use_bfloat16",
    "the tokenizer says it": "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id"
    " num_extra_tokens prefix",
    "a length stated, not a limit of the maths": "max_position_embeddings n_positions",
    "which kernel computes the same": "use_flash_attn use_cache_kernel use_cache chunk_size_feed_forward torchscript"
    " softmax_in_fp32",
    "what else a forward returns": "output_attentions output_hidden_states return_dict output_scores"
    " return_dict_in_generate",
    "of classification heads, which are not read": "problem_type id2label label2id num_labels finetuning_task"
    " task_specific_params",
    "how to generate, which each task says itself": "max_length min_length do_sample early_stopping num_beams"
    " num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty"
    " no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id"
    " forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens"
    " begin_suppress_tokens max_new_tokens",
    "a decoder is what this is": "is_decoder",
    "read where weights are loaded": "quantization_config use_cache_quantization",
}
V1_FIELDS = """
    hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head kv_channels intermediate_size
    ffn_hidden_size vocab_size padded_vocab_size layer_norm_epsilon rotary_pct rotary_emb_base rope_theta
    seq_length use_dynamic_ntk use_logn_attn no_bias tie_word_embeddings
"""
LATER_FIELDS = """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size
    rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings attention_bias use_sliding_window
    sliding_window max_window_layers layer_types
"""
# Fields that must have this value if they are there at all: anything else is another model.
FIXED: dict[str, object] = {
    "scale_attn_weights": True,
    "activation": "swiglu",
    "hidden_act": "silu",
    "pos_emb": "rotary",
    "apply_residual_connection_post_layernorm": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
}
ROPE_FIELDS = {
    "default": "rope_type type rope_theta",
    "yarn": "rope_type type rope_theta factor original_max_position_embeddings beta_fast beta_slow attention_factor"
    " mscale mscale_all_dim truncate",
}
MOST = {"num_hidden_layers": 1024, "n_layer": 1024}  # beyond it a count is a mistake or an attack
MOST_ELSEWHERE = 1 << 24
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (https://arxiv.org/abs/2309.00071), as Qwen2.5 and Qwen3 checkpoints may ask for."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # on cos and sin; None: from `factor` and the two `mscale`
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the bounds of the ramp to whole dimensions


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
    out_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
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
    def from_hf(fields: Mapping[str, object]) -> ModelConfig:
        """Read a config.json. ModelError for another architecture or a field that would change the maths."""
        model_type = fields.get("model_type")
        if model_type == "qwen":
            return _from_v1(fields)
        if model_type in ("qwen2", "qwen3"):
            return _from_later(fields, str(model_type))
        raise ModelError(
            f"config.json: model_type={shown(model_type)} is not a dense Qwen model (qwen, qwen2, qwen3); use engine=hf"
        )


def read_fields(path: Path, *, most_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object of a checkpoint, which may be anybody's: ModelError in one line for anything else."""
    try:
        if path.stat().st_size > most_bytes:
            raise ModelError(f"{path}: {path.stat().st_size} bytes, more than {most_bytes}; not a config of a model")
        fields: object = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{path}: nested too deeply to be a config of a model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({str(error)[:200]})") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: holds a {type(fields).__name__}, not a JSON object")
    return fields


def _refuse(name: str, value: object, rule: str) -> NoReturn:
    raise ModelError(f"config.json: {name}={shown(value)} {rule}")


def shown(value: object) -> str:
    """A value of somebody's file for a line of ours: short, control characters escaped."""
    text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) and value > 10**30 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_fields(fields: Mapping[str, object], known: str) -> None:
    """Every field is honoured, harmless or rejected; null and names with a leading underscore are ignored."""
    harmless = " ".join(HARMLESS.values()).split()
    passed = {*known.split(), *harmless}
    for name, value in fields.items():
        if value is None or name in passed or name.startswith("_"):
            continue
        if name not in FIXED:
            _refuse(f"unknown field {shown(name)[1:-1]}", value, "may change the maths; remove it if it does not")
        if value != FIXED[name]:
            _refuse(name, value, f"is not supported, only {FIXED[name]!r}")


def _number(fields: Mapping[str, object], *names: str, default: float | None = None) -> float:
    """The first of `names` that is there: a positive, finite number."""
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            _refuse(name, value, "must be a positive number")
        if value > MOST.get(name, 1e12):
            _refuse(name, value, f"must be at most {MOST.get(name, 1e12):g}")
        return value
    if default is None:
        raise ModelError(f"config.json: {names[0]} is missing")
    return default


def _count(fields: Mapping[str, object], *names: str, default: int | None = None) -> int:
    value = _number(fields, *names, default=default)
    name = next((name for name in names if fields.get(name) is not None), names[0])
    if value != int(value):
        _refuse(name, value, "must be a whole number")
    if value > MOST.get(name, MOST_ELSEWHERE):
        _refuse(name, value, f"must be at most {MOST.get(name, MOST_ELSEWHERE)}")
    return int(value)


def _flag(fields: Mapping[str, object], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value not in (None, False, True):
        _refuse(name, value, "must be true or false")
    return default if value is None else bool(value)


def _check_heads(config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        _refuse("num_key_value_heads", config.num_kv_heads, f"must divide num_attention_heads {config.num_heads}")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        _refuse("head_dim", config.head_dim, f"has {config.rotary_dim} channels that turn: an even number must")
    return config


def _from_v1(f: Mapping[str, object]) -> ModelConfig:
    _check_fields(f, V1_FIELDS)
    hidden = _count(f, "hidden_size", "n_embd")
    heads = _count(f, "num_attention_heads", "n_head")
    head_dim = _count(f, "kv_channels", default=128)
    if heads * head_dim != hidden:
        raise ModelError(f"config.json: kv_channels {head_dim} x num_attention_heads {heads} != hidden_size {hidden}")
    has_bias = not _flag(f, "no_bias", True)
    config = ModelConfig(
        family="qwen",
        hidden_size=hidden,
        num_layers=_count(f, "num_hidden_layers", "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_size=_count(f, "intermediate_size", "ffn_hidden_size") // 2,
        vocab_size=_count(f, "vocab_size", "padded_vocab_size"),
        norm_eps=_number(f, "layer_norm_epsilon", default=1e-6),
        # early 72B files carry both names, with one value
        rope_base=float(_number(f, "rotary_emb_base", "rope_theta", default=10000.0)),
        rotary_dim=int(head_dim * _number(f, "rotary_pct", default=1.0)),
        train_length=_count(f, "seq_length"),
        dynamic_ntk=_flag(f, "use_dynamic_ntk", True),
        logn=_flag(f, "use_logn_attn", True),
        qkv_bias=True,
        out_bias=has_bias,
        mlp_bias=has_bias,
        tie_embeddings=_flag(f, "tie_word_embeddings", False),
        max_length=_stated_length(f),
    )
    return _check_heads(config)


def _stated_length(f: Mapping[str, object]) -> int | None:
    """What a file of v1 says of its longest text; it decides no number of the model, so nonsense is no statement."""
    stated = f.get("max_position_embeddings", f.get("n_positions"))
    return stated if type(stated) is int and stated > 0 else None


def _from_later(f: Mapping[str, object], family: str) -> ModelConfig:
    _check_fields(f, LATER_FIELDS)
    hidden, heads = _count(f, "hidden_size"), _count(f, "num_attention_heads")
    layers = _count(f, "num_hidden_layers")
    rope = _rope_parameters(f)
    has_own_dim = family == "qwen3" and "head_dim" not in f
    head_dim = _count(f, "head_dim", default=128 if has_own_dim else max(1, hidden // heads))
    max_length = _count(f, "max_position_embeddings", default=32768)
    has_bias = _flag(f, "attention_bias", False)  # Qwen2 has its three biases whatever it says, and no fourth
    config = ModelConfig(
        family=family,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_count(f, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        mlp_size=_count(f, "intermediate_size"),
        vocab_size=_count(f, "vocab_size"),
        norm_eps=_number(f, "rms_norm_eps", default=1e-6),
        rope_base=float(_number({**f, **rope}, "rope_theta", default=10000.0)),
        rotary_dim=head_dim,
        train_length=max_length,
        qkv_bias=family == "qwen2" or has_bias,
        out_bias=family == "qwen3" and has_bias,
        qk_norm=family == "qwen3",
        tie_embeddings=_flag(f, "tie_word_embeddings", False),
        yarn=_yarn(rope, max_length),
        max_length=max_length,
        windows=_sliding_windows(f, layers),
    )
    return _check_heads(config)


def _rope_parameters(f: Mapping[str, object]) -> dict[str, Any]:
    """`rope_scaling` (the older name) wins over `rope_parameters`, as in transformers; null keys left out."""
    for name in ("rope_scaling", "rope_parameters"):
        if f.get(name) is not None and not isinstance(f[name], Mapping):
            _refuse(name, f[name], "must be an object")
    name = "rope_scaling" if f.get("rope_scaling") else "rope_parameters"
    given = f.get(name)
    stated: Mapping[str, object] = given if isinstance(given, Mapping) else {}
    rope = {key: value for key, value in stated.items() if value is not None}
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ModelError(f"config.json: {name} type {shown(kind)} is not supported, only 'yarn'; use engine=hf")
    for key, value in rope.items():
        if key not in ROPE_FIELDS[kind].split():
            _refuse(f"{name}.{shown(key)[1:-1]}", value, f"is unknown for type {kind!r}; remove it if it does nothing")
    if "truncate" in stated:  # here null is not the default: transformers reads it as false
        rope["truncate"] = bool(stated["truncate"])
    return rope


def _yarn(rope: Mapping[str, object], max_length: int) -> Yarn | None:
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    length = _count(rope, "original_max_position_embeddings", default=max_length)

    def optional(name: str) -> float | None:
        return float(_number(rope, name)) if rope.get(name) else None

    return Yarn(
        # without a factor it is what the stated lengths imply
        factor=float(_number(rope, "factor", default=max_length / length)),
        original_length=length,
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        attention_factor=float(_number(rope, "attention_factor")) if "attention_factor" in rope else None,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=_flag(rope, "truncate", True),
    )


def _sliding_windows(f: Mapping[str, object], layers: int) -> tuple[int | None, ...]:
    """transformers' rule: `layer_types` decides; without it the layers from max_window_layers (28) on are windowed."""
    window = None
    if _flag(f, "use_sliding_window", False) and f.get("sliding_window", 4096) is not None:
        window = _count(f, "sliding_window", default=4096)
    if f.get("layer_types") is not None:
        return _typed_windows(f["layer_types"], layers, window)
    if window is None:
        return ()
    first = f.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        _refuse("max_window_layers", first, "must be a whole number, 0 or more")
    return tuple(window if i >= first else None for i in range(layers))


def _typed_windows(types: object, layers: int, window: int | None) -> tuple[int | None, ...]:
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or any(kind not in known for kind in types):
        _refuse("layer_types", types, f"must be a list of {' and '.join(known)}; use engine=hf for others")
    if len(types) != layers:
        _refuse("layer_types", types, f"has {len(types)} entries for {layers} layers")
    if "sliding_attention" not in types:
        return ()
    if window is None:
        raise ModelError("config.json: layer_types has sliding_attention, but use_sliding_window=true is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
