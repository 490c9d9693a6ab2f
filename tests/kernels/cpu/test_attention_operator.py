"""`fastvst::packed_attention` on the CPU: opcheck, torch.compile, checkpointing, refusals of backends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attention_oracle import Pack, group, join
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention.op import attention_backward_op, attention_op

PACK = join(group(9, 4, 0, 5), Pack((6,)))
OFFSETS = PACK.offsets()
GROUPS = PACK.groups()


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(torch.randn(PACK.tokens, heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))


def test_opcheck_forward_and_backward():
    q, k, v = tensors()
    tail = (None, None, None, True, 0.25)
    torch.library.opcheck(attention_op, (q, k, v, OFFSETS, GROUPS, *tail))
    torch.library.opcheck(attention_op, (q, k, v, OFFSETS, None, *tail[:3], False, 0.25))
    with torch.no_grad():
        out, lse = attention_op(q, k, v, OFFSETS, GROUPS, *tail)
        arguments = [x.detach() for x in (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)]
    torch.library.opcheck(attention_backward_op, (*arguments, OFFSETS, GROUPS, None, None, True, 0.25))


def test_gradients_of_output_and_logsumexp():
    def both(q, k, v):
        return packed_attention(q, k, v, OFFSETS, causal=True, groups=GROUPS, return_lse=True)

    torch.autograd.gradcheck(both, tensors(), atol=1e-6, fast_mode=True)
    torch.autograd.gradcheck(lambda q, k, v: both(q, k, v)[0], tensors(), atol=1e-6, fast_mode=True)
    torch.autograd.gradcheck(lambda q, k, v: both(q, k, v)[1], tensors(), atol=1e-6, fast_mode=True)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for wrap in (False, True):
        q, k, v = tensors()

        def attend(q, k, v):
            return packed_attention(q, k, v, OFFSETS, causal=True, groups=GROUPS)

        out = checkpoint(attend, q, k, v, use_reentrant=False) if wrap else attend(q, k, v)
        out.sum().backward()  # an expanded gradient of stride 0
        gradients.append(torch.cat([x.grad for x in (q, k, v)], 1))
    assert torch.equal(*gradients)


def test_compiles_without_a_graph_break_and_keeps_the_numbers():
    weight = torch.randn(32, 8 * 16, dtype=torch.float64)

    def block(x, offsets, groups):
        q, k, v = (x @ weight).view(-1, 8, 16).split([4, 2, 2], 1)
        return x + packed_attention(q, k, v, offsets, causal=True, groups=groups).flatten(1) @ weight[:, :64].T

    x = torch.randn(PACK.tokens, 32, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run in (block, compiled):
        out = run(x, OFFSETS, GROUPS)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(results[1], results[0])


def test_backends_that_lack_something_say_so():
    q, k, v = tensors(torch.float32)
    with pytest.raises(ValueError, match="'triton' has no kernels for 'cpu'"):
        packed_attention(q, k, v, OFFSETS, causal=True, backend="triton")
    with pytest.raises(ValueError, match="expected a positive number"):
        packed_attention(q, k, v, OFFSETS, causal=True, scale=0.0)
    other = prepare(OFFSETS, causal=False)
    with pytest.raises(ValueError, match="the plan is for"):
        packed_attention(q, k, v, OFFSETS, causal=True, plan=other)


def test_the_package_imports_neither_triton_nor_transformers():
    code = (
        "import torch, sys, time; begin = time.perf_counter(); import fastvst_kernels;"
        "print(time.perf_counter() - begin);"
        "assert 'transformers' not in sys.modules and 'fastvst_kernels.attention.forward' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
