"""Batch-invariant products and attention: a row has the same bits in any batch, and is close to float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvst_kernels.invariant.op import invariant_attention, invariant_mm, invariant_mm_op
from fastvst_kernels.invariant.tiles import ROWS, make_tiles
from invariant_case import assert_attention, assert_invariant_attention, assert_invariant_mm, make_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 5), (70, 96, 300), (63, 65, 64), (17, 1, 1)])
def test_products(shape, dtype):
    assert_invariant_mm(*shape, dtype)


def test_a_plain_product_depends_on_the_other_rows():
    """Why the module exists: torch's product of a row alone and among others has different bits."""
    torch.manual_seed(0)
    a = torch.randn(256, 1000)
    b = torch.randn(1000, 300)
    assert any(not torch.equal((a[:rows] @ b)[0], (a @ b)[0]) for rows in range(1, 64))


def test_empty_products_and_bad_input():
    a = torch.randn(3, 4)
    b = torch.randn(4, 5)
    assert invariant_mm(a[:0], b).shape == (0, 5) and invariant_mm(a, b[:, :0]).shape == (3, 0)
    assert torch.equal(invariant_mm(a[:, :0], b[:0]), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"\(3, 4\) and b \(3, 5\)"):
        invariant_mm(a, b[:3])
    with pytest.raises(ValueError, match="one floating dtype"):
        invariant_mm(a, b.double())
    with pytest.raises(ValueError, match="has no kernels for 'cpu'"):
        invariant_mm(a, b, backend="triton")
    torch.library.opcheck(invariant_mm_op, (a, b, torch.float32, False))
    torch.library.opcheck(invariant_mm_op, (a.bfloat16(), b.t().bfloat16().t(), torch.float32, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 16), ((7, 1), 48)])
def test_attention(heads, width, dtype):
    case = make_case([(70, [5, 15]), (1, []), (64, [64, 0, 1]), (0, [3])], heads, width, dtype)
    assert_attention(case, invariant_attention(*case.qkv, case.tiles, case.scale))
    assert_invariant_attention(case)


def test_tiles_without_queries():
    empty = make_tiles([])
    assert empty.queries.shape == (0, ROWS) and empty.blocks == (0,)
    q = torch.zeros(0, 2, 16)
    out, lse = invariant_attention(q, q, q, empty, 1.0)
    assert out.shape == q.shape and lse.shape == (0, 2)


def test_tiles_of_tensors_lists_and_arrays_are_equal():
    rows = torch.tensor([4, 1, 7])
    keys = torch.arange(20, 39)
    wanted = make_tiles([(rows, 16, keys)])
    for convert in (Tensor.tolist, Tensor.numpy):
        found = make_tiles([(convert(rows), 16, convert(keys))])
        assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in ("queries", "places", "keys"))
    assert wanted.queries.tolist() == [[4, 1, 7] + [-1] * 13] and wanted.places[0, 0] == 16
    assert wanted.keys.tolist() == [list(range(20, 39)) + [-1] * 45]
