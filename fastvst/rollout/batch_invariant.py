"""Computation that does not depend on what else is in a batch, so that trainer and sampler agree in every bit.

Under `batch_invariant()` all matrix products and all causal attention run by `fastvst_kernels.invariant`, on tiles at
fixed places. A token's hidden state is then the same in a pack, in a chunk of a prompt and alone in a decode step. The
other operations (norms, rotations, activations, attention windows of images) work row by row or image by image anyway,
with one configuration for all sizes.

The functions `bitwise_*` are the engine's steps in `numerics="bitwise"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvst_kernels.attention.api  # noqa: F401 - registers the operators of packed attention
from fastvst.model import Qwen25VL
from fastvst.model.layers import Attend
from fastvst.rollout.decode import run_decoder
from fastvst.rollout.decode_batch import DecodeBatch
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.request import Chunk
from fastvst.rollout.sampler import Drawn, SamplingRows, next_tokens
from fastvst_kernels import linear_logprobs
from fastvst_kernels.invariant.op import invariant_attention, invariant_mm
from fastvst_kernels.invariant.tiles import AttentionTiles, make_tiles
from fastvst_kernels.lm_head.cross_entropy import cross_entropy_forward
from fastvst_kernels.lm_head.logprobs import logprobs_backward, logprobs_forward
from fastvst_kernels.paged_rope.op import new_slots

aten = torch.ops.aten


class batch_invariant(TorchDispatchMode):  # noqa: N801 - used as a context manager: `with batch_invariant():`
    """Inside it matrix products and causal packed attention do not depend on the batch, forward and backward.

    The trainer computes inside it the log-probabilities that it compares or trains on; `Engine(numerics="bitwise")`
    enters it by itself. It costs several times the plain time, and the host waits for the device in every attention: it
    is meant for checks and for finding mismatches, not for production.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.mm.default, aten.mm.dtype):  # mm.dtype gets the result's dtype; the LM head's loss uses it
            return invariant_mm(*args)
        if func is aten.matmul.default and args[0].dim() == args[1].dim() == 2:  # not taken apart in an operator
            return invariant_mm(*args)
        if func in (aten.mm.out, aten.mm.dtype_out):
            return kwargs["out"].copy_(invariant_mm(*args))
        if func in (aten.addmm.default, aten.addmm.dtype) and not kwargs:
            return _add_mm(*args)
        if func in (aten.addmm.out, aten.addmm.dtype_out) and set(kwargs) == {"out"}:
            return kwargs["out"].copy_(_add_mm(*args))
        if func is aten.addmm_.default and not kwargs:
            return args[0].copy_(_add_mm(*args))
        if func in (torch.ops.fastvst.packed_attention.default, torch.ops.fastvst.library_attention.default):
            q, k, v, cu_seqlens, groups, *_, causal, scale = args
            if causal:
                return _packed_attention(q, k, v, cu_seqlens, groups, scale)
        if func in _LM_HEAD:  # PyTorch runs an operator's own products outside the mode
            with self:
                return _LM_HEAD[func](*args, **kwargs)
        return func(*args, **kwargs)


_LM_HEAD: dict[Any, Callable[..., Any]] = {
    torch.ops.fastvst.linear_cross_entropy.default: cross_entropy_forward,
    torch.ops.fastvst.linear_logprobs.default: logprobs_forward,
    torch.ops.fastvst.linear_logprobs_backward.default: logprobs_backward,
}


def _add_mm(x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x + a @ b, rounded once."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (invariant_mm(a, b, wide) + x).to(out_dtype or a.dtype)


def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, groups: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What `fastvst::packed_attention` returns for causal=True: output (T, Hq, D) and logsumexp (Hq, T)."""
    prompts = None if groups is None else tuple(groups.tolist())
    tiles = _pack_tiles(tuple(cu_seqlens.tolist()), prompts, q.device)
    out, lse = invariant_attention(q, k, v, tiles, scale)
    return out, lse.transpose(0, 1).contiguous()


@functools.lru_cache(maxsize=4)
def _pack_tiles(offsets: tuple[int, ...], prompts: tuple[int, ...] | None, device: torch.device) -> AttentionTiles:
    """The tiles of a pack, the same for all layers."""
    parts = []
    for index, prompt in enumerate(prompts or [-1] * (len(offsets) - 1)):
        own = np.arange(offsets[index], offsets[index + 1])
        before = np.arange(offsets[prompt], offsets[prompt + 1]) if prompt >= 0 else own[:0]
        parts.append((own, len(before), np.concatenate([before, own])))
    return make_tiles(parts).to(device)


def bitwise_chunk_attention(pool: PagePool, chunks: Sequence[Chunk], slots: Tensor) -> Attend:
    """Attention of prompt chunks over the pages, in the trainer's tiles; see `prefill.ChunkAttention`."""
    parts = []
    begin = 0
    for chunk in chunks:
        count = chunk.end - chunk.begin
        keys = pool.slots(chunk.prompt.pages, 0, chunk.end)
        parts.append((np.arange(begin, begin + count), chunk.begin, keys))
        begin += count
    return _attend_tiles(pool, make_tiles(parts), slots)


def bitwise_forward(model: Qwen25VL, batch: DecodeBatch) -> Tensor:
    """(B, hidden) of one decode step, in the trainer's tiles."""
    pool = batch.pool
    parts = []
    for row, completion in enumerate(batch.completions):
        prompt = completion.prompt
        length = int(batch.host_lengths[row])
        shared = pool.slots(prompt.pages, 0, prompt.length)
        own = pool.slots(batch.host_table[row], 0, length + 1)
        parts.append((np.array([row]), prompt.length + length, np.concatenate([shared, own])))
    assert batch.state is not None  # it has been placed on the device
    tables = batch.state.tables
    slots = new_slots(tables.page_table, tables.lengths, pool.page_size)
    return run_decoder(model, tables, _attend_tiles(pool, make_tiles(parts), slots))


def _attend_tiles(pool: PagePool, tiles: AttentionTiles, slots: Tensor) -> Attend:
    tiles = tiles.to(pool.keys.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = pool.keys[layer].flatten(0, 1)
        values = pool.values[layer].flatten(0, 1)
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)
        return invariant_attention(q, keys, values, tiles, q.shape[-1] ** -0.5)[0]

    return attend


def bitwise_next_tokens(
    hidden: Tensor, weight: Tensor, rows: SamplingRows, steps: Tensor, forbidden: Tensor, seen: Tensor | None
) -> Drawn:
    """`next_tokens` with the raw log-probabilities of the trainer's operator.

    `logprobs` come from it too where all rows have one temperature and no filter or penalty.
    """
    tokens, own, raw = next_tokens(hidden, weight, rows, steps, forbidden, seen)
    if own is None or raw is None:
        return Drawn(tokens)
    valid = tokens.clamp(min=0)  # NOT_FINITE is no token
    raw = linear_logprobs(hidden, weight, valid)[0].double()
    if rows.plain:
        return Drawn(tokens, raw, raw)
    if rows.filtered is None and rows.penalty is None and rows.allowed is None and rows.common_temperature:
        own = linear_logprobs(hidden, weight, valid, temperature=rows.common_temperature)[0].double()
    return Drawn(tokens, own, raw)
