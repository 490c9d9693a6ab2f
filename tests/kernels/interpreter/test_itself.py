"""The corrected bf16 of Triton's interpreter (conftest.py) agrees with torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _product(A, B, OUT, CAST, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(A + at)
    product = tl.dot(a, tl.trans(tl.load(B + at)))
    tl.store(OUT + at, product)
    tl.store(CAST + at, product.to(tl.bfloat16))


def test_bfloat16_products_and_rounding_are_those_of_torch():
    torch.manual_seed(0)
    a, b = (torch.randn(32, 32, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(32, 32)
    cast = torch.empty(32, 32, dtype=torch.bfloat16)
    _product[(1,)](a, b, out, cast, N=32)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(cast, out.bfloat16())
