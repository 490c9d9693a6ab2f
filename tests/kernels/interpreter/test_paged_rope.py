"""The kernel of bias, rotation and page write in Triton's interpreter against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from fastvst_kernels import mrope
from fastvst_kernels.paged_rope.op import paged_mrope_op
from paged_rope_case import THETA, assert_as_good_as_formula, make_rope_case

LENGTHS = [1, 5, 0, 4, 17, 0, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "sections"), [((3, 1), (2, 3, 3)), ((8, 2), (8, 8, 8)), ((7, 1), (16, 24, 24)), ((2, 2), (20, 10, 10))]
)
def test_against_the_formula(heads, sections, dtype):
    for same in (True, False):
        case = make_rope_case(LENGTHS, heads, sections, dtype, same=same)
        assert_as_good_as_formula(case, case.run("triton"))


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_of_other_sizes_and_no_bias(page_size):
    case = make_rope_case([2, 33, 1], (4, 2), (2, 3, 3), torch.float32, page_size=page_size, bias=False)
    assert_as_good_as_formula(case, case.run("triton"))
    none = make_rope_case([], (4, 2), (2, 3, 3), torch.float32, page_size=page_size)
    assert none.run("triton")[0].shape == (0, 4, 16)


def test_a_key_has_the_bits_that_prefill_gives_it():
    case = make_rope_case([3, 4, 5], (6, 2), (2, 3, 3), torch.float32, same=True)
    q, keys, _ = case.run("triton")
    options = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "sections": (2, 3, 3), "theta": THETA}
    expected = mrope(case.qkv, case.bias, case.positions, backend="triton", **options)
    assert torch.equal(q, expected[0])
    for row, length in enumerate(case.lengths.tolist()):
        page = int(case.page_table[row, (length - 1) // 4])
        assert torch.equal(keys[page, (length - 1) % 4], expected[1][row])


def test_opcheck_and_strided_rows():
    case = make_rope_case([3, 4, 5], (6, 2), (2, 3, 3), torch.float32, same=True)
    rest = (case.page_table, case.lengths, [2, 3, 3], THETA, torch.float32, True)
    torch.library.opcheck(paged_mrope_op, (case.qkv, case.bias, case.positions, case.k_pages, case.v_pages, *rest))
    wide = torch.randn(3, 400)
    wide[:, :160] = case.qkv
    for a, b in zip(case.run("triton"), _with(case, wide[:, :160]).run("triton"), strict=True):
        assert torch.equal(a, b)


def _with(case, qkv):
    import dataclasses

    return dataclasses.replace(case, qkv=qkv)
