"""The FLOP formulas that the package registers, against sums over pairs and rows written out here."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastvst_kernels
from operator_calls import operator_call
from operator_habits import function_of, results, split, with_gradients

ROWS = 2 * 11 * 32 * 40  # one product of the LM head on the rows of its call that are not ignored
PAIRS = sum(range(1, 6)) + sum(range(1, 8)) + 7 * 5  # sequences of 5 and 7 tokens, the second continues the first
EXPECTED = {
    "packed_attention": 3 * 4 * 4 * 16 * PAIRS,
    "window_attention": 3 * 4 * 32 * (5**2 + 7**2),
    "decode_attention": 4 * 4 * 16 * (6 + 3 + 8 + 2 * 5 + 7),
    "linear_cross_entropy": 3 * ROWS,
    "linear_logprobs": 3 * ROWS,
    "linear_policy_loss": 3 * ROWS,
    "sample_tokens": 2 * 6 * 32 * 40,
    "packed_linear": 3 * 2 * 12 * 32 * 10,
    "rms_norm": 0,
    "swiglu": 0,
}


def counted(name: str) -> int:
    tensors, others = split(operator_call(name))
    if name == "linear_policy_loss":
        del tensors["old_logprobs"]  # the ratio is 1: no row is clipped, which would skip its backward products
    leaves = with_gradients(name, tensors)
    with FlopCounterMode(display=False) as counter:
        results(function_of(name, others), tensors, leaves)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", EXPECTED)
def test_forward_and_backward(name: str) -> None:
    assert counted(name) == EXPECTED[name]


def test_a_frozen_weight_has_no_product() -> None:
    call = operator_call("linear_cross_entropy")
    with FlopCounterMode(display=False) as counter:
        fastvst_kernels.linear_cross_entropy(call["hidden"].requires_grad_(), call["weight"], call["targets"])
    assert counter.get_total_flops() == 2 * ROWS


def test_fake_tensors_count_equal_sequences_and_all_rows() -> None:
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        q = torch.empty(12, 4, 16)
        fastvst_kernels.packed_attention(q, q, q, mode.from_tensor(torch.tensor([0, 5, 12])), causal=True)
    assert counter.get_total_flops() == 4 * 4 * 16 * 2 * sum(range(1, 7))
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        fastvst_kernels.linear_logprobs(torch.empty(12, 32), torch.empty(40, 32), torch.zeros(12).long())
    assert counter.get_total_flops() == 2 * 12 * 32 * 40
