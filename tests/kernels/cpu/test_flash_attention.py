"""flash-attn's documented semantics: masks, layouts, and a named refusal of what is not implemented."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvst_kernels.integrations.flash_attention import flash_attn_func, flash_attn_varlen_func


def construct_mask(queries: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """True = masked: query i sees the keys from i + Tk - Tq - left to i + Tk - Tq + right, as the docstrings say."""
    masked = torch.zeros(queries, keys, dtype=torch.bool)
    left = window[0]
    right = 0 if causal else window[1]
    for i in range(queries):
        for j in range(keys):
            distance = j - (i + keys - queries)
            masked[i, j] = (left >= 0 and distance < -left) or (right >= 0 and distance > right)
    return masked


def plain(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """(Tq, H, D) and (H, Tq) in float64."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double() * scale, k)
    masked = construct_mask(len(q), len(k), causal, window)
    scores = scores.masked_fill(masked, -torch.inf)
    attention = torch.softmax(scores, -1).masked_fill(masked.all(-1, keepdim=True), 0.0)
    lse = torch.logsumexp(scores, -1)
    return torch.einsum("hts,shd->thd", attention, v), torch.where(lse == -torch.inf, torch.inf, lse)


@pytest.mark.parametrize("window", [(-1, -1), (2, -1), (-1, 1), (1, 2), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (2, 5), (5, 2)], ids=str)
@pytest.mark.parametrize("width", [32, 40])
def test_batch(lengths: tuple[int, int], causal: bool, window: tuple[int, int], width: int) -> None:
    torch.manual_seed(0)
    queries, keys = lengths
    q = torch.randn(3, queries, 4, width, requires_grad=True)
    k, v = (torch.randn(3, keys, 2, width, requires_grad=True) for _ in range(2))
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": causal, "window_size": window}
    out, lse, probs = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert probs is None and lse.shape == (3, 4, queries) and out.shape == q.shape
    wanted = [plain(q[i], k[i], v[i], causal, window, 0.3) for i in range(3)]
    torch.testing.assert_close(out.double(), torch.stack([x for x, _ in wanted]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.stack([x for _, x in wanted]), rtol=1e-5, atol=1e-5)
    assert torch.equal(flash_attn_func(q, k, v, **options), out)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((torch.stack([x for x, _ in wanted]) * weights).sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [(-1, -1), (2, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offsets", [([0, 5, 6, 13], [0, 5, 6, 13]), ([0, 2, 3, 7], [0, 5, 5, 13])], ids=str)
def test_packed(offsets: tuple[list[int], list[int]], causal: bool, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    of_queries, of_keys = (torch.tensor(x, dtype=torch.int32) for x in offsets)
    q = torch.randn(offsets[0][-1], 4, 32)
    k, v = (torch.randn(offsets[1][-1], 2, 32) for _ in range(2))
    options: dict[str, Any] = {"causal": causal, "window_size": window, "return_attn_probs": True}
    out, lse, _ = flash_attn_varlen_func(q, k, v, of_queries, of_keys, 7, 8, **options)
    assert lse.shape == (4, len(q)) and lse.dtype == torch.float32
    rows = zip(pairwise(offsets[0]), pairwise(offsets[1]), strict=True)
    wanted = [plain(q[a:b], k[c:d], v[c:d], causal, window, 32**-0.5) for (a, b), (c, d) in rows]
    torch.testing.assert_close(out.double(), torch.cat([x for x, _ in wanted]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.cat([x for _, x in wanted], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"dropout_p": 0.1},
        {"softcap": 30.0},
        {"alibi_slopes": torch.ones(4)},
        {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_not_implemented_is_refused_by_name(option: dict[str, Any]) -> None:
    q = torch.randn(4, 4, 32)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"flash_attn_varlen_func: {name} is not implemented"):
        flash_attn_varlen_func(q, q, q, offsets, offsets, 4, 4, **option)
    if name != "block_table":
        with pytest.raises(ValueError, match=f"flash_attn_func: {name} is not implemented"):
            flash_attn_func(q[None], q[None], q[None], **option)
    with pytest.raises(ValueError, match="expected .total, H, D."):
        flash_attn_varlen_func(q[None], q, q, offsets, offsets, 4, 4)
