"""The decode kernels in Triton's interpreter against plain softmax attention in float64."""

from __future__ import annotations

import pytest
import torch

from decode_case import assert_close, make_case
from fastvst_kernels import decode_attention
from fastvst_kernels.decode.kernels import choose_splits, decode
from fastvst_kernels.decode.op import decode_attention_op


def run(case, splits=None):
    return decode(case.q, case.k_pages, case.v_pages, case.tables, case.q.shape[-1] ** -0.5, splits)


@pytest.mark.parametrize("splits", [None, 1, 3])
def test_groups_and_splits(splits):
    case = make_case([(70, [3, 33, 0]), (0, [5, 0]), (16, [1]), (33, [2] * 9)], (6, 2), 32, torch.float32)
    assert_close(case, run(case, splits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "width"), [((7, 1), 128), ((16, 2), 128), ((2, 2), 80), ((2, 1), 256)])
def test_half_precision_at_the_real_heads(heads, width, dtype):
    case = make_case([(100, [20] * 3), (7, [64, 65])], heads, width, dtype, page_size=64)
    assert_close(case, run(case, 2))


def test_groups_larger_than_a_tile():
    case = make_case([(20, [1] * 40), (5, [2])], (4, 2), 16, torch.float32, page_size=4)
    assert_close(case, run(case))


def test_the_public_function_and_opcheck():
    case = make_case([(9, [2, 0]), (3, [5])], (2, 1), 16, torch.float32, page_size=4)
    tables = (case.page_table, case.lengths, case.prefix_pages, case.prefix_lengths, case.group_offsets)
    found = decode_attention(
        case.q,
        case.k_pages,
        case.v_pages,
        case.page_table,
        case.lengths,
        return_lse=True,
        backend="triton",
        **case.options(),
    )
    assert_close(case, found)
    torch.library.opcheck(decode_attention_op, (case.q, case.k_pages, case.v_pages, *tables, 2, 0.25, True))


def test_runs_are_bitwise_equal_and_every_value_is_written():
    case = make_case([(70, [3, 33, 0]), (0, [0])], (4, 2), 48, torch.float32)
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        first = run(case, 2)
        second = run(case, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()


def test_splits_fill_the_device_and_never_more():
    assert choose_splits(8, 2048, 64, 132) == 16 and choose_splits(256, 2048, 64, 132) == 2
    assert choose_splits(4096, 2048, 64, 132) == 1 and choose_splits(1, 100, 64, 132) == 2
