"""`pip install ./kernels` alone: in an environment with its declared dependencies and nothing else, operators run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from installation import build_wheel, install

KERNELS = Path(__file__).parents[2] / "kernels"

OPERATORS = """
import torch
import fastvst_kernels as ops
from fastvst_kernels.invariant.op import invariant_mm

torch.manual_seed(0)

def leaf(*shape):
    return torch.randn(shape, requires_grad=True)

def check(family, out, *inputs):
    out.float().square().sum().backward()
    for x in inputs:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any(), family
    print(family)

offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
q, k, v = leaf(12, 4, 16), leaf(12, 2, 16), leaf(12, 2, 16)
groups = torch.tensor([-1, 0], dtype=torch.int32)
check("attention", ops.packed_attention(q, k, v, offsets, causal=True, groups=groups), q, k, v)
qkv, bias, places = leaf(12, 96), leaf(96), torch.randint(0, 9, (12, 2))
check("window", ops.window_attention(qkv, bias, places, offsets, num_heads=2), qkv, bias)
qkv = leaf(12, 128)
positions = torch.arange(12).expand(3, 12)
turned = ops.mrope(qkv, None, positions, num_heads=4, num_kv_heads=2, head_dim=16, sections=(2, 3, 3), theta=1e4)
check("rope", torch.cat(turned, 1), qkv)
q, k = leaf(12, 4, 16), leaf(12, 2, 16)
turned = ops.rotary_embedding(q, k, torch.randn(12, 8), torch.randn(12, 8), interleaved=True)
check("rotary", torch.cat(turned, 1), q, k)
x, residual, weight = leaf(12, 32), leaf(12, 32), leaf(32)
check("norm", torch.cat(ops.add_rms_norm(x, residual, weight, 1e-6), 1), x, residual, weight)
gate, up = leaf(12, 20), leaf(12, 20)
check("activation", ops.swiglu(gate, up), gate, up)
hidden, head = leaf(12, 32), leaf(101, 32)
check("lm_head", ops.linear_cross_entropy(hidden, head, torch.arange(12)), hidden, head)
with torch.no_grad():
    pages = torch.randn(3, 4, 2, 16)
    table, lengths = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    assert ops.decode_attention(torch.randn(1, 4, 16), pages, pages, table, lengths).shape == (1, 4, 16)
    print("decode")
    tokens, logprobs, _ = ops.sample_tokens(hidden, head, torch.arange(12), torch.zeros(12, dtype=torch.int64))
    assert tokens.shape == (12,) and (logprobs < 0).all()
    print("sampling")
    assert invariant_mm(torch.randn(5, 32), torch.randn(32, 7)).shape == (5, 7)
    print("invariant")
"""
FAMILIES = ["attention", "window", "rope", "rotary", "norm", "activation", "lm_head", "decode", "sampling", "invariant"]


@pytest.mark.slow
def test_one_operator_of_each_family_runs_forward_and_backward(tmp_path):
    wheel = build_wheel(KERNELS, tmp_path)
    python = install(wheel, tmp_path / "env") / "python"
    done = subprocess.run([str(python), "-I", "-c", OPERATORS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == FAMILIES
