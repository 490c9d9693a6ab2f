"""Sampling in plain PyTorch with all logits at once; the rollout engine uses its parts on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.sampling.types import Sampled, SamplingInputs

MASK = 0xFFFFFFFF
# Below it the kernel takes four terms of the series of -log(1 - v); what is left out is under 8e-10 of the result.
SERIES_LIMIT = 2.0**-7


def sample_tokens_reference(inputs: SamplingInputs) -> Sampled:
    """The formula of `sample_tokens`."""
    raw = head_logits(inputs.hidden, inputs.weight)
    own = raw
    dtype = raw.dtype
    forbidden = inputs.forbidden
    if inputs.penalty is not None and inputs.seen is not None:
        seen = inputs.seen if forbidden is None else inputs.seen.index_fill(1, forbidden, False)
        factor = inputs.penalty.to(dtype)[:, None]
        own = torch.where(seen, torch.where(own > 0, own / factor, own * factor), own)
    greedy = None
    if inputs.temperature is not None:
        greedy = inputs.temperature == 0
        own = own * torch.where(greedy, 1.0, 1 / inputs.temperature).to(dtype)[:, None]
    possible = own if forbidden is None else own.index_fill(1, forbidden, float("-inf"))
    lse = torch.logsumexp(own, 1)
    filters = inputs.filters
    if filters is not None:
        kept = possible.index_select(0, filters.rows)
        apply_filters_(kept, filters.top_k[:, None], filters.top_p[:, None], filters.min_p[:, None])
        possible = possible.index_copy(0, filters.rows, kept)
        lse = lse.index_copy(0, filters.rows, torch.logsumexp(kept, 1))
    noise = gumbel(inputs.seeds, inputs.steps, inputs.weight.shape[0], dtype)
    if greedy is not None:
        noise = torch.where(greedy[:, None], 0.0, noise)
    tokens = (possible + noise).argmax(1)
    at = tokens[:, None]
    raw_logprobs = raw.gather(1, at).squeeze(1) - torch.logsumexp(raw, 1)
    logprobs = own.gather(1, at).squeeze(1) - lse
    return tokens, logprobs if greedy is None else torch.where(greedy, raw_logprobs, logprobs), raw_logprobs


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(B, V) in float32 (float64 for float64): half-precision products keep the accumulator's precision on a GPU."""
    if hidden.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(hidden.float(), weight.float())


def apply_filters_(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Set logits (c, V) outside each row's top_k, top_p and min_p sets to -inf, in place; the three are (c, 1).

    Of equal logits at the border all stay.
    """
    ordered = logits.sort(dim=1, descending=True).values
    rank = torch.arange(ordered.shape[1], device=logits.device)
    kept = ordered.masked_fill(rank >= top_k, float("-inf"))
    p = torch.softmax(kept, 1)
    before = p.cumsum(1) - p
    # The first token always stays: nothing is before it. With a top_p of 1 rounding must not remove the tail.
    inside = ((before < top_p) | (top_p >= 1)) & (kept >= ordered[:, :1] + torch.log(min_p)) & (kept > float("-inf"))
    border = ordered.gather(1, inside.sum(1, keepdim=True).clamp(min=1) - 1)
    logits.masked_fill_(logits < border, float("-inf"))


def gumbel(seeds: Tensor, steps: Tensor, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, V) of `dtype`: Gumbel noise of each row's int64 seed and step, for every token.

    A 32-bit hash h gives v = (h + 1/2) / 2**32 and the noise -log(-log(1 - v)). The largest noise comes from small v,
    which have all 32 bits. In float32 a uniform number near 1 has only 24 bits, which would distort the frequency of
    tokens less likely than 1e-6.
    """
    first, second = row_keys(seeds, steps)
    token = torch.arange(vocabulary, device=seeds.device)
    h = mix(first[:, None] + token * 0x9E3779B9 & MASK)
    h = mix(h ^ second[:, None])
    v = h.to(dtype) * 2.0**-32 + 2.0**-33
    # The bound keeps the noise above -inf, even in float32: a row with one possible token needs a finite score.
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))


def row_keys(seeds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit numbers for each row, in int64, from all bits of its seed and the low 32 bits of its step."""
    low = seeds & MASK
    high = seeds >> 32 & MASK
    step = steps & MASK
    first = mix(low ^ mix(step ^ mix(high ^ 0x9E3779B9)))
    return first, mix(high ^ mix(step ^ mix(low ^ 0x85EBCA6B)))


def mix(x: Tensor) -> Tensor:
    """A bijective 32-bit hash on int64 values of 0 .. 2**32 - 1: triple32 of C. Wellons' hash-prospector."""
    x = (x ^ x >> 17) * 0xED5AD4BB & MASK
    x = (x ^ x >> 11) * 0xAC4C1B51 & MASK
    x = (x ^ x >> 15) * 0x31848BAB & MASK
    return x ^ x >> 14
