"""Numerics that do not depend on what else is in a batch: trainer and sampler then agree bit for bit.

Under `batch_invariant()` every product and all causal attention run by `fastvst_kernels.invariant`, on tiles at fixed
places. A token's hidden state is then the same whether it is computed in a pack, in a chunk of a prompt or alone in a
decode step; what is left (norms, rotations, activations, windows of pictures) works row by row or picture by picture
anyway, with one configuration for all sizes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvst_kernels.attention.op import attention_op
from fastvst_kernels.invariant.op import AttentionTiles, invariant_attention, invariant_mm, make_tiles

aten = torch.ops.aten


class batch_invariant(TorchDispatchMode):  # noqa: N801 - used as a context manager: `with batch_invariant():`
    """Within it products and causal packed attention do not depend on the batch, forward and backward.

    The trainer computes the log-probabilities it compares (or trains on) inside; `Engine(numerics="bitwise")` does so
    by itself. Costs several times the plain time, and the host waits for the device in every attention: for checks and
    for hunting mismatches, not for production.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.mm.default, aten.mm.dtype):  # mm.dtype names the result's, as the loss head asks for it
            return invariant_mm(*args)
        if func in (aten.mm.out, aten.mm.dtype_out):
            return kwargs["out"].copy_(invariant_mm(*args))
        if func in (aten.addmm.default, aten.addmm.dtype) and not kwargs:
            return _add_mm(*args)
        if func in (aten.addmm.out, aten.addmm.dtype_out) and set(kwargs) == {"out"}:
            return kwargs["out"].copy_(_add_mm(*args))
        if func is aten.addmm_.default and not kwargs:
            return args[0].copy_(_add_mm(*args))
        if func is torch.ops.fastvst.packed_attention.default:
            q, k, v, cu_seqlens, groups, *_, causal, scale = args
            if causal:
                return packed(q, k, v, cu_seqlens, groups, scale)
        return func(*args, **kwargs)


def _add_mm(x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x + a @ b, rounded once."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (invariant_mm(a, b, wide) + x).to(out_dtype or a.dtype)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, groups: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What `fastvst::packed_attention` returns for causal=True: output (T, Hq, D) and logsumexp (Hq, T)."""
    prompts = None if groups is None else tuple(groups.tolist())
    tiles = _tiles(tuple(cu_seqlens.tolist()), prompts, q.device)
    out, lse = invariant_attention(q, k, v, tiles, scale)
    return out, lse.transpose(0, 1).contiguous()


@functools.lru_cache(maxsize=4)
def _tiles(offsets: tuple[int, ...], prompts: tuple[int, ...] | None, device: torch.device) -> AttentionTiles:
    """The tiles of a pack; all its layers ask for the same ones."""
    parts = []
    for index, prompt in enumerate(prompts or [-1] * (len(offsets) - 1)):
        own = np.arange(offsets[index], offsets[index + 1])
        before = np.arange(offsets[prompt], offsets[prompt + 1]) if prompt >= 0 else own[:0]
        parts.append((own, len(before), np.concatenate([before, own])))
    return make_tiles(parts).to(device)


assert attention_op is not None  # the operator must be registered before a dispatch mode can look for it
