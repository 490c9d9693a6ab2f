"""SwiGLU in Triton. It is elementwise, so memory limits it; the backward pass computes the activation again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_offsets(stride_a, stride_b, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of one (ROWS, BLOCK) tile in rows that are stride_a or stride_b apart, and the mask of its values."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
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
    inputs, outputs, mask = tile_offsets(stride, width, rows, width, ROWS, BLOCK)
    gate = tl.load(gate_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
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
    """dgate and dup; silu'(g) = s + g s (1 - s) with s = sigmoid(g). With AGAIN out = silu(gate) * up, as forward."""
    inputs, outputs, mask = tile_offsets(stride, stride_dout, rows, width, ROWS, BLOCK)
    _, gradients, _ = tile_offsets(stride, stride_d, rows, width, ROWS, BLOCK)
    gate = tl.load(gate_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    if AGAIN:
        _, places, _ = tile_offsets(width, width, rows, width, ROWS, BLOCK)
        tl.store(out_ptr + places, (silu * up).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + gradients, (dout * silu).to(dup_ptr.dtype.element_ty), mask=mask)
    slope = share + silu * (1.0 - share)
    tl.store(dgate_ptr + gradients, (dout * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)


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
) -> None:
    """Write the gradients into dgate and dup (N, I), which have equal strides; dout has dense rows.

    The activation goes into `out` (N, I), contiguous, if it is given.
    """
    rows, width = gate.shape
    block_rows, block, warps = numbers
    if dout.numel():
        grid = (triton.cdiv(rows, block_rows), triton.cdiv(width, block))
        swiglu_backward_kernel[grid](
            dout,
            gate,
            up,
            dgate,
            dup,
            dgate if out is None else out,
            rows,
            width,
            dout.stride(0),
            gate.stride(0),
            dgate.stride(0),
            AGAIN=out is not None,
            ROWS=block_rows,
            BLOCK=block,
            num_warps=warps,
        )
