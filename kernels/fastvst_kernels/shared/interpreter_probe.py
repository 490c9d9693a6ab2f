"""Whether Triton's interpreter multiplies bfloat16 as the kernels need it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(
    a_ptr,
    out_ptr,
    N: tl.constexpr,
):
    """out (N, N) float32 = a @ a^T of a (N, N)."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, tl.trans(a)))


def product_is_right() -> bool:
    """Compares one product with torch's."""
    a = torch.linspace(-1, 1, 256).view(16, 16).bfloat16()
    out = torch.empty(16, 16)
    product_kernel[(1,)](a, out, N=16)
    return torch.allclose(out, a.float() @ a.float().t(), rtol=1e-3, atol=1e-3)
