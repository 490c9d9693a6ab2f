"""The batch-invariant kernels in Triton's interpreter: close to float64, and equal bits of a row in any batch."""

from __future__ import annotations

import pytest
import torch

from fastvst_kernels.invariant.op import invariant_attention, invariant_mm
from invariant_case import assert_attention, assert_invariant_attention, assert_invariant_mm, make_case

# Tiles hold rows without a query, whose softmax is never stored.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 5), (70, 96, 300), (63, 65, 64), (17, 1, 1)])
def test_products(shape, dtype):
    assert_invariant_mm(*shape, dtype, backend="triton", moves=False)


def test_empty_products():
    a = torch.randn(3, 4)
    b = torch.randn(4, 5)
    assert invariant_mm(a[:0], b, backend="triton").shape == (0, 5)
    assert torch.equal(invariant_mm(a[:, :0], b[:0], backend="triton"), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 16), ((7, 1), 128), ((2, 2), 80), ((2, 1), 256)])
def test_attention(heads, width, dtype):
    case = make_case([(70, [5, 15]), (1, []), (64, [65, 0, 1]), (0, [3])], heads, width, dtype)
    assert_attention(case, invariant_attention(*case.qkv, case.tiles, case.scale, backend="triton"))
    if width < 128:
        assert_invariant_attention(case, backend="triton")


def test_every_value_is_written():
    case = make_case([(33, [2, 31])], (2, 1), 48, torch.float32)
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        found = invariant_attention(*case.qkv, case.tiles, case.scale, backend="triton")
        product = invariant_mm(case.q[:, 0], case.k[:, 0].t(), backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in (*found, product))
