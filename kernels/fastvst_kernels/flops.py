"""Floating-point operations of the operators for `torch.utils.flop_counter`; importing this module registers them.

The rules are those of `torch.utils.flop_counter` for model FLOPs: only products count, a multiply-add is 2, a causal
sequence of L tokens has L (L + 1) / 2 pairs, and what a backward pass computes again does not count. Backward then has
twice the operations of forward. Offsets and targets are read, so counting waits for a GPU. Fake tensors have no values:
all sequences then count as equally long, and all rows of the LM head count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

# Importing these modules makes the operators.
from fastvst_kernels.attention import library_op as _library_op  # noqa: F401
from fastvst_kernels.attention import op as _attention_op  # noqa: F401
from fastvst_kernels.decode import op as _decode_op  # noqa: F401
from fastvst_kernels.invariant import op as _invariant_op  # noqa: F401
from fastvst_kernels.lm_head import cross_entropy as _cross_entropy_op  # noqa: F401
from fastvst_kernels.lm_head import logprobs as _logprobs_op  # noqa: F401
from fastvst_kernels.lm_head.types import IGNORE
from fastvst_kernels.sampling import op as _sampling_op  # noqa: F401
from fastvst_kernels.window import op as _window_op  # noqa: F401


def attention_pairs(offsets: Tensor, tokens: int, groups: Tensor | None, causal: bool) -> int:
    """Pairs of a query and a key that it sees, in a packed row of `tokens` tokens with offsets (S + 1,)."""
    if _unknown(offsets):
        count = max(1, offsets.shape[0] - 1)
        lengths = [tokens // count] * count
        prompts = [-1] * count
    else:
        lengths = offsets.diff().tolist()
        prompts = [-1] * len(lengths) if groups is None else groups.tolist()
    if not causal:
        return sum(n * n for n in lengths)
    shared = sum(n * lengths[prompt] for n, prompt in zip(lengths, prompts, strict=True) if prompt >= 0)
    return sum(n * (n + 1) // 2 for n in lengths) + shared


def head_flops(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, weights: Tensor | None) -> int:
    """One product of the LM head on the rows that have a loss."""
    if _unknown(targets):
        count = hidden.shape[0] if rows is None else rows.shape[0]
    else:
        keep = targets != IGNORE if weights is None else (targets != IGNORE) & (weights != 0)
        count = int(keep.sum() if rows is None else keep[rows.long()].sum())
    return 2 * count * weight.shape[0] * weight.shape[1]


def _unknown(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, groups: Tensor | None, *options: Any) -> int:
    causal = options[-2]
    return 4 * q.shape[1] * q.shape[2] * attention_pairs(cu_seqlens, q.shape[0], groups, causal)


def _attention_backward(dout: Tensor, dlse: Any, q: Tensor, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> int:
    cu_seqlens, groups = rest[:2]
    causal = rest[-2]
    return 8 * q.shape[1] * q.shape[2] * attention_pairs(cu_seqlens, q.shape[0], groups, causal)


def _library_backward(dout: Tensor, *inputs: Any) -> int:
    return _attention_backward(dout, None, *inputs)


def _window(qkv: Tensor, bias: Any, positions: Any, cu_windows: Tensor, *options: Any) -> int:
    return 4 * (qkv.shape[1] // 3) * attention_pairs(cu_windows, qkv.shape[0], None, False)


def _window_backward(grad: Tensor, *inputs: Any) -> int:
    cu_windows = inputs[5]
    return 8 * grad.shape[1] * attention_pairs(cu_windows, grad.shape[0], None, False)


def _decode(q: Tensor, k_pages: Tensor, v_pages: Any, page_table: Tensor, lengths: Tensor, *tables: Any) -> int:
    prefix_pages, prefix_lengths, group_offsets = tables[:3]
    if _unknown(lengths):
        keys = q.shape[0] * (page_table.shape[1] + prefix_pages.shape[1]) * k_pages.shape[1]
    else:
        keys = int(lengths.sum() + (group_offsets.diff() * prefix_lengths).sum())
    return 4 * q.shape[1] * q.shape[2] * keys


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, row_weights: Any, *options: Any) -> int:
    rows = options[0]
    needs = options[-1]
    return (1 + needs[0] + needs[1]) * head_flops(hidden, weight, targets, rows, row_weights)


def _logprobs(hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, rows: Tensor | None, *options: Any) -> int:
    return head_flops(hidden, weight, targets, rows, None)


def _logprobs_backward(g: Any, e: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, *rest: Any) -> int:
    rows = rest[0]
    needs = rest[-1]
    return (needs[0] + needs[1]) * head_flops(hidden, weight, targets, rows, None)


def _sample(hidden: Tensor, weight: Tensor, *options: Any) -> int:
    return 2 * hidden.shape[0] * weight.shape[0] * weight.shape[1]


def _mm(a: Tensor, b: Tensor, *options: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


FORMULAS = {
    "packed_attention": _attention,
    "packed_attention_backward": _attention_backward,
    "packed_attention_gluon": _attention,
    "packed_attention_gluon_backward": _attention_backward,
    "library_attention": _attention,
    "library_attention_backward": _library_backward,
    "window_attention": _window,
    "window_attention_backward": _window_backward,
    "decode_attention": _decode,
    "linear_cross_entropy": _cross_entropy,
    "linear_logprobs": _logprobs,
    "linear_logprobs_backward": _logprobs_backward,
    "sample_tokens": _sample,
    "invariant_mm": _mm,
}


def _register() -> None:
    for name, formula in FORMULAS.items():

        def count(*args: Any, out_val: Any = None, formula: Any = formula, **kwargs: Any) -> int:
            return int(formula(*args, **kwargs))

        register_flop_formula(getattr(torch.ops.fastvst, name), get_raw=True)(count)


_register()
