"""Bias, rotation and page write of a decode step on the CPU, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvst_kernels.paged_rope.op import paged_mrope, paged_mrope_op
from paged_rope_case import THETA, assert_as_good_as_formula, make_rope_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_against_the_formula(dtype, bias):
    for lengths in ([1, 5, 0, 4, 17, 0, 8], [1], []):
        for heads, sections in (((3, 1), (2, 3, 3)), ((8, 2), (16, 24, 24))):
            case = make_rope_case(lengths, heads, sections, dtype, bias=bias, same=len(lengths) == 1)
            assert_as_good_as_formula(case, case.run("torch"))


def test_the_operator_and_compilation():
    case = make_rope_case([3, 4, 5], (6, 2), (2, 3, 3), torch.float32, same=True)
    rest = (case.page_table, case.lengths, [2, 3, 3], THETA, torch.float32, False)
    torch.library.opcheck(paged_mrope_op, (case.qkv, case.bias, case.positions, case.k_pages, case.v_pages, *rest))

    def step(qkv, keys, values):
        options = {"sections": (2, 3, 3), "theta": THETA}
        q = paged_mrope(qkv, case.bias, case.positions, keys, values, case.page_table, case.lengths, **options)
        return q + 1, keys.sum()

    pages = [[case.k_pages.clone(), case.v_pages.clone()] for _ in range(2)]
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(case.qkv, *pages[0])
    for a, b in zip((*found, *pages[0]), (*step(case.qkv, *pages[1]), *pages[1]), strict=True):
        assert torch.equal(a, b)


def test_wrong_arguments_are_named():
    case = make_rope_case([3, 4, 5], (6, 2), (2, 3, 3), torch.float32)

    def refused(message: str, **wrong):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(case, **wrong).run("torch")

    refused("qkv is 150 wide; expected", qkv=case.qkv[:, :150])
    refused("sections .* must be 3 numbers that sum to D / 2 = 8", sections=(2, 3, 2))
    refused("lengths .2,.; expected", lengths=case.lengths[:2])
    refused("positions are .*expected integers", positions=case.positions.float())
    refused("q, k_pages, v_pages are torch.float32", k_pages=case.k_pages.double())
    refused("must both be", v_pages=case.v_pages[:-1])
    with pytest.raises(ValueError, match="expected contiguous pages, because they are written"):
        pages = case.k_pages.transpose(0, 1).contiguous().transpose(0, 1)
        rest = (case.page_table, case.lengths)
        paged_mrope(case.qkv, None, case.positions, pages, case.v_pages, *rest, sections=(2, 3, 3), theta=THETA)
    with pytest.raises(ValueError, match="no kernels for 'cpu'"):
        case.run("triton")
