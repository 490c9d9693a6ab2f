"""Triton functions that the sampling kernels share: the noise, the penalty, and which tokens may be drawn."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvst_kernels.sampling.reference import SERIES_LIMIT

GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9)
OTHER: tl.constexpr = tl.constexpr(0x85EBCA6B)
SMALL: tl.constexpr = tl.constexpr(SERIES_LIMIT)
MOST: tl.constexpr = tl.constexpr(1 - 2.0**-24)


@triton.jit
def mix(x):
    """`reference.mix` on uint32."""
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def row_keys(seed, step):
    """`reference.row_keys` as uint32."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    step = step.to(tl.uint32)
    first = mix(low ^ mix(step ^ mix(high ^ GOLDEN)))
    return first, mix(high ^ mix(step ^ mix(low ^ OTHER)))


@triton.jit
def gumbel(first, second, token):
    """`reference.gumbel` in float32."""
    h = mix(mix(first + token.to(tl.uint32) * GOLDEN) ^ second)
    v = tl.minimum(h.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, MOST)
    series = v * (1 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    return -tl.log(tl.where(v < SMALL, series, -tl.log(1 - v)))


@triton.jit
def penalised(logits, factor, seen):
    """Logits with the repetition penalty `factor` at seen tokens (arXiv 1909.05858)."""
    return tl.where(seen, tl.where(logits > 0, logits / factor, logits * factor), logits)


@triton.jit
def is_allowed(
    token,
    vocabulary,
    forbidden_ptr,
    BANNED: tl.constexpr,
):
    """Whether tokens exist and may be drawn; forbidden (BANNED,) int64."""
    allowed = token < vocabulary
    for i in tl.static_range(BANNED):
        allowed = allowed & (token != tl.load(forbidden_ptr + i).to(tl.int32))
    return allowed
