"""The draw of rows with filters in Triton: find the smallest logit that stays by a search, without sorting."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.sampling.device import gumbel, is_allowed, penalised, row_keys
from fastvst_kernels.sampling.types import Filters, KernelInputs, KernelResults

BLOCK = 4096
FILTER_WARPS = 16  # a thread holds 8 logits of one step


@triton.jit
def sort_key(x):
    """uint32 numbers in the order of the floats x."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def from_sort_key(key):
    """The float of a `sort_key`."""
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_own(
    logits_ptr,
    seen_ptr,
    forbidden_ptr,
    token,
    vocabulary,
    factor,
    scale,
    BANNED: tl.constexpr,
    PENALTY: tl.constexpr,
):
    """Logits of one row as drawn from and as they are; -inf where a token may not be drawn."""
    allowed = is_allowed(token, vocabulary, forbidden_ptr, BANNED)
    raw = tl.load(logits_ptr + token, mask=allowed, other=float("-inf"))
    own = raw
    if PENALTY:
        own = penalised(own, factor, tl.load(seen_ptr + token, mask=allowed, other=0) != 0)
    return own * scale, raw


@triton.jit
def measure(
    key,
    e,
    border,
    COUNT: tl.constexpr,
):
    """1 for each entry at or above the border (COUNT), or its weight e."""
    above = key >= border
    if COUNT:
        return above.to(tl.float32)
    return tl.where(above, e, 0.0)


@triton.jit
def search(
    logits_ptr,
    seen_ptr,
    forbidden_ptr,
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
    """The largest key with at least `goal` entries at or above it (COUNT), or with entries of weight `goal`.

    The weight of an entry is exp(x - top). Each of 16 passes over the row finds 2 bits of the key. Counts are exact in
    float32: a vocabulary has fewer than 2**24 tokens.
    """
    prefix = tl.zeros([], tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for turn in range(16):  # noqa: B007
        one = tl.zeros([BLOCK], tl.float32)
        two = tl.zeros([BLOCK], tl.float32)
        three = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x, raw = load_own(logits_ptr, seen_ptr, forbidden_ptr, token, vocabulary, factor, scale, BANNED, PENALTY)
            key = tl.where(token < vocabulary, sort_key(x), 0)
            e = tl.exp(x - top)
            one += measure(key, e, prefix + unit, COUNT)
            two += measure(key, e, prefix + 2 * unit, COUNT)
            three += measure(key, e, prefix + 3 * unit, COUNT)
        # The three sums decrease, so the number of those that reach the goal is the digit.
        reached = (tl.sum(one, 0) >= goal).to(tl.uint32) + (tl.sum(two, 0) >= goal).to(tl.uint32)
        prefix += unit * (reached + (tl.sum(three, 0) >= goal).to(tl.uint32))
        unit = unit >> 2
    return prefix


@triton.jit
def filter_kernel(
    logits_ptr,
    filtered_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    temperature_ptr,
    forbidden_ptr,
    penalty_ptr,
    seen_ptr,
    lse_ptr,
    tokens_ptr,
    own_ptr,
    raw_ptr,
    vocabulary,
    stride_seen,
    BANNED: tl.constexpr,
    TEMPERED: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the smallest logit that one row's filters keep, and draw among the tokens that they keep. Grid: (slots,).

    border = max(top_k's, top_p's, min_p's); drawn = argmax over own >= border of own + Gumbel noise.

    logits (slots, vocabulary) float32 of `tile_kernel`; filtered (slots,) int64, the rows; top_k (slots,) int64; top_p,
    min_p (slots,) float32; lse (rows,) float32 of `merge_kernel`; the other inputs as in `tile_kernel`.
    tokens, own, raw (rows,): overwrites the rows' entries of `merge_kernel`.
    """
    slot = tl.program_id(0)
    row = tl.load(filtered_ptr + slot)
    logits_ptr += slot.to(tl.int64) * vocabulary
    seen_ptr += row * stride_seen
    scale = 1.0
    factor = 1.0
    if TEMPERED:
        scale = 1 / tl.load(temperature_ptr + row)
    if PENALTY:
        factor = tl.load(penalty_ptr + row)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x, raw = load_own(logits_ptr, seen_ptr, forbidden_ptr, token, vocabulary, factor, scale, BANNED, PENALTY)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, 0)

    border = tl.zeros([], tl.uint32)
    top_k = tl.load(top_k_ptr + slot).to(tl.float32)
    top_p = tl.load(top_p_ptr + slot)
    if top_k < vocabulary:
        border = search(
            logits_ptr,
            seen_ptr,
            forbidden_ptr,
            top_k,
            top,
            vocabulary,
            factor,
            scale,
            BANNED,
            PENALTY,
            COUNT=True,
            BLOCK=BLOCK,
        )
    if top_p < 1:
        # The weight of exactly top_k tokens: of equal logits at the border it counts as many as top_k leaves room for.
        sums = tl.zeros([BLOCK], tl.float32)
        above = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x, raw = load_own(logits_ptr, seen_ptr, forbidden_ptr, token, vocabulary, factor, scale, BANNED, PENALTY)
            more = (sort_key(x) > border) & (token < vocabulary)
            sums += tl.where(more, tl.exp(x - top), 0.0)
            above += more.to(tl.float32)
        total = tl.sum(sums, 0)
        if top_k < vocabulary:
            total += (top_k - tl.sum(above, 0)) * tl.exp(from_sort_key(border) - top)
        nucleus = search(
            logits_ptr,
            seen_ptr,
            forbidden_ptr,
            top_p * total,
            top,
            vocabulary,
            factor,
            scale,
            BANNED,
            PENALTY,
            COUNT=False,
            BLOCK=BLOCK,
        )
        border = tl.maximum(border, nucleus)
    border = tl.maximum(border, sort_key(top + tl.log(tl.load(min_p_ptr + slot))))
    border = tl.minimum(border, sort_key(top))  # the most likely token always stays

    first, second = row_keys(tl.load(seeds_ptr + row), tl.load(steps_ptr + row))
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    drawn = tl.zeros([BLOCK], tl.int32)
    own_at = tl.zeros([BLOCK], tl.float32)
    raw_at = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x, raw = load_own(logits_ptr, seen_ptr, forbidden_ptr, token, vocabulary, factor, scale, BANNED, PENALTY)
        stays = (sort_key(x) >= border) & (token < vocabulary)
        total += tl.where(stays, tl.exp(x - top), 0.0)
        noisy = tl.where(stays, x + gumbel(first, second, token), float("-inf"))
        better = noisy > best
        best = tl.where(better, noisy, best)
        drawn = tl.where(better, token, drawn)
        own_at = tl.where(better, x, own_at)
        raw_at = tl.where(better, raw, raw_at)
    chosen = tl.arange(0, BLOCK) == tl.argmax(best, 0)
    tl.store(tokens_ptr + row, tl.sum(tl.where(chosen, drawn, 0), 0).to(tl.int64))
    tl.store(own_ptr + row, tl.sum(tl.where(chosen, own_at, 0.0), 0) - top - tl.log(tl.sum(total, 0)))
    tl.store(raw_ptr + row, tl.sum(tl.where(chosen, raw_at, 0.0), 0) - tl.load(lse_ptr + row))


def launch_filters(tensors: KernelInputs, filters: Filters, logits: Tensor, results: KernelResults) -> None:
    """Draw in the rows with filters again; logits (slots, V) of `kernels.tile_kernel`, results of `merge_kernel`."""
    filter_kernel[(len(filters.rows),)](
        logits,
        filters.rows.contiguous(),
        filters.top_k.contiguous(),
        filters.top_p.contiguous(),
        filters.min_p.contiguous(),
        tensors.seeds,
        tensors.steps,
        tensors.temperature,
        tensors.forbidden,
        tensors.penalty,
        tensors.seen,
        results.lse,
        results.tokens,
        results.own,
        results.raw,
        logits.shape[1],
        tensors.stride_seen,
        **tensors.flags,
        BLOCK=BLOCK,
        num_warps=FILTER_WARPS,
    )
