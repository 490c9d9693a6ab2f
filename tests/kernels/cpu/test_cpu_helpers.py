"""shared/cpu.py: the helpers give the plain expressions' values in the layouts that they promise."""

from __future__ import annotations

import pytest
import torch

from fastvst_kernels.shared.cpu import PIECE, column_sum, lazy_zeros, rows_at_once


def test_rows_at_once_bound_the_intermediate_values():
    for shape in ((5000, 3, 80), (7, 10), (1, 1 << 20), (0, 4), (3,)):
        rows = rows_at_once(torch.empty(shape, device="cpu"))
        assert rows >= 1 and (rows == 1 or rows * torch.Size(shape[1:]).numel() <= PIECE)
    assert rows_at_once(torch.empty(9000, 9000, device="meta")) == 9000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_column_sum(dtype):
    x = torch.randint(-9, 9, (50, 7)).to(dtype)  # whole numbers: every order of the sum has the same bits
    assert torch.equal(column_sum(x), x.sum(0)) and column_sum(x[:0]).shape == (7,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lazy_zeros(dtype):
    made = lazy_zeros((2, 3, 5), dtype, torch.device("cpu"))
    assert made.shape == (2, 3, 5) and made.dtype == dtype and not made.any()
    made[1] = 2.0
    assert made.sum() == 30
