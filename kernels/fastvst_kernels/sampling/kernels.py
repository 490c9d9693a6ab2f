"""Sampling in Triton: one pass over the vocabulary's tiles, a merge, and for filtered rows a search for their border.

A program of the first kernel takes a tile of rows and a tile of the vocabulary: its logits are float32 accumulators
that only leave the registers for rows with filters. Tiles and their order are the same whatever the batch, so that a
row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.sampling.op import SMALL as SERIES

GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9)
OTHER: tl.constexpr = tl.constexpr(0x85EBCA6B)
SMALL: tl.constexpr = tl.constexpr(SERIES)
MOST: tl.constexpr = tl.constexpr(1 - 2.0**-24)
BLOCK = 4096
FILTER_WARPS = 16  # logits of a step of the filter kernel: 8 in each thread
MERGE_WARPS = 16  # 8 spill on sm_100
FIGURES = 7  # of a tile: noisy best, its logit as drawn from and as it is, then maximum and sum of e of both


def settings(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, tokens, hidden entries of a tile, warps, pipeline stages), whatever the batch.

    64 rows fill a wgmma; with fewer rows the pass is bound by reading the weight anyway. Chosen to compile without
    spills on sm_80, 90, 100 and 120 (64 x 128 spill there with a temperature and a penalty); not timed.
    """
    return (16, 64, 32, 4, 2) if dtype == torch.float32 else (64, 64, 64, 8, 4)


@triton.jit
def mix(x):
    """triple32 on uint32, as `sampling.mix`."""
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def row_keys(seed, step):
    """As `sampling.row_keys`, uint32."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    step = step.to(tl.uint32)
    first = mix(low ^ mix(step ^ mix(high ^ GOLDEN)))
    return first, mix(high ^ mix(step ^ mix(low ^ OTHER)))


@triton.jit
def gumbel(first, second, token):
    """As `sampling.gumbel`, float32."""
    h = mix(mix(first + token.to(tl.uint32) * GOLDEN) ^ second)
    v = tl.minimum(h.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, MOST)
    series = v * (1 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    return -tl.log(tl.where(v < SMALL, series, -tl.log(1 - v)))


@triton.jit
def penalised(logits, factor, seen):
    return tl.where(seen, tl.where(logits > 0, logits / factor, logits * factor), logits)


@triton.jit
def is_allowed(token, vocabulary, FORBIDDEN, BANNED: tl.constexpr):
    """Tokens that exist and may be drawn."""
    allowed = token < vocabulary
    for i in tl.static_range(BANNED):
        allowed = allowed & (token != tl.load(FORBIDDEN + i).to(tl.int32))
    return allowed


@triton.jit
def tile_kernel(
    HIDDEN,
    WEIGHT,
    SEEDS,
    STEPS,
    TEMPERATURE,
    FORBIDDEN,
    FACTOR,
    SEEN,
    SLOTS,
    LOGITS,
    PARTS,
    INDEX,
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
    """Grid: tiles * row_tiles, rows fastest, so that a tile of the weight is read from memory once.

    PARTS (FIGURES, rows, tiles) float32, INDEX (rows, tiles) int32; LOGITS (slots, vocabulary) float32 of the rows
    whose SLOTS (rows,) is not -1.
    """
    tile = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < rows
    exists = token < vocabulary
    k = tl.arange(0, BLOCK_K)
    hidden = HIDDEN + row.to(tl.int64)[:, None] * stride_hidden + k[None, :]
    weight = WEIGHT + token.to(tl.int64)[:, None] * stride_weight + k[None, :]
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
        slot = tl.load(SLOTS + row, mask=real, other=-1)
        place = slot.to(tl.int64)[:, None] * vocabulary + token[None, :]
        tl.store(LOGITS + place, x, mask=(slot >= 0)[:, None] & exists[None, :])
    allowed = is_allowed(token, vocabulary, FORBIDDEN, BANNED)
    top = tl.max(tl.where(exists[None, :], x, float("-inf")), 1)
    total = tl.sum(tl.where(exists[None, :], tl.exp(x - top[:, None]), 0.0), 1)
    place = row.to(tl.int64) * tiles + tile
    stride = tl.full([], 1, tl.int64) * rows * tiles  # rows may be a plain 1
    tl.store(PARTS + 3 * stride + place, top, mask=real)
    tl.store(PARTS + 4 * stride + place, total, mask=real)
    own = x
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    random = tl.full([BLOCK_M], 1.0, tl.float32)
    marks = SEEN + row.to(tl.int64) * stride_seen
    if PENALTY:
        factor = tl.load(FACTOR + row, mask=real, other=1.0)
        seen = tl.load(marks[:, None] + token[None, :], mask=real[:, None] & allowed[None, :], other=0)
        own = penalised(own, factor[:, None], seen != 0)
    if TEMPERED:
        temperature = tl.load(TEMPERATURE + row, mask=real, other=1.0)
        random = tl.where(temperature == 0, 0.0, 1.0)
        scale = 1 / tl.where(temperature == 0, 1.0, temperature)
        own = own * scale[:, None]
    if TEMPERED or PENALTY:
        top = tl.max(tl.where(exists[None, :], own, float("-inf")), 1)
        total = tl.sum(tl.where(exists[None, :], tl.exp(own - top[:, None]), 0.0), 1)
        tl.store(PARTS + 5 * stride + place, top, mask=real)
        tl.store(PARTS + 6 * stride + place, total, mask=real)
    first, second = row_keys(tl.load(SEEDS + row, mask=real, other=0), tl.load(STEPS + row, mask=real, other=0))
    noisy = own + gumbel(first[:, None], second[:, None], token[None, :]) * random[:, None]
    best, where = tl.max(tl.where(allowed[None, :], noisy, float("-inf")), 1, return_indices=True)
    at = tl.sum(tl.where(tl.arange(0, BLOCK_N)[None, :] == where[:, None], x, 0.0), 1)
    where += tile * BLOCK_N
    tl.store(PARTS + place, best, mask=real)
    tl.store(INDEX + place, where, mask=real)
    tl.store(PARTS + 2 * stride + place, at, mask=real)
    if TEMPERED or PENALTY:  # the logit as drawn from, made anew rather than kept: registers are short
        if PENALTY:
            at = penalised(at, factor, tl.load(marks + where, mask=real & (where < vocabulary), other=0) != 0)
        tl.store(PARTS + stride + place, at * scale, mask=real)


@triton.jit
def merge_logprob(PARTS, at, tops, sums, stride, part, real, picked):
    """(logit - logsumexp, logsumexp) of one row from its tiles' figures number `at`, `tops` and `sums`."""
    top = tl.load(PARTS + tops * stride + part, mask=real, other=float("-inf"))
    total = tl.load(PARTS + sums * stride + part, mask=real, other=0.0)
    logit = tl.load(PARTS + at * stride + part, mask=picked, other=0.0)
    most = tl.max(top, 0)
    log = tl.log(tl.sum(tl.where(real, total * tl.exp(top - most), 0.0), 0))
    return tl.sum(logit, 0) - most - log, most + log


@triton.jit
def merge_kernel(
    PARTS,
    INDEX,
    TEMPERATURE,
    TOKENS,
    OWN,
    RAW,
    LSE,
    rows,
    tiles,
    TEMPERED: tl.constexpr,
    PENALTY: tl.constexpr,
    P: tl.constexpr,
):
    """One program for one row; LSE (rows,) is that of the logits as they are."""
    row = tl.program_id(0)
    part = tl.arange(0, P)
    real = part < tiles
    stride = tl.full([], 1, tl.int64) * rows * tiles  # rows may be a plain 1
    place = row.to(tl.int64) * tiles + part
    best = tl.argmax(tl.load(PARTS + place, mask=real, other=float("-inf")), 0)
    picked = real & (part == best)
    tl.store(TOKENS + row, tl.sum(tl.load(INDEX + place, mask=picked, other=0), 0).to(tl.int64))
    raw, lse = merge_logprob(PARTS, 2, 3, 4, stride, place, real, picked)
    own = raw
    if TEMPERED or PENALTY:
        own, ignored = merge_logprob(PARTS, 1, 5, 6, stride, place, real, picked)
    if TEMPERED:
        own = tl.where(tl.load(TEMPERATURE + row) == 0, raw, own)
    tl.store(OWN + row, own)
    tl.store(RAW + row, raw)
    tl.store(LSE + row, lse)


@triton.jit
def order(x):
    """uint32 that sort as the floats do."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def value(key):
    """The float of `order`."""
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_own(LOGITS, SEEN, FORBIDDEN, token, vocabulary, factor, scale, BANNED: tl.constexpr, PENALTY: tl.constexpr):
    """Logits as drawn from and as they are; -inf where a token may not be drawn."""
    allowed = is_allowed(token, vocabulary, FORBIDDEN, BANNED)
    raw = tl.load(LOGITS + token, mask=allowed, other=float("-inf"))
    own = raw
    if PENALTY:
        own = penalised(own, factor, tl.load(SEEN + token, mask=allowed, other=0) != 0)
    return own * scale, raw


@triton.jit
def measure(key, e, border, COUNT: tl.constexpr):
    """What lies at or above the border: entries, or their weight."""
    above = key >= border
    if COUNT:
        return above.to(tl.float32)
    return tl.where(above, e, 0.0)


@triton.jit
def search(
    LOGITS,
    SEEN,
    FORBIDDEN,
    goal,
    top,
    vocabulary,
    factor,
    scale,
    BANNED: tl.constexpr,
    PENALTY: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key at or above which there are `goal` entries (COUNT), or exp(x - top) of that sum; 2 bits a pass.

    Counts are exact in float32: a vocabulary has fewer than 2**24 tokens.
    """
    prefix = tl.zeros([], tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for turn in range(16):  # noqa: B007
        one = tl.zeros([BLOCK], tl.float32)
        two = tl.zeros([BLOCK], tl.float32)
        three = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x, raw = load_own(LOGITS, SEEN, FORBIDDEN, token, vocabulary, factor, scale, BANNED, PENALTY)
            key = tl.where(token < vocabulary, order(x), 0)
            e = tl.exp(x - top)
            one += measure(key, e, prefix + unit, COUNT)
            two += measure(key, e, prefix + 2 * unit, COUNT)
            three += measure(key, e, prefix + 3 * unit, COUNT)
        # The three fall, so their number is the digit.
        reached = (tl.sum(one, 0) >= goal).to(tl.uint32) + (tl.sum(two, 0) >= goal).to(tl.uint32)
        prefix += unit * (reached + (tl.sum(three, 0) >= goal).to(tl.uint32))
        unit = unit >> 2
    return prefix


@triton.jit
def filter_kernel(
    LOGITS,
    FILTERED,
    TOP_K,
    TOP_P,
    MIN_P,
    SEEDS,
    STEPS,
    TEMPERATURE,
    FORBIDDEN,
    FACTOR,
    SEEN,
    LSE,
    TOKENS,
    OWN,
    RAW,
    vocabulary,
    stride_seen,
    BANNED: tl.constexpr,
    TEMPERED: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for one row with filters: find the least logit that stays, then draw among those that do."""
    slot = tl.program_id(0)
    row = tl.load(FILTERED + slot)
    LOGITS += slot.to(tl.int64) * vocabulary
    SEEN += row * stride_seen
    scale = 1.0
    factor = 1.0
    if TEMPERED:
        scale = 1 / tl.load(TEMPERATURE + row)
    if PENALTY:
        factor = tl.load(FACTOR + row)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x, raw = load_own(LOGITS, SEEN, FORBIDDEN, token, vocabulary, factor, scale, BANNED, PENALTY)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, 0)

    border = tl.zeros([], tl.uint32)
    top_k = tl.load(TOP_K + slot).to(tl.float32)
    top_p = tl.load(TOP_P + slot)
    if top_k < vocabulary:
        border = search(LOGITS, SEEN, FORBIDDEN, top_k, top, vocabulary, factor, scale, BANNED, PENALTY, True, BLOCK)
    if top_p < 1:
        # The weight of exactly top_k tokens: of those that tie at the border only as many as there is room for.
        sums = tl.zeros([BLOCK], tl.float32)
        above = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x, raw = load_own(LOGITS, SEEN, FORBIDDEN, token, vocabulary, factor, scale, BANNED, PENALTY)
            more = (order(x) > border) & (token < vocabulary)
            sums += tl.where(more, tl.exp(x - top), 0.0)
            above += more.to(tl.float32)
        total = tl.sum(sums, 0)
        if top_k < vocabulary:
            total += (top_k - tl.sum(above, 0)) * tl.exp(value(border) - top)
        nucleus = search(
            LOGITS, SEEN, FORBIDDEN, top_p * total, top, vocabulary, factor, scale, BANNED, PENALTY, False, BLOCK
        )
        border = tl.maximum(border, nucleus)
    border = tl.maximum(border, order(top + tl.log(tl.load(MIN_P + slot))))
    border = tl.minimum(border, order(top))  # the most likely token always stays

    first, second = row_keys(tl.load(SEEDS + row), tl.load(STEPS + row))
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    drawn = tl.zeros([BLOCK], tl.int32)
    own_at = tl.zeros([BLOCK], tl.float32)
    raw_at = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x, raw = load_own(LOGITS, SEEN, FORBIDDEN, token, vocabulary, factor, scale, BANNED, PENALTY)
        stays = (order(x) >= border) & (token < vocabulary)
        total += tl.where(stays, tl.exp(x - top), 0.0)
        noisy = tl.where(stays, x + gumbel(first, second, token), float("-inf"))
        better = noisy > best
        best = tl.where(better, noisy, best)
        drawn = tl.where(better, token, drawn)
        own_at = tl.where(better, x, own_at)
        raw_at = tl.where(better, raw, raw_at)
    chosen = tl.arange(0, BLOCK) == tl.argmax(best, 0)
    tl.store(TOKENS + row, tl.sum(tl.where(chosen, drawn, 0), 0).to(tl.int64))
    tl.store(OWN + row, tl.sum(tl.where(chosen, own_at, 0.0), 0) - top - tl.log(tl.sum(total, 0)))
    tl.store(RAW + row, tl.sum(tl.where(chosen, raw_at, 0.0), 0) - tl.load(LSE + row))


def sample(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    steps: Tensor,
    temperature: Tensor | None,
    forbidden: Tensor | None,
    penalty: Tensor | None,
    seen: Tensor | None,
    filtered: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels; arguments as in `fastvst_kernels.sample_tokens`."""
    rows = hidden.shape[0]
    vocabulary = weight.shape[0]
    device = hidden.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    own, raw, lse = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    if rows == 0:
        return tokens, own, raw
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    block_m, block_n, block_k, warps, stages = settings(hidden.dtype)
    row_tiles = -(-rows // block_m)
    tiles = -(-vocabulary // block_n)
    parts = torch.empty((FIGURES, rows, tiles), dtype=torch.float32, device=device)
    index = torch.empty((rows, tiles), dtype=torch.int32, device=device)
    slots = index
    logits = parts  # stand-ins that are not read
    if filtered is not None:
        slots = torch.full((rows,), -1, dtype=torch.int32, device=device)
        slots.index_copy_(0, filtered, torch.arange(len(filtered), dtype=torch.int32, device=device))
        logits = torch.empty((len(filtered), vocabulary), dtype=torch.float32, device=device)
    marks = index if seen is None else seen.contiguous().view(torch.uint8)
    stride_seen = 0 if seen is None else vocabulary
    heat, banned, factor = (parts if x is None else x.contiguous() for x in (temperature, forbidden, penalty))
    flags = {
        "BANNED": 0 if forbidden is None else len(forbidden),
        "TEMPERED": temperature is not None,
        "PENALTY": penalty is not None,
    }
    seeds = seeds.contiguous()
    steps = steps.contiguous()
    tile_kernel[(tiles * row_tiles,)](
        hidden,
        weight,
        seeds,
        steps,
        heat,
        banned,
        factor,
        marks,
        slots,
        logits,
        parts,
        index,
        rows,
        vocabulary,
        hidden.shape[1],
        row_tiles,
        tiles,
        hidden.stride(0),
        weight.stride(0),
        stride_seen,
        **flags,
        STORE=filtered is not None,
        MASK_WIDTH=hidden.shape[1] % block_k != 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    merge_kernel[(rows,)](
        parts,
        index,
        heat,
        tokens,
        own,
        raw,
        lse,
        rows,
        tiles,
        TEMPERED=flags["TEMPERED"],
        PENALTY=flags["PENALTY"],
        P=triton.next_power_of_2(tiles),
        num_warps=MERGE_WARPS,
    )
    if filtered is not None and top_k is not None and top_p is not None and min_p is not None and len(filtered):
        filter_kernel[(len(filtered),)](
            logits,
            filtered,
            top_k,
            top_p,
            min_p,
            seeds,
            steps,
            heat,
            banned,
            factor,
            marks,
            lse,
            tokens,
            own,
            raw,
            vocabulary,
            stride_seen,
            **flags,
            BLOCK=BLOCK,
            num_warps=FILTER_WARPS,
        )
    return tokens, own, raw
