"""The contenders of bench/gpu/lm_head.py compute the same gradients; checked on the CPU at a small size."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.lm_head import OBJECTIVES, inputs, policy, supervised

PLAIN = ("fastvst", "torch, logits kept", "torch, chunks of 512 recomputed")


@pytest.mark.parametrize("name", ["cross entropy", *OBJECTIVES])
def test_contenders_agree(name: str) -> None:
    given = inputs(1024, 16, 64, device="cpu", dtype=torch.float64)
    given = {
        n: v.double().detach().requires_grad_(v.requires_grad) if v.is_floating_point() else v for n, v in given.items()
    }
    given["old_logprobs"] += 12.4 - 4.2  # near log(1 / 64): some ratios are clipped, some are not
    given["ref_logprobs"] += 12.4 - 4.2
    made = supervised(given) if name == "cross entropy" else policy(given, OBJECTIVES[name])
    found = {n: make()() for n, make in made.items() if n in PLAIN}
    assert len(found) == (2 if name == "cross entropy" else 3)
    for other, gradients in found.items():
        for a, b in zip(gradients, found["fastvst"], strict=True):
            # PyTorch's cross entropy rounds its logits to float32 here
            tolerance = 1e-6 if name == "cross entropy" else 1e-12
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{other} against fastvst")
