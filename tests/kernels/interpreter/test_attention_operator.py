"""`packed_attention(backend="triton")` as an operator: autograd, opcheck, torch.compile, checkpointing, plans."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attention_oracle import Pack, assert_as_good_as_plain, group, join
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention.op import attention_op
from fastvst_kernels.attention.plan import kernel_tiles

PACK = join(group(20, 5, 0, 9), Pack((7,)))
OFFSETS = PACK.offsets()
GROUPS = PACK.groups()


def triton_attention(q, k, v, **options):
    return packed_attention(q, k, v, OFFSETS, causal=True, groups=GROUPS, backend="triton", **options)


def test_the_public_function_with_views_and_logsumexp():
    def compute(q, k, v):
        assert not q.is_contiguous()  # views into one tensor
        return triton_attention(q, k, v, return_lse=True)

    assert_as_good_as_plain(compute, PACK, (4, 2), 16, torch.float32, causal=True, with_dlse=True)


def test_opcheck():
    q, k, v = (torch.randn(PACK.tokens, h, 16, requires_grad=True) for h in (2, 1, 1))
    plan = prepare(OFFSETS, GROUPS, causal=True)
    tables = plan.tables(kernel_tiles(q), q.device)
    torch.library.opcheck(attention_op, (q, k, v, OFFSETS, GROUPS, *tables, True, 0.25))


def test_compile_and_checkpoint_give_the_eager_gradients():
    plan = prepare(OFFSETS, GROUPS, causal=True)
    weight = torch.randn(16, 4 * 16)

    def block(x):
        q, k, v = (x @ weight).view(-1, 4, 16).split([2, 1, 1], 1)
        return triton_attention(q, k, v, plan=plan).flatten(1).tanh()

    x = torch.randn(PACK.tokens, 16)
    gradients = []
    for run in (
        block,
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(block, x, use_reentrant=False),
    ):
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[0])


def test_a_plan_of_another_batch_is_refused():
    q = torch.randn(PACK.tokens, 1, 16)
    with pytest.raises(ValueError, match="the plan is for"):
        triton_attention(q, q, q, plan=prepare(Pack((5,)).offsets(), causal=True))
    with pytest.raises(ValueError, match="no tables for tiles"):
        triton_attention(q, q, q, plan=prepare(OFFSETS, GROUPS, causal=True, query_blocks=(), key_blocks=()))


def test_wrong_offsets_and_groups_stay_inside_the_pack():
    """Without validate=True wrong values give wrong numbers, but no address outside the tensors."""
    q = torch.randn(PACK.tokens, 1, 16)
    wild = torch.tensor([-5, 900, 3, 1 << 30, 7, PACK.tokens + 99], dtype=torch.int32)
    plan = prepare(wild, torch.tensor([4, 0, -9, 7, 1]), causal=True, num_tokens=PACK.tokens)
    for table in (*plan.queries.values(), *plan.keys.values()):
        assert table.min() >= 0 and table.max() <= PACK.tokens
    assert q.shape[0] == PACK.tokens
