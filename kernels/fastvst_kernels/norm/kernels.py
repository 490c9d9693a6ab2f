"""RMSNorm in Triton, alone and after a residual addition: one pass over memory in each direction.

A row lies in registers as up to three pieces whose sizes are powers of two: 3584 is 2048 + 1024 + 512, 1280 is
1024 + 256. No thread is idle at such widths (a padded tile wastes 12 % at 3584 and 37 % at 1280).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.shared.partial_sums import partial_sums
from fastvst_kernels.shared.tile_tables import multiprocessors

LARGEST_WIDTH = 8192  # the widest shape class of the tables


def row_pieces(width: int) -> tuple[int, int, int]:
    """A width as three powers of two, largest first; an unused piece is 0, the last one is rounded up."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    second = 0 if rest == 0 else 1 << (rest.bit_length() - 1)
    last = rest - second
    return first, second, 0 if last == 0 else 1 << (last - 1).bit_length()


@triton.jit
def load_piece(base_ptr, row, limit, stride, width, START: tl.constexpr, SIZE: tl.constexpr, MASK: tl.constexpr):
    """(rows, SIZE) values as float32, from column START; 0 outside of the tensor."""
    column = START + tl.arange(0, SIZE)
    mask = row[:, None] < limit
    if MASK:
        mask = mask & (column[None, :] < width)
    return tl.load(base_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_weight(base_ptr, width, START: tl.constexpr, SIZE: tl.constexpr, WEIGHTED: tl.constexpr, MASK: tl.constexpr):
    """(1, SIZE) values of the weight as float32; ones if there is no weight."""
    column = START + tl.arange(0, SIZE)
    if WEIGHTED:
        if MASK:
            return tl.load(base_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        return tl.load(base_ptr + column).to(tl.float32)[None, :]
    else:
        return tl.full([1, SIZE], 1.0, tl.float32)


@triton.jit
def store_piece(
    base_ptr,
    values,
    row,
    limit,
    stride,
    width,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    MASK: tl.constexpr,
):
    column = START + tl.arange(0, SIZE)
    mask = row[:, None] < limit
    if MASK:
        mask = mask & (column[None, :] < width)
    tl.store(base_ptr + row[:, None] * stride + column[None, :], values.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def input_piece(
    x_ptr,
    residual_ptr,
    total_ptr,
    row,
    limit,
    stride_x,
    stride_r,
    width,
    ADD: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    MASK: tl.constexpr,
):
    """A piece of the norm's input. With ADD it is x + residual, stored to total and rounded as it is stored."""
    x = load_piece(x_ptr, row, limit, stride_x, width, START, SIZE, MASK)
    if ADD:
        x += load_piece(residual_ptr, row, limit, stride_r, width, START, SIZE, MASK)
        x = x.to(total_ptr.dtype.element_ty)
        store_piece(total_ptr, x, row, limit, width, width, START, SIZE, MASK)
        x = x.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    inverse_ptr,
    eps,
    rows,
    width,
    stride_x,
    stride_r,
    ADD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MASK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = x * inverse * weight, inverse = 1 / sqrt(mean(x^2) + eps); with ADD total = x + residual replaces x."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
    limit = rows - begin
    row = tl.arange(0, ROWS)
    x_ptr += begin * stride_x
    residual_ptr += begin * stride_r
    y_ptr += begin * width
    total_ptr += begin * width
    LAST0: tl.constexpr = MASK and D1 == 0
    LAST1: tl.constexpr = MASK and D2 == 0
    x0 = input_piece(x_ptr, residual_ptr, total_ptr, row, limit, stride_x, stride_r, width, ADD, 0, D0, LAST0)
    squares = tl.sum(x0 * x0, 1)
    if D1 > 0:
        x1 = input_piece(x_ptr, residual_ptr, total_ptr, row, limit, stride_x, stride_r, width, ADD, D0, D1, LAST1)
        squares += tl.sum(x1 * x1, 1)
    if D2 > 0:
        x2 = input_piece(x_ptr, residual_ptr, total_ptr, row, limit, stride_x, stride_r, width, ADD, D0 + D1, D2, MASK)
        squares += tl.sum(x2 * x2, 1)
    inverse = tl.rsqrt(squares / width + eps)
    tl.store(inverse_ptr + begin + row, inverse, mask=row < limit)
    scale = inverse[:, None]
    w0 = load_weight(weight_ptr, width, 0, D0, WEIGHTED, LAST0)
    store_piece(y_ptr, x0 * scale * w0, row, limit, width, width, 0, D0, LAST0)
    if D1 > 0:
        w1 = load_weight(weight_ptr, width, D0, D1, WEIGHTED, LAST1)
        store_piece(y_ptr, x1 * scale * w1, row, limit, width, width, D0, D1, LAST1)
    if D2 > 0:
        w2 = load_weight(weight_ptr, width, D0 + D1, D2, WEIGHTED, MASK)
        store_piece(y_ptr, x2 * scale * w2, row, limit, width, width, D0 + D1, D2, MASK)


@triton.jit
def gradient_piece(
    x,
    g,
    inverse,
    slope,
    dtotal_ptr,
    dx_ptr,
    row,
    limit,
    width,
    ADD: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    MASK: tl.constexpr,
):
    """Write dx (+ dtotal with ADD); returns dx and dtotal."""
    dx = g * inverse[:, None] + x * slope[:, None]
    dtotal = dx
    if ADD:
        dtotal = load_piece(dtotal_ptr, row, limit, width, width, START, SIZE, MASK)
        dx += dtotal
    store_piece(dx_ptr, dx, row, limit, width, width, START, SIZE, MASK)
    return dx, dtotal


@triton.jit
def store_sum(partial_ptr, values, width, START: tl.constexpr, SIZE: tl.constexpr, MASK: tl.constexpr):
    """Write the sum of values (rows, SIZE) over the rows into columns START .. START + SIZE - 1."""
    one = tl.arange(0, 1)
    store_piece(partial_ptr, tl.sum(values, 0)[None, :], one, 1, width, width, START, SIZE, MASK)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    width,
    stride_x,
    ADD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMS: tl.constexpr,
    MASK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx (+ dtotal with ADD), and into partial (programs, 1 or 3, width) each program's share of sums over the rows.

    The first is the weight's gradient. With SUMS, which needs ADD, the others are the sums of dx and of dtotal: the
    gradients of biases whose gradient is dx or dtotal itself in every row.

    With g = dy * w and r = inverse: dx = r g - x r^3 mean(g x), dw = sum over rows of dy x r.
    """
    LAST0: tl.constexpr = MASK and D1 == 0
    LAST1: tl.constexpr = MASK and D2 == 0
    row = tl.arange(0, ROWS)
    w0 = load_weight(weight_ptr, width, 0, D0, WEIGHTED, LAST0)
    dw0 = tl.zeros([ROWS, D0], tl.float32)
    dx0_sum = tl.zeros([ROWS, D0], tl.float32)
    dtotal0_sum = tl.zeros([ROWS, D0], tl.float32)
    if D1 > 0:
        w1 = load_weight(weight_ptr, width, D0, D1, WEIGHTED, LAST1)
        dw1 = tl.zeros([ROWS, D1], tl.float32)
        dx1_sum = tl.zeros([ROWS, D1], tl.float32)
        dtotal1_sum = tl.zeros([ROWS, D1], tl.float32)
    if D2 > 0:
        w2 = load_weight(weight_ptr, width, D0 + D1, D2, WEIGHTED, MASK)
        dw2 = tl.zeros([ROWS, D2], tl.float32)
        dx2_sum = tl.zeros([ROWS, D2], tl.float32)
        dtotal2_sum = tl.zeros([ROWS, D2], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    for step in tl.range(0, tl.cdiv(tl.cdiv(rows, ROWS) - program, programs)):
        begin = (program + step * programs) * ROWS
        limit = rows - begin
        x_rows_ptr = x_ptr + begin * stride_x
        dy_rows_ptr = dy_ptr + begin * width
        dtotal_rows_ptr = dtotal_ptr + begin * width
        dx_rows_ptr = dx_ptr + begin * width
        inverse = tl.load(inverse_ptr + begin + row, mask=row < limit, other=0.0)
        x0 = load_piece(x_rows_ptr, row, limit, stride_x, width, 0, D0, LAST0)
        g0 = load_piece(dy_rows_ptr, row, limit, width, width, 0, D0, LAST0)
        if WEIGHTED:
            dw0 += g0 * x0 * inverse[:, None]
            g0 *= w0
        dot = tl.sum(g0 * x0, 1)
        if D1 > 0:
            x1 = load_piece(x_rows_ptr, row, limit, stride_x, width, D0, D1, LAST1)
            g1 = load_piece(dy_rows_ptr, row, limit, width, width, D0, D1, LAST1)
            if WEIGHTED:
                dw1 += g1 * x1 * inverse[:, None]
                g1 *= w1
            dot += tl.sum(g1 * x1, 1)
        if D2 > 0:
            x2 = load_piece(x_rows_ptr, row, limit, stride_x, width, D0 + D1, D2, MASK)
            g2 = load_piece(dy_rows_ptr, row, limit, width, width, D0 + D1, D2, MASK)
            if WEIGHTED:
                dw2 += g2 * x2 * inverse[:, None]
                g2 *= w2
            dot += tl.sum(g2 * x2, 1)
        slope = -dot * inverse * inverse * inverse / width
        dx0, dtotal0 = gradient_piece(
            x0, g0, inverse, slope, dtotal_rows_ptr, dx_rows_ptr, row, limit, width, ADD, 0, D0, LAST0
        )
        if SUMS:
            dx0_sum += dx0
            dtotal0_sum += dtotal0
        if D1 > 0:
            dx1, dtotal1 = gradient_piece(
                x1, g1, inverse, slope, dtotal_rows_ptr, dx_rows_ptr, row, limit, width, ADD, D0, D1, LAST1
            )
            if SUMS:
                dx1_sum += dx1
                dtotal1_sum += dtotal1
        if D2 > 0:
            dx2, dtotal2 = gradient_piece(
                x2, g2, inverse, slope, dtotal_rows_ptr, dx_rows_ptr, row, limit, width, ADD, D0 + D1, D2, MASK
            )
            if SUMS:
                dx2_sum += dx2
                dtotal2_sum += dtotal2
    partial_ptr += tl.program_id(0).to(tl.int64) * width * (3 if SUMS else 1)
    if WEIGHTED:
        store_sum(partial_ptr, dw0, width, 0, D0, LAST0)
        if D1 > 0:
            store_sum(partial_ptr, dw1, width, D0, D1, LAST1)
        if D2 > 0:
            store_sum(partial_ptr, dw2, width, D0 + D1, D2, MASK)
    if SUMS:
        store_sum(partial_ptr + width, dx0_sum, width, 0, D0, LAST0)
        store_sum(partial_ptr + 2 * width, dtotal0_sum, width, 0, D0, LAST0)
        if D1 > 0:
            store_sum(partial_ptr + width, dx1_sum, width, D0, D1, LAST1)
            store_sum(partial_ptr + 2 * width, dtotal1_sum, width, D0, D1, LAST1)
        if D2 > 0:
            store_sum(partial_ptr + width, dx2_sum, width, D0 + D1, D2, MASK)
            store_sum(partial_ptr + 2 * width, dtotal2_sum, width, D0 + D1, D2, MASK)


def constants(width: int) -> dict[str, int | bool]:
    """The constants of both kernels that the width determines."""
    d0, d1, d2 = row_pieces(width)
    return {"D0": d0, "D1": d1, "D2": d2, "MASK": d0 + d1 + d2 != width}


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, numbers: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        x: (N, H) with a dense last dimension.
        residual: the same shape and dtype, or None.
        weight: (H,) or None.
        numbers: rows of a program, warps.

    Returns:
        y (N, H), x + residual (N, H; empty without a residual), and 1 / rms (N,) float32.
    """
    rows, width = x.shape
    if width > LARGEST_WIDTH:
        raise ValueError(f"rows are {width} wide; the Triton RMSNorm takes up to {LARGEST_WIDTH}: use backend='torch'")
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = torch.empty((rows if residual is not None else 0, width), dtype=x.dtype, device=x.device)
    inverse = torch.empty((rows,), dtype=torch.float32, device=x.device)
    if rows:
        block, warps = numbers
        rms_norm_forward_kernel[(triton.cdiv(rows, block),)](
            x,
            x if residual is None else residual,
            x if weight is None else weight,
            y,
            total,
            inverse,
            eps,
            rows,
            width,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            ADD=residual is not None,
            WEIGHTED=weight is not None,
            ROWS=block,
            num_warps=warps,
            **constants(width),
        )
    return y, total, inverse


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    inverse: Tensor,
    numbers: tuple[int, ...],
    *,
    sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel.

    Args:
        dy: (N, H) contiguous gradient of the norm.
        dtotal: (N, H) contiguous gradient of the sum, or None.
        x: (N, H), the norm's input.
        inverse: (N,) float32, 1 / rms.
        numbers: rows of a program step, warps, programs of each multiprocessor. All are resident at once: the next
            wave would run alone and cost as much time.
        sums: with a weight and `dtotal`: also sum dx and dtotal over the rows.

    Returns:
        dx (N, H) of x's dtype, and of the weight's dtype (1, H) its gradient, or (3, H) with the sums of dx and dtotal
        behind it; (0, H) without a weight.
    """
    rows, width = x.shape
    dx = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block, warps, resident = numbers
    programs = max(1, min(resident * multiprocessors(x.device), triton.cdiv(rows, block)))
    parts = 0 if weight is None else 3 if sums else 1
    partial = torch.empty((programs, parts, width), dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(programs,)](
        dy,
        dy if dtotal is None else dtotal,
        x,
        x if weight is None else weight,
        inverse,
        dx,
        partial,
        rows,
        width,
        x.stride(0),
        ADD=dtotal is not None,
        WEIGHTED=weight is not None,
        SUMS=sums,
        ROWS=block,
        num_warps=warps,
        **constants(width),
    )
    return dx, partial_sums(partial, x.dtype if weight is None else weight.dtype)
