"""Greedy decoding with a KV cache: small, exact, and the reference for anything faster."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst.data.batch import EncodedSample, pack
from fastvst.model import ModelConfig, Qwen25VL
from fastvst_kernels import packed_attention


@dataclass(frozen=True)
class Cache:
    """Keys and values of B sequences at their own lengths; n = longest prompt + new tokens.

    Attributes:
        keys, values: (layers, B, n, KV heads, head_dim); row i of a sequence is its token i.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, sequences: int, tokens: int, like: Tensor) -> Cache:
        shape = (config.num_hidden_layers, sequences, tokens, config.num_key_value_heads, config.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def store(self, layer: int, sequences: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k, v (T, heads, head_dim) of T tokens at (sequences (T,), rows (T,))."""
        self.keys[layer, sequences, rows] = k
        self.values[layer, sequences, rows] = v


@torch.inference_mode()
def greedy(
    model: Qwen25VL,
    samples: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    forbidden_token_ids: Collection[int] = (),
) -> list[list[int]]:
    """The most likely continuation of every prompt, token by token.

    All prompts go through the model as one packed row; decoding then runs them as one batch until each has stopped.
    Text positions go on from each prompt's last token, on all three axes.

    Args:
        samples: prompts, encoded with `add_generation_prompt=True`; they need not be equally long.
        max_new_tokens: at most that many tokens each.
        stop_token_ids: a sequence ends when one of them is the choice; it is not returned.
        forbidden_token_ids: never chosen (picture placeholders, for instance).

    Returns:
        for each sample the new token ids, without the stop token.

    Raises:
        ValueError: no tokens to generate, or an empty prompt.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    empty = [f"{s.source}/{s.id}" for s in samples if len(s) == 0]
    if empty:
        raise ValueError(f"the prompts {empty} have no tokens")
    if not samples:
        return []
    weight = model.head_weight
    device, count = weight.device, len(samples)
    batch = pack(samples).to(device)
    lengths = torch.tensor([len(s) for s in samples], device=device)
    sequences = torch.repeat_interleave(torch.arange(count, device=device), lengths)
    rows = torch.arange(batch.num_tokens, device=device) - batch.cu_seqlens.long()[sequences]
    embedded = model.embed(batch)
    cache = Cache.empty(model.config, count, batch.max_seqlen + max_new_tokens, embedded)
    forbidden = torch.tensor(sorted(forbidden_token_ids), dtype=torch.long, device=device)
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.long, device=device)

    def prefill(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.store(layer, sequences, rows, k, v)
        return packed_attention(q, k, v, batch.cu_seqlens, causal=True, max_seqlen=batch.max_seqlen)

    def choose(hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return logits.index_fill_(1, forbidden, float("-inf")).argmax(-1)

    hidden = model.model(embedded, batch.positions, prefill)
    last = batch.cu_seqlens[1:].long() - 1
    tokens = choose(hidden[last])
    positions = batch.positions[:, last].amax(0) + 1
    chosen, done = [tokens], torch.isin(tokens, stops)
    for step in range(max_new_tokens - 1):
        if bool(done.all()):  # the one place where the host waits for the device
            break
        attend = _decode_attention(cache, lengths + step)
        hidden = model.model(model.model.embed_tokens(tokens), (positions + step).expand(3, -1), attend)
        tokens = choose(hidden)
        chosen.append(tokens)
        done |= torch.isin(tokens, stops)
    stop_set = set(stop_token_ids)
    return [_until(row, stop_set) for row in torch.stack(chosen, dim=1).tolist()]


def _decode_attention(cache: Cache, lengths: Tensor):
    """Attention of one new token per sequence, which becomes row `lengths` of the cache."""
    sequences = torch.arange(lengths.shape[0], device=lengths.device)
    visible = torch.arange(cache.keys.shape[2], device=lengths.device) <= lengths[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.store(layer, sequences, lengths, k, v)
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            cache.keys[layer].transpose(1, 2),
            cache.values[layer].transpose(1, 2),
            attn_mask=visible[:, None, None],
            enable_gqa=True,
        )
        return out.squeeze(2)

    return attend


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    """Tokens before the first stop token."""
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[:index]
    return tokens
