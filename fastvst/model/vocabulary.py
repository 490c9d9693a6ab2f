"""A larger vocabulary: rows for added tokens where the embedding of a checkpoint has none to spare."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from fastvst.model.qwen25vl import Qwen25VL

MULTIPLE = 128  # of the rows, as in the published models: whole tiles of the LM head, equal shards of 2 to 128 GPUs
SPREAD = 0.1  # noise of a new row, as a share of the standard deviation of the present rows


def rows_for(tokens: int, rows: int) -> int:
    """Rows of a vocabulary of `tokens` tokens: the present `rows`, or the next multiple of 128 that holds them all."""
    return rows if tokens <= rows else -(-tokens // MULTIPLE) * MULTIPLE


@torch.no_grad()
def grow_vocabulary(model: Qwen25VL, rows: int, seed: int = 0) -> None:
    """Append rows to the embedding, and to the LM head unless it is tied to it; the logits of present tokens stay.

    A new row is the mean of the present ones with some noise. The mean keeps a new token from taking the probability of
    all others (Hewitt, "Initializing new word embeddings for pretrained language models", 2021); the noise tells the
    new tokens apart.

    Args:
        model: not sharded, with weights in memory. Its config has the new `vocab_size` afterwards.
        rows: of the larger vocabulary.
        seed: of the noise.

    Raises:
        ValueError: `rows` is smaller than the vocabulary.
    """
    before = model.config.vocab_size
    if rows < before:
        raise ValueError(f"the vocabulary has {before} rows; it cannot shrink to {rows}")
    if rows == before:
        return
    embedding = model.model.embed_tokens
    embedding.weight = _longer(embedding.weight, rows, seed)
    embedding.num_embeddings = rows
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = _longer(model.lm_head.weight, rows, seed + 1)
        model.lm_head.out_features = rows
    model.config = dataclasses.replace(model.config, vocab_size=rows)


def _longer(weight: torch.Tensor, rows: int, seed: int) -> nn.Parameter:
    """The rows of `weight` (V, hidden_size), then new ones, as a parameter (rows, hidden_size) of the same dtype."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows - len(weight), weight.shape[1], generator=generator).to(weight.device)
    mean = weight.mean(dim=0, dtype=torch.float32)
    spread = weight.std(dim=0).float()  # no copy in float32: the embedding of 7B would take 2 GB
    new = mean + SPREAD * spread * noise
    return nn.Parameter(torch.cat([weight, new.to(weight.dtype)]), requires_grad=weight.requires_grad)
