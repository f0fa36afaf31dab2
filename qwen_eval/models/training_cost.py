"""What fine-tuning takes, from the shape alone: trainable parameters, bytes, operations. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_eval.models.block import block_linears
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import num_linear_weights, num_parameters, stored_linears, weight_bytes
from qwen_eval.models.quant.formats import ELEMENT_BYTES

METHODS = ("lora", "lora_emb", "qlora", "full")
SHARDINGS = ("none", "zero2", "zero3", "fsdp")
LOSS_CHUNK = 1024  # positions whose logits exist at once
STATE_BYTES = 8  # AdamW's two moments, fp32
MASTER_BYTES = 4  # fp32 copies of 16-bit weights that are trained


def lora_parts(config: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Module of a block -> (inputs, outputs of each stored part): what the published settings put adapters on."""
    return {name: (linear.inputs, linear.parts) for name, linear in block_linears(config).items()}


def num_lora_parameters(config: ModelConfig, rank: int) -> int:
    return config.num_layers * rank * sum(linear.inputs + linear.outputs for linear in stored_linears(config))


def num_trainable(config: ModelConfig, method: str, rank: int) -> int:
    """Exactly the elements that the method trains; tied embeddings once."""
    if method == "full":
        return num_parameters(config)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return num_lora_parameters(config, rank) + (tables if method == "lora_emb" else 0)


@dataclass(frozen=True, kw_only=True)
class TuningCost:
    """One sequence of `seq` tokens a micro-batch, `accumulation` of them a step, on `gpus` that share by `sharding`."""

    config: ModelConfig
    method: str
    quant: str
    dtype: str
    seq: int
    rank: int = 64
    accumulation: int = 8
    checkpointing: bool = True
    gpus: int = 1
    sharding: str = "none"

    @property
    def trainable(self) -> int:
        return num_trainable(self.config, self.method, self.rank)

    @property
    def weight_bytes(self) -> int:
        """Of the base and the adapters."""
        adapters = 0 if self.method == "full" else num_lora_parameters(self.config, self.rank)
        return weight_bytes(self.config, self.quant, self.dtype) + ELEMENT_BYTES[self.dtype] * adapters

    @property
    def gradient_bytes(self) -> int:
        return self.trainable * ELEMENT_BYTES[self.dtype]

    @property
    def optimizer_bytes(self) -> int:
        return self.trainable * (STATE_BYTES + (MASTER_BYTES if self.dtype != "fp32" else 0))

    @property
    def layer_bytes(self) -> int:
        """What one block keeps for its backward pass."""
        c, e = self.config, ELEMENT_BYTES[self.dtype]
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        norms = 2 * (4 + e) * c.hidden_size
        attention = e * (2 * heads + 2 * heads + 2 * kv_heads)  # q, k, v as multiplied, and the output
        mlp = 3 * e * c.mlp_size
        if self.method == "full":
            inputs = e * c.mlp_size  # of the last product; the others are kept above
        else:  # what dropout left, and which: for each adapter
            inputs = (1 + e) * (3 * c.hidden_size + heads + c.mlp_size)
        return self.seq * (norms + attention + mlp + inputs)

    @property
    def activation_bytes(self) -> int:
        c, e = self.config, ELEMENT_BYTES[self.dtype]
        held = self.seq * c.hidden_size * e * c.num_layers if self.checkpointing else c.num_layers * self.layer_bytes
        backward = self.seq * 4 * e * c.mlp_size + (self.layer_bytes if self.checkpointing else 0)
        if self.quant != "none":  # one weight, dequantized for its product
            backward += e * c.hidden_size * c.mlp_size
        head = min(self.seq, LOSS_CHUNK) * c.vocab_size * (2 * e + 8)
        return held + max(backward, head)

    @property
    def gpu_bytes(self) -> int:
        """Of one GPU. zero2 shares gradients and optimizer, zero3 and fsdp the weights too; activations are its own."""
        weights, shared = self.weight_bytes, self.gradient_bytes + self.optimizer_bytes
        if self.sharding in ("zero3", "fsdp"):
            weights //= self.gpus
        if self.sharding != "none":
            shared //= self.gpus
        return weights + shared + self.activation_bytes

    @property
    def step_flops(self) -> float:
        """Of one GPU's share of a step: forward, gradients of inputs and trained weights, what is made anew."""
        c = self.config
        dense = 2.0 * (num_linear_weights(c) + c.vocab_size * c.hidden_size) * self.seq
        attention = 2.0 * c.num_layers * c.num_heads * c.head_dim * self.seq * (self.seq + 1)
        passes = 2.0 + (1.0 if self.checkpointing else 0.0) + (1.0 if self.method == "full" else 0.0)
        adapters = 6.0 * self.seq * (0 if self.method == "full" else num_lora_parameters(c, self.rank))
        return self.accumulation * (passes * dense + (passes + 1) * attention + adapters)
