"""Products and causal attention whose rows do not depend on what else is in the batch.

Floating-point sums depend on their order, and matrix libraries choose the order by the shape of the whole product. Here
every product runs on tiles of a fixed number of rows, and attention on tiles of `ROWS` queries by `KEYS` keys, at
places fixed by a token's position in its sequence. So a token's hidden state comes out the same to the last bit whether
it is computed in a pack, in a chunk of a prompt or alone in a decode step. Forward only; for checks, not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvst_kernels.shared.backend import uses_kernel

__all__ = ["KEYS", "ROWS", "AttentionTiles", "invariant_attention", "invariant_mm", "make_tiles"]

ROWS, KEYS = 16, 64  # 16 rows waste little in a decode step of a few answers; 64 keys fill vector registers


def invariant_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, *, backend: str = "auto") -> Tensor:
    """The product of a (M, K) and b (K, N), any strides; row i of the result depends on row i of a and on b alone.

    Args:
        out_dtype: of the result, default a's. Sums are float32 (float64 for float64 inputs) either way.
        backend: "triton", "torch" (products of ROWS rows one after the other), or "auto": Triton on CUDA.

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
    """As `invariant_mm`, with the backend chosen."""
    if kernel:
        # the package also imports where there is no Triton
        from fastvst_kernels.invariant import kernels as invariant_triton

        return invariant_triton.mm(a, b, out_dtype)
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
    return out.clone() if out.untyped_storage().nbytes() > out.nbytes else out  # padding is not kept


@invariant_mm_op.register_fake
def _(a, b, out_dtype, kernel):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@dataclass(frozen=True)
class AttentionTiles:
    """Causal attention as n tiles of ROWS queries, in order of how many blocks of keys they see, most first.

    Attributes:
        queries: (n, ROWS) int64 rows of q, -1 = none; places: (n, ROWS) int64 places in their sequences.
        keys: (R, KEYS) int64 rows of k and v, -1 = none: block 0 of all tiles, block 1 of those that have one, ...
        counts: (n,) int64 blocks of each tile; starts: (blocks + 1,) int64 rows of `keys` at which blocks begin.
        blocks: `starts` on the host.
    """

    queries: Tensor
    places: Tensor
    keys: Tensor
    counts: Tensor
    starts: Tensor
    blocks: tuple[int, ...]

    def to(self, device: torch.device) -> AttentionTiles:
        queries = self.queries.to(device)
        places = self.places.to(device)
        keys = self.keys.to(device)
        return AttentionTiles(queries, places, keys, self.counts.to(device), self.starts.to(device), self.blocks)


def make_tiles(parts: Sequence[tuple[np.ndarray, int, np.ndarray]]) -> AttentionTiles:
    """Tiles of several stretches of queries; every row of q is in exactly one.

    Args:
        parts: (rows of q, place of the first of them in its sequence, rows of k and v of the sequence's tokens in
            order, at least up to the last query).
    """
    tiles: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for rows, first, keys in parts:
        end = first + len(rows)
        for begin in range(first // ROWS * ROWS, end, ROWS):
            places = np.arange(begin, begin + ROWS)
            real = (places >= first) & (places < end)
            queries = np.full(ROWS, -1)
            queries[real] = rows[places[real] - first]
            seen = min(begin + ROWS, end)
            padded = np.full(-(-seen // KEYS) * KEYS, -1)
            padded[:seen] = keys[:seen]
            tiles.append((queries, places, padded.reshape(-1, KEYS)))
    tiles.sort(key=lambda t: -len(t[2]))
    blocks = (
        [[keys[block] for _, _, keys in tiles if len(keys) > block] for block in range(len(tiles[0][2]))]
        if tiles
        else []
    )
    starts = (0, *np.cumsum([len(block) for block in blocks]).tolist())

    def table(rows: list[np.ndarray], width: int) -> Tensor:
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, width), dtype=np.int64))

    return AttentionTiles(
        queries=table([t[0] for t in tiles], ROWS),
        places=table([t[1] for t in tiles], ROWS),
        keys=table([row for block in blocks for row in block], KEYS),
        counts=torch.tensor([len(t[2]) for t in tiles], dtype=torch.int64),
        starts=torch.tensor(starts, dtype=torch.int64),
        blocks=starts,
    )


def invariant_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: AttentionTiles, scale: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Online softmax over blocks of KEYS keys, the same for every row whatever is beside it.

    Args:
        q: (R, Hq, D); k, v: (N, Hkv, D), Hq a multiple of Hkv, D up to 256.
        tiles: of all rows of q, on q's device.
        backend: as in `invariant_mm`.

    Returns:
        (R, Hq, D) output of q's dtype and (R, Hq) logsumexp, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a backend that cannot run.
    """
    if uses_kernel("invariant_attention", q, backend):
        from fastvst_kernels.invariant import kernels as invariant_triton

        return invariant_triton.attention(q, k, v, tiles, scale)
    return _attention(q, k, v, tiles, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, tiles: AttentionTiles, scale: float) -> tuple[Tensor, Tensor]:
    """All tiles at once, block after block."""
    (rows, heads, width) = q.shape
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
        # Every real query sees the first key; the padding of a tile may see none, and is never read.
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
