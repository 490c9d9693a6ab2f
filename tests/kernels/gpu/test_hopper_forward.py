"""The Gluon attention kernels on a Hopper GPU against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from attention_oracle import Pack, assert_as_good_as_plain, group, join
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention.gluon_backend import HOPPER, WIDTHS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER, reason="needs a Hopper GPU"
)


def attention(pack: Pack, *, causal: bool):
    offsets = pack.offsets("cuda")
    groups = pack.groups("cuda")
    plan = prepare(offsets, groups, causal=causal, num_tokens=pack.tokens)

    def compute(q, k, v):
        options = {"causal": causal, "groups": groups, "plan": plan, "backend": "gluon", "return_lse": True}
        return packed_attention(q, k, v, offsets, **options)

    return compute


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_float64(width: int, dtype: torch.dtype):
    pack = join(group(370, 65, 0, 130), Pack((1, 0, 1025)), group(128, 129))
    assert_as_good_as_plain(attention(pack, causal=True), pack, (14, 2), width, dtype, causal=True, device="cuda")
    pack = Pack((64, 1, 0, 700, 129))
    assert_as_good_as_plain(attention(pack, causal=False), pack, (4, 4), width, dtype, causal=False, device="cuda")


def test_the_same_bits_in_every_run():
    pack = Pack((5000, 300, 2000))
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(pack.tokens, 8, 128, device="cuda", generator=generator).bfloat16() for _ in range(3))
    compute = attention(pack, causal=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first: list[torch.Tensor] = []
    for _ in range(20):
        out, _ = compute(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
