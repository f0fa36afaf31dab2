"""The Linears of a Qwen block, described once: shapes, names in checkpoints, and the order in which GPTQ takes them.

The transformer is built from this description, weights are found by it, costs are counted by it. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_eval.models.config import ModelConfig

# Our name of each Linear: its name under Qwen v1, its name(s) in the later generations, which store q, k and v apart,
# and its step in GPTQ's true sequential order: Linears of one step have the same inputs, made with those of the steps
# before already quantized.
LINEARS = {
    "attn.qkv": ("attn.c_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0),
    "attn.o": ("attn.c_proj", ("self_attn.o_proj",), 1),
    "mlp.up": ("mlp.w1", ("mlp.up_proj",), 2),
    "mlp.gate": ("mlp.w2", ("mlp.gate_proj",), 2),
    "mlp.down": ("mlp.c_proj", ("mlp.down_proj",), 3),
}
NORMS = {  # v1 has no norms of queries and keys
    "attn_norm": ("ln_1", "input_layernorm"),
    "attn.q_norm": ("", "self_attn.q_norm"),
    "attn.k_norm": ("", "self_attn.k_norm"),
    "mlp_norm": ("ln_2", "post_attention_layernorm"),
}
OUTER = {
    "embed": ("transformer.wte", "model.embed_tokens"),
    "norm": ("transformer.ln_f", "model.norm"),
    "head": ("lm_head", "lm_head"),
}
LAYERS = ("transformer.h", "model.layers")


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    inputs: int
    outputs: int
    bias: bool

    @property
    def num_weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def num_parameters(self) -> int:
        return self.num_weights + self.outputs * self.bias


@dataclass(frozen=True, kw_only=True)
class BlockLinear:
    """One Linear as our transformer holds it. `parts`: its outputs as a checkpoint of this model stores them."""

    name: str
    inputs: int
    parts: tuple[int, ...]
    bias: bool
    stored_names: tuple[str, ...]
    step: int

    @property
    def shape(self) -> LinearShape:
        return LinearShape(inputs=self.inputs, outputs=sum(self.parts), bias=self.bias)

    @property
    def stored_shapes(self) -> tuple[LinearShape, ...]:
        return tuple(LinearShape(inputs=self.inputs, outputs=part, bias=self.bias) for part in self.parts)


def block_linears(config: ModelConfig) -> dict[str, BlockLinear]:
    """The Linears of every block of this model, by name."""
    size, width = config.hidden_size, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    shapes = {
        "attn.qkv": (size, (width, kv_width, kv_width), config.qkv_bias),
        "attn.o": (width, (size,), config.out_bias),
        "mlp.up": (size, (config.mlp_size,), config.mlp_bias),
        "mlp.gate": (size, (config.mlp_size,), config.mlp_bias),
        "mlp.down": (config.mlp_size, (size,), config.mlp_bias),
    }
    linears = {}
    for name, (inputs, parts, bias) in shapes.items():
        v1_name, later_names, step = LINEARS[name]
        names = (v1_name,) if is_v1(config) else later_names
        stored = parts if len(names) == len(parts) else (sum(parts),)
        linears[name] = BlockLinear(
            name=name, inputs=inputs, parts=stored, bias=bias, stored_names=names, step=step
        )  # fmt: skip
    return linears


def gptq_steps() -> list[tuple[str, ...]]:
    """The names of the Linears of each step: `[("attn.qkv",), ("attn.o",), ("mlp.up", "mlp.gate"), ("mlp.down",)]`."""
    steps = sorted({step for *_, step in LINEARS.values()})
    return [tuple(name for name, (*_, step) in LINEARS.items() if step == wanted) for wanted in steps]


def checkpoint_names(config: ModelConfig, module: str) -> tuple[str, ...]:
    """The checkpoint's name(s) of one of our modules: "layers.3.attn.qkv" -> ("transformer.h.3.attn.c_attn",)."""
    generation = 0 if is_v1(config) else 1
    if not module.startswith("layers."):
        return (OUTER[module][generation],)
    _, index, inner = module.split(".", 2)
    names = (NORMS[inner][generation],) if inner in NORMS else block_linears(config)[inner].stored_names
    return tuple(f"{LAYERS[generation]}.{index}.{name}" for name in names)


def is_v1(config: ModelConfig) -> bool:
    return config.family == "qwen"
