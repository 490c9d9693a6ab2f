"""Window attention in Triton: one program for a window of up to 64 patches and one head, all of it in registers.

Bias and 2-D rotary embedding are applied to q and k as they are loaded. A head is read as its two halves, which are the
two sides of every rotated pair, so that rotating moves nothing between threads: q k^T is the sum of two products.
The backward computes the probabilities again and needs only the inputs of the forward.

The halves come in steps of PAIRS pairs, each loaded where it is used; only the scores stay in registers as a whole.
Steps of 16 cover the halves of D = 80 with 48 columns instead of 64, and what the backward reads twice is in L1. The
steps are loops of the program because the compiler mixes unrolled ones (backward on sm_80, 8 warps: 255 registers
instead of 226).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.rope.kernels import cosine_sine
from fastvst_kernels.rope.op import inverse_frequencies
from fastvst_kernels.shared.partial_sums import partial_sums
from fastvst_kernels.shared.tile_tables import next_power
from fastvst_kernels.window.inputs import LARGEST_WINDOW, WindowInputs


@triton.jit
def load_halves(
    base_ptr,
    head_bias_ptr,
    row,
    pair,
    limit,
    stride,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The two halves (rows, pairs) of one head plus its bias, as float32; rows from `limit` on are 0.

    The mask behind the bias is for the compiler. What follows from loads by elementwise steps alone it computes in the
    layout of a matrix operand, for mma.sync once in every warp (forward on sm_80: 13488 instructions, 5 KB of spills).
    """
    mask = (row < limit)[:, None] & (pair < HALF)[None, :]
    at = row[:, None] * stride + pair[None, :]
    a = tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(head_bias_ptr + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        b += tl.load(head_bias_ptr + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    inside = (row < limit)[:, None]
    return tl.where(inside, a, 0.0), tl.where(inside, b, 0.0)


@triton.jit
def store_halves(
    base_ptr,
    a,
    b,
    row,
    pair,
    limit,
    stride,
    HALF: tl.constexpr,
):
    """Write the two halves (rows, pairs) of one head; rows from `limit` on are left out."""
    mask = (row < limit)[:, None] & (pair < HALF)[None, :]
    at = row[:, None] * stride + pair[None, :]
    tl.store(base_ptr + at, a.to(base_ptr.dtype.element_ty), mask=mask)
    tl.store(base_ptr + at + HALF, b.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def window_angles(
    positions_ptr,
    frequencies_ptr,
    row,
    pair,
    limit,
    stride_patch,
    stride_axis,
    HALF: tl.constexpr,
):
    """(rows, pairs) cosines and sines: the first half of the pairs turns with the row, the second with the column."""
    axis = (pair >= HALF // 2).to(tl.int32)
    mask = (row < limit)[:, None] & (pair < HALF)[None, :]
    at = row[:, None] * stride_patch + axis[None, :] * stride_axis
    angles = tl.load(positions_ptr + at, mask=mask, other=0).to(tl.float32)
    angles *= tl.load(frequencies_ptr + pair, mask=pair < HALF, other=0.0)[None, :]
    return cosine_sine(angles)


@triton.jit
def rotated_halves(
    base_ptr,
    head_bias_ptr,
    cos,
    sin,
    row,
    pair,
    limit,
    stride,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The two halves of q or k with bias and rotary embedding, in the stored dtype."""
    a, b = load_halves(base_ptr, head_bias_ptr, row, pair, limit, stride, HALF, HAS_BIAS)
    dtype = base_ptr.dtype.element_ty
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def probabilities(
    q_ptr,
    k_ptr,
    q_bias_ptr,
    k_bias_ptr,
    positions_ptr,
    frequencies_ptr,
    row,
    limit,
    scale,
    stride_qkv,
    stride_patch,
    stride_axis,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(ROWS, ROWS) float32 softmax(Q K^T * scale) of one window and head, queries first.

    Rows from `limit` on hold finite numbers that are never stored.
    """
    scores = tl.zeros([ROWS, ROWS], tl.float32)
    for first in tl.range(0, HALF, PAIRS, num_stages=1):
        pair = first + tl.arange(0, PAIRS)
        cos, sin = window_angles(positions_ptr, frequencies_ptr, row, pair, limit, stride_patch, stride_axis, HALF)
        qa, qb = rotated_halves(q_ptr, q_bias_ptr, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        ka, kb = rotated_halves(k_ptr, k_bias_ptr, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        scores = tl.dot(qa, tl.trans(ka), scores, input_precision="ieee")
        scores = tl.dot(qb, tl.trans(kb), scores, input_precision="ieee")
    scores = tl.where((row < limit)[None, :], scores * (scale * 1.4426950408889634), float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit(do_not_specialize=["patches"])
def window_forward_kernel(
    qkv_ptr,
    bias_ptr,
    positions_ptr,
    frequencies_ptr,
    cu_windows_ptr,
    out_ptr,
    scale,
    patches,
    heads,
    stride_qkv,
    stride_patch,
    stride_axis,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """O = softmax(R(Q) R(K)^T * scale) V inside a window; R adds the rotary embedding, Q, K and V carry their bias.

    One program computes one head of one window. Grid: (windows * heads,).

    Args:
        qkv_ptr: (patches, 3 * heads * D), D = 2 * HALF; bias_ptr: (3 * heads * D,), read with HAS_BIAS only.
        positions_ptr: (patches, 2) integers with strides stride_patch, stride_axis. frequencies_ptr: (HALF,) float32.
        cu_windows_ptr: (windows + 1,) offsets. out_ptr: (patches, heads * D).
        PAIRS: rotary pairs of a step. ROWS: a power of two, at least the patches of the largest window.
    """
    window = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    # Wrong offsets must not become addresses outside the tensors; `validate=True` reports them.
    begin = tl.minimum(tl.maximum(tl.load(cu_windows_ptr + window), 0), patches).to(tl.int64)
    limit = tl.minimum(tl.minimum(tl.load(cu_windows_ptr + window + 1), patches) - begin, ROWS).to(tl.int32)
    if limit > 0:
        row = tl.arange(0, ROWS)
        hidden = heads * (2 * HALF)
        q_head_ptr = qkv_ptr + begin * stride_qkv + head * (2 * HALF)
        head_bias_ptr = bias_ptr + head * (2 * HALF)
        p = probabilities(
            q_head_ptr,
            q_head_ptr + hidden,
            head_bias_ptr,
            head_bias_ptr + hidden,
            positions_ptr + begin * stride_patch,
            frequencies_ptr,
            row,
            limit,
            scale,
            stride_qkv,
            stride_patch,
            stride_axis,
            HAS_BIAS,
            HALF,
            PAIRS,
            ROWS,
        )
        dtype = qkv_ptr.dtype.element_ty
        p = p.to(dtype)
        head_out_ptr = out_ptr + begin * hidden + head * (2 * HALF)
        for first in tl.range(0, HALF, PAIRS, num_stages=1):
            pair = first + tl.arange(0, PAIRS)
            a, b = load_halves(
                q_head_ptr + 2 * hidden, head_bias_ptr + 2 * hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS
            )
            out_a = tl.dot(p, a.to(dtype), input_precision="ieee")
            out_b = tl.dot(p, b.to(dtype), input_precision="ieee")
            store_halves(head_out_ptr, out_a, out_b, row, pair, limit, hidden, HALF)


@triton.jit
def store_gradient(
    target_ptr,
    sum_ptr,
    a,
    b,
    row,
    pair,
    limit,
    stride,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Write the gradient of one head of q, k or v, and into `sum_ptr` its sum over the window, for the bias."""
    store_halves(target_ptr, a, b, row, pair, limit, stride, HALF)
    if HAS_BIAS:  # rows past the end are 0, as their gradients are
        tl.store(sum_ptr + pair, tl.sum(a, 0), mask=pair < HALF)
        tl.store(sum_ptr + HALF + pair, tl.sum(b, 0), mask=pair < HALF)


@triton.jit(do_not_specialize=["patches"])
def window_backward_kernel(
    dout_ptr,
    qkv_ptr,
    bias_ptr,
    positions_ptr,
    frequencies_ptr,
    cu_windows_ptr,
    dqkv_ptr,
    partial_ptr,
    scale,
    patches,
    heads,
    stride_qkv,
    stride_patch,
    stride_axis,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients inside a window: dV = P^T dO, dQ = R^T(dS R(K)), dK = R^T(dS^T R(Q)).

    dS = P * (dO V^T - rowsum(P * dO V^T)) * scale; R^T turns a rotated gradient back.
    One program computes one head of one window, P again from the inputs. Grid: (windows * heads,).

    Args:
        dout_ptr: (patches, heads * D), D = 2 * HALF. dqkv_ptr: (patches, 3 * heads * D).
        partial_ptr: (windows, 3 * heads * D) float32, the gradient summed over each window; with HAS_BIAS only.
        The others are those of the forward kernel.
    """
    window = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin = tl.minimum(tl.maximum(tl.load(cu_windows_ptr + window), 0), patches).to(tl.int64)
    limit = tl.minimum(tl.minimum(tl.load(cu_windows_ptr + window + 1), patches) - begin, ROWS).to(tl.int32)
    row = tl.arange(0, ROWS)
    hidden = heads * (2 * HALF)
    sum_ptr = partial_ptr + window.to(tl.int64) * 3 * hidden + head * (2 * HALF)
    if limit > 0:
        q_head_ptr = qkv_ptr + begin * stride_qkv + head * (2 * HALF)
        head_bias_ptr = bias_ptr + head * (2 * HALF)
        dq_head_ptr = dqkv_ptr + begin * 3 * hidden + head * (2 * HALF)
        stride = 3 * hidden
        head_dout_ptr = dout_ptr + begin * hidden + head * (2 * HALF)
        first_position_ptr = positions_ptr + begin * stride_patch
        dtype = qkv_ptr.dtype.element_ty
        p = probabilities(
            q_head_ptr,
            q_head_ptr + hidden,
            head_bias_ptr,
            head_bias_ptr + hidden,
            first_position_ptr,
            frequencies_ptr,
            row,
            limit,
            scale,
            stride_qkv,
            stride_patch,
            stride_axis,
            HAS_BIAS,
            HALF,
            PAIRS,
            ROWS,
        )
        p_t = tl.trans(p.to(dtype))
        dp = tl.zeros([ROWS, ROWS], tl.float32)
        for first in tl.range(0, HALF, PAIRS, num_stages=1):
            pair = first + tl.arange(0, PAIRS)
            # Rows past the end have the gradient 0, so they add nothing whatever their probabilities are.
            da, db = load_halves(head_dout_ptr, bias_ptr, row, pair, limit, hidden, HALF, False)
            da = da.to(dtype)
            db = db.to(dtype)
            a, b = load_halves(
                q_head_ptr + 2 * hidden, head_bias_ptr + 2 * hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS
            )
            dp = tl.dot(da, tl.trans(a.to(dtype)), dp, input_precision="ieee")
            dp = tl.dot(db, tl.trans(b.to(dtype)), dp, input_precision="ieee")
            a = tl.dot(p_t, da, input_precision="ieee")
            b = tl.dot(p_t, db, input_precision="ieee")
            store_gradient(
                dq_head_ptr + 2 * hidden, sum_ptr + 2 * hidden, a, b, row, pair, limit, stride, HALF, HAS_BIAS
            )
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(dtype)
        ds_t = tl.trans(ds)
        for first in tl.range(0, HALF, PAIRS, num_stages=1):
            pair = first + tl.arange(0, PAIRS)
            cos, sin = window_angles(
                first_position_ptr, frequencies_ptr, row, pair, limit, stride_patch, stride_axis, HALF
            )
            a, b = rotated_halves(
                q_head_ptr + hidden, head_bias_ptr + hidden, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS
            )
            a = tl.dot(ds, a, input_precision="ieee")
            b = tl.dot(ds, b, input_precision="ieee")
            left = a * cos + b * sin
            right = b * cos - a * sin
            store_gradient(dq_head_ptr, sum_ptr, left, right, row, pair, limit, stride, HALF, HAS_BIAS)
            a, b = rotated_halves(q_head_ptr, head_bias_ptr, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
            a = tl.dot(ds_t, a, input_precision="ieee")
            b = tl.dot(ds_t, b, input_precision="ieee")
            left = a * cos + b * sin
            right = b * cos - a * sin
            store_gradient(
                dq_head_ptr + hidden, sum_ptr + hidden, left, right, row, pair, limit, stride, HALF, HAS_BIAS
            )
    else:
        zeros = tl.zeros([ROWS, PAIRS], tl.float32)
        for part in tl.static_range(3):
            for first in tl.range(0, HALF, PAIRS, num_stages=1):
                pair = first + tl.arange(0, PAIRS)
                store_gradient(dqkv_ptr, sum_ptr + part * hidden, zeros, zeros, row, pair, 0, hidden, HALF, HAS_BIAS)


def pairs_per_step(half: int, step: int) -> int:
    """Pairs of a step over half a head: `step`, but no more than hold the half (16-bit products need 16)."""
    return min(step, max(16, next_power(half)))


def forward(inputs: WindowInputs, numbers: tuple[int, ...]) -> Tensor:
    """Launch the forward kernel; (P, heads * D).

    Args:
        numbers: pairs of a step, warps, stages.
    """
    qkv = inputs.qkv
    # Zeros: a patch outside the windows must not have what the memory held before.
    out = torch.zeros((qkv.shape[0], inputs.heads * inputs.width), dtype=qkv.dtype, device=qkv.device)
    windows = len(inputs.cu_windows) - 1
    if windows and qkv.shape[0]:
        window_forward_kernel[(windows * inputs.heads,)](out_ptr=out, **_arguments(inputs, numbers))
    return out


def backward(
    dout: Tensor, inputs: WindowInputs, numbers: tuple[int, ...], bias: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel.

    Args:
        dout: (P, heads * D), contiguous.
        numbers: pairs of a step, warps, stages.

    Returns:
        (P, 3 * heads * D) gradient of the projection, and that of its bias, of dtype `bias` (empty if that is None).
    """
    qkv = inputs.qkv
    has_bias = inputs.bias is not None
    windows = len(inputs.cu_windows) - 1
    dqkv = torch.zeros(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((windows if has_bias else 0, qkv.shape[1]), dtype=torch.float32, device=qkv.device)
    if windows and qkv.shape[0]:
        window_backward_kernel[(windows * inputs.heads,)](
            dout_ptr=dout, dqkv_ptr=dqkv, partial_ptr=partial, **_arguments(inputs, numbers)
        )
    else:
        partial.zero_()
    return dqkv, dqkv.new_empty(0) if bias is None else partial_sums(partial, bias)


def _arguments(inputs: WindowInputs, numbers: tuple[int, ...]) -> dict[str, Any]:
    """What both kernels take in common, by name, with the options of the launch."""
    qkv = inputs.qkv if inputs.qkv.stride(-1) == 1 else inputs.qkv.contiguous()
    half = inputs.width // 2
    step, warps, stages = numbers
    return {
        "qkv_ptr": qkv,
        "bias_ptr": qkv if inputs.bias is None else inputs.bias,
        "positions_ptr": inputs.positions,
        "frequencies_ptr": inverse_frequencies(inputs.width, 2, inputs.theta, torch.float32, qkv.device),
        "cu_windows_ptr": inputs.cu_windows,
        "scale": inputs.scale,
        "patches": qkv.shape[0],
        "heads": inputs.heads,
        "stride_qkv": qkv.stride(0),
        "stride_patch": inputs.positions.stride(0),
        "stride_axis": inputs.positions.stride(1),
        "HAS_BIAS": inputs.bias is not None,
        "HALF": half,
        "PAIRS": pairs_per_step(half, step),
        "ROWS": LARGEST_WINDOW,  # of any pack: another number would be another compilation, and other bits
        "num_warps": warps,
        "num_stages": stages,
    }
