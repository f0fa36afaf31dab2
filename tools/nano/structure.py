"""The weights a miniature begins with: circuits that large models find by themselves and small runs do not.

From plain random weights, copying exercises taught these shapes nothing in a million tokens, and choices stayed at
chance after ten million. From these weights copying is learnt within two hundred thousand tokens and choices within
two million. What is set is a beginning, no answer: every weight is trained.

- Layer 1, three heads attend to the token 1, 2 and 3 places back, by the biases of q and k alone (rotation turns a
  constant into a preference for a distance), and write a code of that token into rows of their own.
- Layer 2, two heads attend to what followed an earlier occurrence of the current token and make it likelier: induction
  heads (Olsson et al. 2022, "In-context Learning and Induction Heads"). Two more copy the code of the place they attend
  to, or of the token before it, into rows for things looked up; where to look is left to training.
- Layers 3 and 4, two heads each attend to places that hold the token looked up and make the token two places before
  it likelier: the letter of an option. Two heads of layer 3 look up once more: the token before, and two before, the
  place they attend to (the second where the token looked up stands: "Ben has eggs" leads from the eggs to Ben).
- The head of the model reads what the embedding writes, weakly.
"""

# D hidden size, E part of it that embeddings use at first, K head dimension

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nano.model import Attention, Qwen

PEAK = 5.0  # size of the q and k biases: 90 % of the attention on the wanted distance
MATCH = 2.0  # sharpness of the token match
FAST, SLOW = 6, 7  # rotary pairs that tell distances, and pairs that hardly turn within the training length
BACK_1, BACK_2, _BACK_3, LOOKED_UP = range(4)  # regions of K rows after the first E


@torch.no_grad()
def structured(model: Qwen, seed: int, twins: Sequence[tuple[int, int]] = ()) -> None:
    """Sets the beginning described above, in place. Needs at least four layers and six heads; else does nothing.

    `twins`: pairs of tokens that begin with one code, for what is one word with and without a space before it.
    """
    shape = model.shape
    if shape.num_layers < 4 or shape.num_heads < 6:
        return
    generator = torch.Generator().manual_seed(seed)
    D, K = shape.hidden_size, shape.head_size
    E = D - 4 * K
    blocks = list(model.transformer["h"])  # type: ignore[arg-type]
    _embeddings(model, E, generator, twins)
    for block in blocks:
        block.attn.c_proj.weight.mul_(0.5)
        block.mlp.c_proj.weight.mul_(0.5)
    own_KD = torch.zeros(K, D)  # the code of a place's own token
    own_KD[:, :E] = torch.linalg.qr(torch.randn(E, K, generator=generator))[0].T
    region_KD = [torch.eye(D)[E + i * K : E + (i + 1) * K] for i in range(4)]
    first, second, third, fourth = (block.attn for block in blocks[:4])
    theta = shape.rotary_base ** (-torch.arange(K // 2) / (K // 2))
    for head in range(3):
        _look_back(first, head, theta * (head + 1))
        _moves(first, head, 1.2 * own_KD, region_KD[head])
    for head in range(2):  # each of a pair compares a part of the code
        _matches(second, head, 1.2 * own_KD, region_KD[BACK_1], head)
        _moves(second, head, own_KD, own_KD)
        for attention in (third, fourth):
            _matches(attention, head, 1.5 * region_KD[LOOKED_UP], 1.2 * own_KD, head)
            _moves(attention, head, region_KD[BACK_2], own_KD)
    _moves(second, 2, region_KD[BACK_1], region_KD[LOOKED_UP])
    _moves(second, 3, 1.2 * own_KD, region_KD[LOOKED_UP])
    _moves(third, 2, region_KD[BACK_1], region_KD[LOOKED_UP])
    _matches(third, 3, 1.5 * region_KD[LOOKED_UP], 1.2 * own_KD, 0)
    _moves(third, 3, region_KD[BACK_2], region_KD[LOOKED_UP])


def _embeddings(model: Qwen, E: int, generator: torch.Generator, twins: Sequence[tuple[int, int]]) -> None:
    embedding = model.transformer["wte"]
    assert isinstance(embedding, nn.Embedding)
    embedding.weight.mul_(0.1)
    embedding.weight[:, :E] = 0.8 * torch.randn(len(embedding.weight), E, generator=generator)
    for one, other in twins:
        embedding.weight[one, :E] = embedding.weight[other, :E]
    model.lm_head.weight.copy_(0.1 * embedding.weight)


def _rows(attention: Attention, head: int) -> slice:
    K = len(attention.c_attn.weight) // 3 // attention.num_heads
    return slice(head * K, (head + 1) * K)


def _look_back(attention: Attention, head: int, angle: Tensor) -> None:
    """Attention to the distance whose rotation is `angle` [K / 2]."""
    rows = _rows(attention, head)
    q_DD, k_DD, _ = attention.c_attn.weight.chunk(3)
    q_bias, k_bias, _ = attention.c_attn.bias.chunk(3)
    q_DD[rows] *= 0.2
    k_DD[rows] *= 0.2
    q_bias[rows][:FAST] = PEAK
    k_bias[rows][:FAST] = PEAK * angle[:FAST].cos()
    k_bias[rows][len(angle) : len(angle) + FAST] = PEAK * angle[:FAST].sin()


def _matches(attention: Attention, head: int, query_KD: Tensor, key_KD: Tensor, part: int) -> None:
    """Attention to places whose `key` code equals the `query` code, in one part of 2 * SLOW numbers."""
    rows = _rows(attention, head)
    q_DD, k_DD, _ = attention.c_attn.weight.chunk(3)
    K = len(query_KD)
    slots = torch.tensor([*range(K // 2 - SLOW, K // 2), *range(K - SLOW, K)])
    numbers = part * 2 * SLOW + torch.arange(2 * SLOW)
    for matrix_DD, code_KD in ((q_DD, query_KD), (k_DD, key_KD)):
        matrix_DD[rows] = 0
        matrix_DD[rows][slots] = MATCH * code_KD[numbers]


def _moves(attention: Attention, head: int, read_KD: Tensor, write_KD: Tensor) -> None:
    """What the head attends to is read through `read` and written through the transpose of `write`."""
    rows = _rows(attention, head)
    attention.c_attn.weight.chunk(3)[2][rows] = read_KD
    attention.c_proj.weight[:, rows] = write_KD.T
