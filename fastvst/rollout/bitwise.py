"""Numerics that do not depend on what else is in a batch: trainer and sampler then agree bit for bit (CPU).

Floating-point sums depend on their order, and matrix libraries choose the order by the shape of the whole product.
Under `batch_invariant()` every product runs on tiles of `ROWS` rows and all causal attention on tiles of `ROWS` queries
by `KEYS` keys, at places fixed by a token's position in its sequence. A token's hidden state is then the same whether
it is computed in a pack, in a chunk of a prompt or alone in a decode step; what is left (norms, rotations, activations)
works row by row anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvst_kernels import linear_logprobs
from fastvst_kernels.attention_op import attention_op

ROWS, KEYS = 16, 64  # 16 rows waste little in a decode step of a few answers; 64 keys fill vector registers


class batch_invariant(TorchDispatchMode):  # noqa: N801 - used as a context manager: `with batch_invariant():`
    """Within it products and causal packed attention on the CPU do not depend on the batch, forward and backward.

    The trainer computes the log-probabilities it compares (or trains on) inside; `Engine(numerics="bitwise")` does so
    by itself. Costs several times the plain time: for checks and for hunting mismatches, not for production.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.mm.default:
            return tiled_mm(*args)
        if func is torch.ops.aten.mm.out:
            return kwargs["out"].copy_(tiled_mm(*args))
        if func is torch.ops.aten.addmm.default and not kwargs:
            return tiled_mm(*args[1:]) + args[0]
        if func is torch.ops.aten.addmm.out and set(kwargs) == {"out"}:
            return kwargs["out"].copy_(tiled_mm(*args[1:]) + args[0])
        if func is torch.ops.fastvst.packed_attention.default:
            q, k, v, cu_seqlens, groups, *_, causal, scale = args
            if causal:
                return packed(q, k, v, cu_seqlens, groups, scale)
        return func(*args, **kwargs)


def tiled_mm(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) product of (M, K) and (K, N) by tiles of ROWS rows, each a product of one and the same shape."""
    rows = a.shape[0]
    tiles = -(-rows // ROWS)
    padded = a.new_zeros(tiles * ROWS, a.shape[1])
    padded[:rows] = a
    out = a.new_empty(tiles * ROWS, b.shape[1])
    for begin in range(0, tiles * ROWS, ROWS):
        torch.ops.aten.mm.out(padded[begin : begin + ROWS], b, out=out[begin : begin + ROWS])
    return out[:rows]


@dataclass(frozen=True)
class Tiles:
    """Causal attention as n tiles of ROWS queries, in order of how many blocks of keys they see.

    Attributes:
        queries: (n, ROWS) int64 rows of q, -1 = none; positions: (n, ROWS) int64 places in their sequences.
        keys: for each block of keys the (count, KEYS) int64 rows of k and v of the first `count` tiles, -1 = none.
        rows: (R,) int64; where each row of q stands among the n * ROWS.
    """

    queries: Tensor
    positions: Tensor
    keys: tuple[Tensor, ...]
    rows: Tensor


def make_tiles(parts: Sequence[tuple[np.ndarray, int, np.ndarray]], count: int) -> Tiles:
    """Tiles of several stretches of queries.

    Args:
        parts: (rows of q, place of the first of them in its sequence, rows of k and v of the sequence's tokens in
            order, at least up to the last query).
        count: rows of q in all; every one is in exactly one part.
    """
    tiles: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
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
            tiles.append((len(padded) // KEYS, queries, places, padded))
    tiles.sort(key=lambda t: -t[0])
    blocks = tiles[0][0] if tiles else 0
    key_blocks = []
    for block in range(blocks):
        part = [t[3][block * KEYS : (block + 1) * KEYS] for t in tiles if t[0] > block]
        key_blocks.append(torch.from_numpy(np.stack(part)))
    queries = np.stack([t[1] for t in tiles]) if tiles else np.zeros((0, ROWS), dtype=np.int64)
    places = np.stack([t[2] for t in tiles]) if tiles else np.zeros((0, ROWS), dtype=np.int64)
    rows = np.zeros(count, dtype=np.int64)
    flat = queries.reshape(-1)
    rows[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    return Tiles(torch.from_numpy(queries), torch.from_numpy(places), tuple(key_blocks), torch.from_numpy(rows))


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> tuple[Tensor, Tensor]:
    """(R, Hq, D) output and (R, Hq) logsumexp: online softmax over blocks of KEYS keys, the same for every row.

    Args:
        q: (R, Hq, D); k, v: (N, Hkv, D).
    """
    (_, heads, width), kv_heads = q.shape, k.shape[1]
    n, repeat = len(tiles.queries), heads // kv_heads
    picked = q[tiles.queries.clamp(min=0)].view(n, ROWS, kv_heads, repeat, width)
    queries = picked.permute(0, 2, 3, 1, 4).reshape(n * kv_heads, repeat * ROWS, width)
    places = tiles.positions.repeat_interleave(kv_heads, 0).repeat(1, repeat)[:, :, None]
    acc = q.new_zeros(n * kv_heads, repeat * ROWS, width)
    top = q.new_full((n * kv_heads, repeat * ROWS, 1), -torch.inf)
    total = torch.zeros_like(top)
    for block, rows in enumerate(tiles.keys):
        count = len(rows) * kv_heads
        keys, values = (x[rows.clamp(min=0)].transpose(1, 2).reshape(count, KEYS, width).contiguous() for x in (k, v))
        place = torch.arange(block * KEYS, (block + 1) * KEYS)
        seen = (place <= places[:count]) & (rows >= 0).repeat_interleave(kv_heads, 0)[:, None]
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
    return out[tiles.rows], lse[tiles.rows]


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, groups: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What `fastvst::packed_attention` returns for causal=True: output (T, Hq, D) and logsumexp (Hq, T)."""
    offsets = cu_seqlens.tolist()
    prompts = [-1] * (len(offsets) - 1) if groups is None else groups.tolist()
    parts = []
    for index, prompt in enumerate(prompts):
        own = np.arange(offsets[index], offsets[index + 1])
        before = np.arange(offsets[prompt], offsets[prompt + 1]) if prompt >= 0 else own[:0]
        parts.append((own, len(before), np.concatenate([before, own])))
    out, lse = attend_tiles(q, k, v, make_tiles(parts, q.shape[0]), scale)
    return out, lse.transpose(0, 1).contiguous()


def model_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """(B,) log-probabilities of tokens by the trainer's own operator."""
    return linear_logprobs(hidden, weight, tokens)[0]


assert attention_op is not None  # the operator must be registered before a dispatch mode can look for it
