"""Products and causal attention in which a row's bits do not depend on the other rows of the batch.

Floating-point sums depend on their order, and matrix libraries choose the order by the shape of the whole product. Here
every product runs on tiles of a fixed number of rows, and attention on tiles of `ROWS` queries by `KEYS` keys, aligned
to a token's position in its sequence. So a token's hidden state is the same to the last bit in a pack, in a chunk of a
prompt and in a decode step. Forward only; for checks, not for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.invariant.tiles import KEYS, ROWS, AttentionTiles
from fastvst_kernels.shared.backend import uses_kernel

__all__ = ["invariant_attention", "invariant_mm", "invariant_mm_op"]


def invariant_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, *, backend: str = "auto") -> Tensor:
    """The product of a (M, K) and b (K, N), any strides; row i of the result depends only on row i of a and on b.

    Args:
        out_dtype: dtype of the result, default a's. Sums are float32 (float64 for float64 inputs) in any case.
        backend: "triton", "torch" (one product of ROWS rows after the other), or "auto": Triton on CUDA.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a backend that cannot run.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a is {tuple(a.shape)} and b {tuple(b.shape)}; expected (M, K) and (K, N)")
    if a.dtype != b.dtype or a.device != b.device or not a.is_floating_point():
        raise ValueError(
            f"a is {a.dtype} on {a.device}, b {b.dtype} on {b.device}; expected one floating dtype, one device"
        )
    return invariant_mm_op(a, b, out_dtype or a.dtype, uses_kernel("invariant_mm", a, backend))


@torch.library.custom_op("fastvst::invariant_mm", mutates_args=(), device_types=("cpu", "cuda"))
def invariant_mm_op(a: Tensor, b: Tensor, out_dtype: torch.dtype, kernel: bool) -> Tensor:
    """`invariant_mm` with the backend chosen."""
    if kernel:
        from fastvst_kernels.invariant import kernels  # imported here: the package must work without Triton

        return kernels.mm(a, b, out_dtype)
    return _mm(a, b, out_dtype)


@invariant_mm_op.register_fake
def _(a, b, out_dtype, kernel):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """One product of ROWS rows after the other; the last is padded with zeros."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    rows = a.shape[0]
    b = b.to(wide)
    tiles = -(-rows // ROWS)
    padded = b.new_zeros(tiles * ROWS, a.shape[1])
    padded[:rows] = a
    out = b.new_empty(tiles * ROWS, b.shape[1])
    for begin in range(0, tiles * ROWS, ROWS):
        torch.mm(padded[begin : begin + ROWS], b, out=out[begin : begin + ROWS])
    out = out[:rows].to(out_dtype)
    return out.clone() if out.untyped_storage().nbytes() > out.nbytes else out  # frees the padding


def invariant_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: AttentionTiles, scale: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Causal attention by online softmax over blocks of KEYS keys; a row's bits do not depend on the other rows.

    Args:
        q: (R, Hq, D); k, v: (N, Hkv, D), Hq a multiple of Hkv, D up to 256.
        tiles: `make_tiles` for all rows of q, on q's device.
        backend: as in `invariant_mm`.

    Returns:
        (R, Hq, D) output of q's dtype and (R, Hq) logsumexp, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a backend that cannot run.
    """
    if uses_kernel("invariant_attention", q, backend):
        from fastvst_kernels.invariant import kernels  # imported here: the package must work without Triton

        return kernels.attention(q, k, v, tiles, scale)
    return _attention(q, k, v, tiles, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, tiles: AttentionTiles, scale: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: one block of keys after the other, for all tiles that have it."""
    rows, heads, width = q.shape
    kv_heads = k.shape[1]
    n = len(tiles.queries)
    repeat = heads // kv_heads
    picked = q[tiles.queries.clamp(min=0)].view(n, ROWS, kv_heads, repeat, width)
    queries = picked.permute(0, 2, 3, 1, 4).reshape(n * kv_heads, repeat * ROWS, width)
    places = tiles.places.repeat_interleave(kv_heads, 0).repeat(1, repeat)[:, :, None]
    acc = q.new_zeros(n * kv_heads, repeat * ROWS, width)
    top = q.new_full((n * kv_heads, repeat * ROWS, 1), -torch.inf)
    total = torch.zeros_like(top)
    for block, (begin, end) in enumerate(zip(tiles.blocks, tiles.blocks[1:], strict=False)):
        chosen = tiles.keys[begin:end]
        count = (end - begin) * kv_heads
        keys, values = (x[chosen.clamp(min=0)].transpose(1, 2).reshape(count, KEYS, width).contiguous() for x in (k, v))
        place = torch.arange(block * KEYS, (block + 1) * KEYS)
        seen = (place <= places[:count]) & (chosen >= 0).repeat_interleave(kv_heads, 0)[:, None]
        scores = torch.bmm(queries[:count], keys.transpose(1, 2)) * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        # Every real query sees the first key. The padding of a tile may see none; its result is never read.
        new_top = torch.maximum(top[:count], scores.amax(-1, keepdim=True))
        shrink = torch.exp(top[:count] - new_top)
        p = torch.exp(scores - new_top)
        total[:count] = total[:count] * shrink + p.sum(-1, keepdim=True)
        acc[:count] = acc[:count] * shrink + torch.bmm(p, values)
        top[:count] = new_top
    out = (acc / total).view(n, kv_heads, repeat, ROWS, width).permute(0, 3, 1, 2, 4).reshape(-1, heads, width)
    lse = (top + torch.log(total)).view(n, kv_heads, repeat, ROWS).permute(0, 3, 1, 2).reshape(-1, heads)
    order = tiles.queries.flatten()
    real = order >= 0
    return (
        q.new_empty(rows, heads, width).index_copy_(0, order[real], out[real]),
        lse.new_empty(rows, heads).index_copy_(0, order[real], lse[real]),
    )
