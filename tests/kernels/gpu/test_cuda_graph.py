"""Training steps with the losses in a CUDA graph: captured once, replayed on other values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvst_kernels import linear_cross_entropy, linear_logprobs, linear_policy_loss, rms_norm, rotary_embedding
from fastvst_kernels.objectives import DAPO, GSPO

ROWS = 512


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    advantages = torch.randn(ROWS, device="cuda")
    ids = torch.arange(ROWS, device="cuda") // 64
    old = torch.rand(ROWS, device="cuda") - 3

    def policy(objective):
        options = {"advantages": advantages, "old_logprobs": old, "sequence_ids": ids}
        return lambda h, w, t: linear_policy_loss(h, w, t, objective, **options)[0]

    return {
        "cross entropy": lambda h, w, t: linear_cross_entropy(h, w, t, label_smoothing=0.1, z_loss=1e-4),
        "logprobs": lambda h, w, t: linear_logprobs(h, w, t)[0].sum() + linear_logprobs(h, w, t)[1].square().sum(),
        "token-level policy loss": policy(DAPO()),
        "sequence-level policy loss": policy(GSPO()),
    }


@pytest.mark.parametrize("name", ["cross entropy", "logprobs", "token-level policy loss", "sequence-level policy loss"])
def test_a_captured_step_gives_the_gradients_of_a_step(name: str) -> None:
    torch.manual_seed(0)
    loss = losses()[name]
    weight = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    norm = torch.ones(128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(ROWS, 1, 128, device="cuda", dtype=torch.bfloat16)
    cos, sin = (f(torch.rand(ROWS, 64, device="cuda")) for f in (torch.cos, torch.sin))
    targets = torch.randint(0, 1000, (ROWS,), device="cuda")
    targets[::3] = -100

    def step() -> None:
        turned = rotary_embedding(x, x, cos, sin)[0][:, 0]
        loss(rms_norm(turned, norm, 1e-6), weight, targets).backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    weight.grad = norm.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (1, 2):  # other values, and other rows without a loss
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        targets.copy_(torch.where(torch.rand(ROWS, device="cuda") < 0.4, -100, targets.clamp(min=0)))
        weight.grad.zero_()
        norm.grad.zero_()
        graph.replay()
        found = [weight.grad.clone(), norm.grad.clone()]
        weight.grad.zero_()
        norm.grad.zero_()
        step()
        for a, b in zip(found, (weight.grad, norm.grad), strict=True):
            assert torch.equal(a, b)
