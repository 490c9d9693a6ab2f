"""examples/embed_in_torch.py: a shared prompt gives the same rows and gradients as repeated prompts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

PATH = Path(__file__).parents[2] / "examples" / "embed_in_torch.py"


def test_shared_prompts_equal_repeated_ones():
    spec = importlib.util.spec_from_file_location("example_embed_in_torch", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(example.Block(32, 2, 1) for _ in range(2)).double()
    prompt = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    completions = [torch.randn(n, 32, dtype=torch.float64) for n in (4, 1, 7)]
    shared, repeated = example.shared_and_repeated(prompt, completions, blocks)
    torch.testing.assert_close(shared, repeated)
    weights = torch.randn_like(shared)
    inputs = [prompt, *blocks.parameters()]
    one = torch.autograd.grad((shared * weights).sum(), inputs, retain_graph=True)
    other = torch.autograd.grad((repeated * weights).sum(), inputs)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_cost_is_printed_and_the_group_holds_less():
    spec = importlib.util.spec_from_file_location("example_embed_in_torch", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.cost(64, 4, 16, 64)
    assert found.ours.peak_bytes < 0.7 * found.host.peak_bytes and " times the speed" in str(found)
