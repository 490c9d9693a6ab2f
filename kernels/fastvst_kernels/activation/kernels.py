"""SwiGLU in Triton. It is elementwise, so memory limits it; the backward pass computes the activation again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.shared.partial_sums import partial_sums

SUMMED_ROWS = 64  # rows of a program that sums the gradient: its partial sums are 1/32 of the gradient's bytes


@triton.jit
def tile_offsets(tile, stride_a, stride_b, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of one (ROWS, BLOCK) tile in rows that are stride_a or stride_b apart, and the mask of its values."""
    begin = tile.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows - begin) & (column < width)
    return begin * stride_a + row * stride_a + column, begin * stride_b + row * stride_b + column, mask


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    rows,
    width,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (rows, width) = silu(gate) * up; rows of gate and up are `stride` apart."""
    inputs, outputs, mask = tile_offsets(tl.program_id(0), stride, width, rows, width, ROWS, BLOCK)
    gate = tl.load(gate_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_tile(
    tile,
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    out_ptr,
    rows,
    width,
    stride_dout,
    stride,
    stride_d,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one (ROWS, BLOCK) tile of dgate, dup and, with AGAIN, of out; returns dgate and dup, 0 outside."""
    inputs, outputs, mask = tile_offsets(tile, stride, stride_dout, rows, width, ROWS, BLOCK)
    _, gradients, _ = tile_offsets(tile, stride, stride_d, rows, width, ROWS, BLOCK)
    gate = tl.load(gate_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    if AGAIN:
        _, places, _ = tile_offsets(tile, width, width, rows, width, ROWS, BLOCK)
        tl.store(out_ptr + places, (silu * up).to(out_ptr.dtype.element_ty), mask=mask)
    dup = dout * silu
    tl.store(dup_ptr + gradients, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    dgate = dout * up * (share + silu * (1.0 - share))
    tl.store(dgate_ptr + gradients, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    return dgate, dup


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    out_ptr,
    partial_ptr,
    rows,
    width,
    stride_dout,
    stride,
    stride_d,
    AGAIN: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate and dup; silu'(g) = s + g s (1 - s) with s = sigmoid(g). With AGAIN out = silu(gate) * up, as forward.

    With STEPS > 0 a program takes so many tiles of rows, and partial (programs, 2, width) float32 gets its sums of
    dgate and dup over the rows, for the gradient of a bias.
    """
    program = tl.program_id(0)
    if STEPS == 0:
        backward_tile(
            program,
            dout_ptr,
            gate_ptr,
            up_ptr,
            dgate_ptr,
            dup_ptr,
            out_ptr,
            rows,
            width,
            stride_dout,
            stride,
            stride_d,
            AGAIN,
            ROWS,
            BLOCK,
        )
    else:
        dgate_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        dup_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        for step in tl.range(0, STEPS):
            dgate, dup = backward_tile(
                program * STEPS + step,
                dout_ptr,
                gate_ptr,
                up_ptr,
                dgate_ptr,
                dup_ptr,
                out_ptr,
                rows,
                width,
                stride_dout,
                stride,
                stride_d,
                AGAIN,
                ROWS,
                BLOCK,
            )
            dgate_sum += dgate
            dup_sum += dup
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sum_ptr = partial_ptr + program.to(tl.int64) * 2 * width + column
        tl.store(sum_ptr, tl.sum(dgate_sum, 0), mask=column < width)
        tl.store(sum_ptr + width, tl.sum(dup_sum, 0), mask=column < width)


def steps(block_rows: int) -> int:
    """Tiles of rows that a program takes if it sums the gradient."""
    return max(1, SUMMED_ROWS // block_rows)


def forward(gate: Tensor, up: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """silu(gate) * up of (N, I) tensors with dense rows and equal strides; `numbers`: rows, columns, warps."""
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    block_rows, block, warps = numbers
    if out.numel():
        grid = (triton.cdiv(rows, block_rows), triton.cdiv(width, block))
        swiglu_forward_kernel[grid](
            gate, up, out, rows, width, gate.stride(0), ROWS=block_rows, BLOCK=block, num_warps=warps
        )
    return out


def backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    out: Tensor | None,
    numbers: tuple[int, ...],
    bias: torch.dtype | None = None,
) -> Tensor:
    """Write the gradients into dgate and dup (N, I), which have equal strides; dout has dense rows.

    The activation goes into `out` (N, I), contiguous, if it is given.

    Returns:
        (2, I) of dtype `bias`, the sums of dgate and dup over the rows (empty if that is None).
    """
    rows, width = gate.shape
    block_rows, block, warps = numbers
    tiles = 0 if bias is None else steps(block_rows)
    programs = triton.cdiv(rows, block_rows * max(1, tiles))
    partial = torch.empty((programs if tiles else 0, 2, width), dtype=torch.float32, device=gate.device)
    if dout.numel():
        swiglu_backward_kernel[(programs, triton.cdiv(width, block))](
            dout,
            gate,
            up,
            dgate,
            dup,
            dgate if out is None else out,
            partial,
            rows,
            width,
            dout.stride(0),
            gate.stride(0),
            dgate.stride(0),
            AGAIN=out is not None,
            STEPS=tiles,
            ROWS=block_rows,
            BLOCK=block,
            num_warps=warps,
        )
    return gate.new_empty(0) if bias is None else partial_sums(partial, bias)
