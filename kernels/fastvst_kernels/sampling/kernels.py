"""Sampling in Triton: one pass over tiles of the vocabulary, a merge, and for rows with filters a second draw.

A program of the first kernel takes a tile of rows and a tile of the vocabulary. Its logits are float32 accumulators,
which leave the registers only for rows with filters. Tiles and their order are the same for any batch, so the bits of a
row do not depend on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.sampling.device import gumbel, is_allowed, penalised, row_keys
from fastvst_kernels.sampling.filters import launch_filters
from fastvst_kernels.sampling.types import Filters, KernelInputs, KernelResults, Sampled, SamplingInputs

MERGE_WARPS = 16  # 8 spill on sm_100
# What the tile kernel writes for each row and tile, in this order: the best logit with noise; the drawn token's logit
# as drawn from, and as it is; maximum and sum of exp(x - maximum) of the logits as they are; both as drawn from.
FIGURES = 7


def settings(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, tokens, hidden entries of a tile, warps, pipeline stages), the same for any batch.

    64 rows fill a wgmma; with fewer rows the pass is bound by reading the weight. The tiles compile without spills on
    sm_80, 90, 100 and 120 (64 x 128 spill there with a temperature and a penalty). They are not timed.
    """
    return (16, 64, 32, 4, 2) if dtype == torch.float32 else (64, 64, 64, 8, 4)


@triton.jit(do_not_specialize=["rows", "row_tiles", "tiles"])
def tile_kernel(
    hidden_ptr,
    weight_ptr,
    seeds_ptr,
    steps_ptr,
    temperature_ptr,
    forbidden_ptr,
    penalty_ptr,
    seen_ptr,
    slots_ptr,
    logits_ptr,
    parts_ptr,
    index_ptr,
    rows,
    vocabulary,
    width,
    row_tiles,
    tiles,
    stride_hidden,
    stride_weight,
    stride_seen,
    BANNED: tl.constexpr,
    TEMPERED: tl.constexpr,
    PENALTY: tl.constexpr,
    STORE: tl.constexpr,
    MASK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Draw one token of a tile of the vocabulary for each row of a tile of rows.

    x = hidden @ weight.T; own = penalised(x) / temperature; drawn = argmax over allowed tokens of own + Gumbel noise.
    Grid: (tiles * row_tiles,), rows fastest, so that a tile of the weight is read from memory once.

    hidden (rows, width); weight (vocabulary, width); seeds, steps (rows,) int64; temperature, penalty (rows,) float32;
    forbidden (BANNED,) int64; seen (rows, vocabulary) uint8; slots (rows,) int32, -1 = no filters.
    parts (FIGURES, rows, tiles) float32; index (rows, tiles) int32, the drawn tokens; logits (slots, vocabulary)
    float32, x of the rows with filters (STORE).
    """
    tile = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < rows
    exists = token < vocabulary
    k = tl.arange(0, BLOCK_K)
    hidden = hidden_ptr + row.to(tl.int64)[:, None] * stride_hidden + k[None, :]
    weight = weight_ptr + token.to(tl.int64)[:, None] * stride_weight + k[None, :]
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        if MASK_WIDTH:
            inside = (start + k < width)[None, :]
            a = tl.load(hidden + start, mask=real[:, None] & inside, other=0.0)
            b = tl.load(weight + start, mask=exists[:, None] & inside, other=0.0)
        else:
            a = tl.load(hidden + start, mask=real[:, None], other=0.0)
            b = tl.load(weight + start, mask=exists[:, None], other=0.0)
        x = tl.dot(a, tl.trans(b), x, input_precision="ieee")

    if STORE:
        slot = tl.load(slots_ptr + row, mask=real, other=-1)
        place = slot.to(tl.int64)[:, None] * vocabulary + token[None, :]
        tl.store(logits_ptr + place, x, mask=(slot >= 0)[:, None] & exists[None, :])
    allowed = is_allowed(token, vocabulary, forbidden_ptr, BANNED)
    top = tl.max(tl.where(exists[None, :], x, float("-inf")), 1)
    total = tl.sum(tl.where(exists[None, :], tl.exp(x - top[:, None]), 0.0), 1)
    place = row.to(tl.int64) * tiles + tile
    stride = tl.full([], 1, tl.int64) * rows * tiles  # rows may be a plain 1
    tl.store(parts_ptr + 3 * stride + place, top, mask=real)
    tl.store(parts_ptr + 4 * stride + place, total, mask=real)
    own = x
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    random = tl.full([BLOCK_M], 1.0, tl.float32)
    marks = seen_ptr + row.to(tl.int64) * stride_seen
    if PENALTY:
        factor = tl.load(penalty_ptr + row, mask=real, other=1.0)
        seen = tl.load(marks[:, None] + token[None, :], mask=real[:, None] & allowed[None, :], other=0)
        own = penalised(own, factor[:, None], seen != 0)
    if TEMPERED:
        temperature = tl.load(temperature_ptr + row, mask=real, other=1.0)
        random = tl.where(temperature == 0, 0.0, 1.0)
        scale = 1 / tl.where(temperature == 0, 1.0, temperature)
        own = own * scale[:, None]
    if TEMPERED or PENALTY:
        top = tl.max(tl.where(exists[None, :], own, float("-inf")), 1)
        total = tl.sum(tl.where(exists[None, :], tl.exp(own - top[:, None]), 0.0), 1)
        tl.store(parts_ptr + 5 * stride + place, top, mask=real)
        tl.store(parts_ptr + 6 * stride + place, total, mask=real)
    first, second = row_keys(tl.load(seeds_ptr + row, mask=real, other=0), tl.load(steps_ptr + row, mask=real, other=0))
    noisy = own + gumbel(first[:, None], second[:, None], token[None, :]) * random[:, None]
    best, where = tl.max(tl.where(allowed[None, :], noisy, float("-inf")), 1, return_indices=True)
    at = tl.sum(tl.where(tl.arange(0, BLOCK_N)[None, :] == where[:, None], x, 0.0), 1)
    where += tile * BLOCK_N
    tl.store(parts_ptr + place, best, mask=real)
    tl.store(index_ptr + place, where, mask=real)
    tl.store(parts_ptr + 2 * stride + place, at, mask=real)
    if TEMPERED or PENALTY:  # the logit as drawn from is computed again: there are no registers to keep it in
        if PENALTY:
            at = penalised(at, factor, tl.load(marks + where, mask=real & (where < vocabulary), other=0) != 0)
        tl.store(parts_ptr + stride + place, at * scale, mask=real)


@triton.jit
def merge_logprob(
    parts_ptr,
    at,
    tops,
    sums,
    stride,
    part,
    real,
    picked,
):
    """(logit - logsumexp, logsumexp) of one row, from the figures `at` (logit), `tops` and `sums` of its tiles."""
    top = tl.load(parts_ptr + tops * stride + part, mask=real, other=float("-inf"))
    total = tl.load(parts_ptr + sums * stride + part, mask=real, other=0.0)
    logit = tl.load(parts_ptr + at * stride + part, mask=picked, other=0.0)
    most = tl.max(top, 0)
    log = tl.log(tl.sum(tl.where(real, total * tl.exp(top - most), 0.0), 0))
    return tl.sum(logit, 0) - most - log, most + log


@triton.jit(do_not_specialize=["rows", "tiles"])
def merge_kernel(
    parts_ptr,
    index_ptr,
    temperature_ptr,
    tokens_ptr,
    own_ptr,
    raw_ptr,
    lse_ptr,
    rows,
    tiles,
    TEMPERED: tl.constexpr,
    PENALTY: tl.constexpr,
    P: tl.constexpr,
):
    """Choose the best of one row's tiles. Grid: (rows,).

    token = that of the tile with the largest noisy logit; log p = logit - logsumexp over all tiles.

    parts (FIGURES, rows, tiles) float32 and index (rows, tiles) int32 of `tile_kernel`; temperature (rows,) float32.
    tokens (rows,) int64; own, raw (rows,) float32, log-probabilities as drawn from and of the logits as they are; lse
    (rows,) float32, logsumexp of the logits as they are.
    """
    row = tl.program_id(0)
    part = tl.arange(0, P)
    real = part < tiles
    stride = tl.full([], 1, tl.int64) * rows * tiles  # rows may be a plain 1
    place = row.to(tl.int64) * tiles + part
    best = tl.argmax(tl.load(parts_ptr + place, mask=real, other=float("-inf")), 0)
    picked = real & (part == best)
    tl.store(tokens_ptr + row, tl.sum(tl.load(index_ptr + place, mask=picked, other=0), 0).to(tl.int64))
    raw, lse = merge_logprob(parts_ptr, 2, 3, 4, stride, place, real, picked)
    own = raw
    if TEMPERED or PENALTY:
        own, ignored = merge_logprob(parts_ptr, 1, 5, 6, stride, place, real, picked)
    if TEMPERED:
        own = tl.where(tl.load(temperature_ptr + row) == 0, raw, own)
    tl.store(own_ptr + row, own)
    tl.store(raw_ptr + row, raw)
    tl.store(lse_ptr + row, lse)


def sample(inputs: SamplingInputs) -> Sampled:
    """Launch the kernels; arguments and results as in `fastvst_kernels.sample_tokens`."""
    rows = inputs.hidden.shape[0]
    device = inputs.hidden.device
    own, raw, lse = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    results = KernelResults(torch.empty(rows, dtype=torch.int64, device=device), own, raw, lse)
    if rows:
        tensors = _kernel_inputs(inputs)
        parts, index, logits = _launch_tiles(tensors, inputs.filters)
        _launch_merge(tensors, parts, index, results)
        if inputs.filters is not None and len(inputs.filters.rows):
            launch_filters(tensors, inputs.filters, logits, results)
    return results.tokens, results.own, results.raw


def _kernel_inputs(inputs: SamplingInputs) -> KernelInputs:
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (inputs.hidden, inputs.weight))
    optional = (inputs.temperature, inputs.forbidden, inputs.penalty)
    temperature, forbidden, penalty = (inputs.seeds if x is None else x.contiguous() for x in optional)
    return KernelInputs(
        hidden=hidden,
        weight=weight,
        seeds=inputs.seeds.contiguous(),
        steps=inputs.steps.contiguous(),
        temperature=temperature,
        forbidden=forbidden,
        penalty=penalty,
        seen=inputs.seeds if inputs.seen is None else inputs.seen.contiguous().view(torch.uint8),
        stride_seen=0 if inputs.seen is None else weight.shape[0],
        flags={
            "BANNED": 0 if inputs.forbidden is None else len(inputs.forbidden),
            "TEMPERED": inputs.temperature is not None,
            "PENALTY": inputs.penalty is not None,
        },
    )


def _launch_tiles(tensors: KernelInputs, filters: Filters | None) -> tuple[Tensor, Tensor, Tensor]:
    """parts, index and logits of `tile_kernel`; without filters logits is a pointer that no kernel reads."""
    hidden = tensors.hidden
    rows, width = hidden.shape
    vocabulary = tensors.weight.shape[0]
    block_m, block_n, block_k, warps, stages = settings(hidden.dtype)
    row_tiles = triton.cdiv(rows, block_m)
    tiles = triton.cdiv(vocabulary, block_n)
    parts = torch.empty((FIGURES, rows, tiles), dtype=torch.float32, device=hidden.device)
    index = torch.empty((rows, tiles), dtype=torch.int32, device=hidden.device)
    slots = index
    logits = parts
    if filters is not None:
        count = len(filters.rows)
        slots = torch.full((rows,), -1, dtype=torch.int32, device=hidden.device)
        slots.index_copy_(0, filters.rows, torch.arange(count, dtype=torch.int32, device=hidden.device))
        logits = torch.empty((count, vocabulary), dtype=torch.float32, device=hidden.device)
    tile_kernel[(tiles * row_tiles,)](
        hidden,
        tensors.weight,
        tensors.seeds,
        tensors.steps,
        tensors.temperature,
        tensors.forbidden,
        tensors.penalty,
        tensors.seen,
        slots,
        logits,
        parts,
        index,
        rows,
        vocabulary,
        width,
        row_tiles,
        tiles,
        hidden.stride(0),
        tensors.weight.stride(0),
        tensors.stride_seen,
        **tensors.flags,
        STORE=filters is not None,
        MASK_WIDTH=width % block_k != 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return parts, index, logits


def _launch_merge(tensors: KernelInputs, parts: Tensor, index: Tensor, results: KernelResults) -> None:
    rows, tiles = index.shape
    merge_kernel[(rows,)](
        parts,
        index,
        tensors.temperature,
        results.tokens,
        results.own,
        results.raw,
        results.lse,
        rows,
        tiles,
        TEMPERED=tensors.flags["TEMPERED"],
        PENALTY=tensors.flags["PENALTY"],
        P=triton.next_power_of_2(tiles),
        num_warps=MERGE_WARPS,
    )
