"""Bias, rotation and page write on a GPU against the plain path. Not run yet."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from paged_rope_case import RopeCase, make_rope_case


def on_gpu(case: RopeCase) -> RopeCase:
    moved = {f.name: getattr(case, f.name).cuda() for f in dataclasses.fields(case) if _is_tensor(case, f.name)}
    return dataclasses.replace(case, **moved)


def _is_tensor(case: RopeCase, name: str) -> bool:
    return isinstance(getattr(case, name), Tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(28, 4), (16, 2)])
def test_real_sizes(heads, dtype):
    lengths = [0 if i % 9 == 0 else 1 + 37 * i % 900 for i in range(256)]
    case = make_rope_case(lengths, heads, (16, 24, 24), dtype, page_size=16, same=True)
    found = on_gpu(case).run("auto")
    tolerance = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 2e-6}[dtype]
    for a, b in zip(found, case.run("torch"), strict=True):
        # Padding rows write one slot, in any order.
        torch.testing.assert_close(a.cpu()[1:], b[1:], rtol=tolerance, atol=tolerance)
