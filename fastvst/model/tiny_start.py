"""A better start for the decoder of the tiny preset: words and attention heads that know the vision tower.

A decoder of four layers with random weights needs most of the first command's time before one of its heads looks for
what the question names. Three measures shorten this (figures: docs/miniature.md):

- The tower writes the colour of a mark and the class of an object in fixed directions (`tools/build_tower.py`). The
  embeddings of these words start near the same directions: the texts and images of CLIP share a space as well. The LM
  head has the same weights, so a head that copies a token of the image also names what it shows.
- Mimetic initialisation (arXiv 2305.09828): in trained models, queries and keys match equal content, and values and
  outputs pass it on. The first layer starts like this. The word "red" then reads the token with the red mark.
- The heads of the second layer look a fixed number of tokens back, by the biases of queries and keys.

What writes to the residual stream starts small: otherwise the random MLPs drown what attention reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst.model.config import ModelConfig
from fastvst.model.decoder import Decoder

DISTANCES = (1, 2, 3, 0, 6, 10)  # tokens back, of the heads of the second layer
FAST = 4  # pairs of rotated components for the time of M-RoPE: their angles change fast enough to tell distances
SLOW = 6  # from this pair on, the angle between a question and its image stays below a third of a radian
LOOKS = slice(12, 20)  # of `directions.values`: what a token says of the mark in it; before them of depth and object

# The parameters that hold the start. Training that freezes them keeps what it does not ask for.
ALIGNED = ("model.embed_tokens", "model.layers.0.self_attn", "model.layers.1.self_attn")


@dataclass(frozen=True)
class StartConfig:
    """Sizes of the parts.

    Attributes:
        word: norm of the part of a word's embedding along its direction; random embeddings have 1.1.
        match: gain of the queries and keys that match. 0.55 gives the token with the mark 80 to 98 % of the attention.
        copy: gain of values and outputs. With 0.5, a part of the image was learned in no 300 steps, with 1.5 in 150.
        bias: amplitude of the biases that look back; 4 gives the wanted token 70 to 90 %.
        random: factor of the random weights of queries, keys and outputs in these layers.
        stream: factor of the random weights that write to the residual stream, in all layers.
    """

    word: float = 1.5
    match: float = 0.55
    copy: float = 1.5
    bias: float = 4.0
    random: float = 0.3
    stream: float = 0.1


@torch.no_grad()
def start_from_tower(
    decoder: Decoder, shape: ModelConfig, stored: Mapping[str, Tensor], config: StartConfig | None = None
) -> None:
    """Change the random decoder of a tiny model, in place.

    Args:
        shape: of the model.
        stored: tensors of the tower's file: `directions.colour` (8, H), `directions.name` (1 + classes, H),
            `directions.values` (20, H), and `words.colour` (7, 2), `words.name` (classes, 2): the first token of each
            word, without and with a space before it.
    """
    config = config or StartConfig()
    colour, name, values = (
        F.normalize(stored[f"directions.{part}"].float(), dim=1) for part in ("colour", "name", "values")
    )
    for title, weight in decoder.named_parameters():
        if title.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(config.stream)
    table = decoder.embed_tokens.weight
    words = torch.cat([stored["words.colour"], stored["words.name"]]).long()
    for tokens, row in zip(words, torch.cat([colour[1:], name[1:]]), strict=True):
        for token in tokens:
            table[token] = 0.7 * table[token] + config.word * row
    _match_words(decoder, shape, colour[1:], name[1:], values, config)
    _look_back(decoder, shape, config)


def _match_words(
    decoder: Decoder, shape: ModelConfig, colour: Tensor, name: Tensor, values: Tensor, config: StartConfig
) -> None:
    """The first layer looks for colours and classes and copies what the tokens say; the second copies the same."""
    dim = shape.head_dim
    slow = torch.arange(SLOW, dim // 2)
    slow = torch.cat([slow, slow + dim // 2])
    draw = torch.Generator().manual_seed(5)

    def some(count: int) -> Tensor:
        """`count` orthonormal mixtures of the directions of classes, of which there are more than a head has room."""
        square = torch.randn(len(name), len(name), generator=draw)
        return torch.linalg.qr(square)[0][:count] @ name

    for index in (0, 1):
        keys = torch.zeros(2, dim, shape.hidden_size)
        if index == 0:
            keys[0, slow] = torch.cat([colour, some(len(slow) - len(colour))])
            keys[1, slow] = some(len(slow))
        marks = values[LOOKS]
        rest = torch.cat([values[: LOOKS.start], colour])
        copied = torch.stack([torch.cat([part, some(dim - len(part))]) for part in (marks, rest)])
        _set_heads(decoder, shape, index, keys, copied, config)


def _set_heads(
    decoder: Decoder, shape: ModelConfig, index: int, keys: Tensor, copied: Tensor, config: StartConfig
) -> None:
    """Put keys and values (2, D, H) of the key-value heads into a layer; the query heads of a group share its keys."""
    dim = shape.head_dim
    heads = shape.num_attention_heads
    each = heads // 2
    joined = decoder.get_parameter(f"layers.{index}.self_attn.qkv_proj.weight")
    outputs = decoder.get_parameter(f"layers.{index}.self_attn.o_proj.weight")
    query, key, value = joined.split([heads * dim, 2 * dim, 2 * dim])
    for group in range(2):
        own = slice(group * dim, (group + 1) * dim)
        key[own] = config.random * key[own] + config.match * keys[group]
        value[own] = 0.1 * value[own] + config.copy * copied[group]
        for head in range(group * each, (group + 1) * each):
            own = slice(head * dim, (head + 1) * dim)
            query[own] = config.random * query[own] + config.match * keys[group]
            output = outputs[:, own]
            output.copy_(config.random * output + config.copy * copied[group].T / each)


def _look_back(decoder: Decoder, shape: ModelConfig, config: StartConfig) -> None:
    """Biases by which head k of the second layer looks `DISTANCES[k]` tokens back.

    Keys have b in FAST components, queries the same vector rotated by the distance. The score of a token d back is then
    the sum of b^2 cos(f (d - distance)) over the frequencies f, divided by the root of the head's size.
    """
    dim = shape.head_dim
    heads = shape.num_attention_heads
    bias = decoder.get_parameter("layers.1.self_attn.qkv_proj.bias")
    for k in range(FAST):
        frequency = shape.rope_theta ** (-2 * k / dim)
        for group in range(2):
            bias[heads * dim + group * dim + k] = config.bias
        for head, distance in enumerate(DISTANCES):
            bias[head * dim + k] = config.bias * math.cos(frequency * distance)
            bias[head * dim + k + dim // 2] = -config.bias * math.sin(frequency * distance)
