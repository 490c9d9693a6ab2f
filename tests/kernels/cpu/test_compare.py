"""fastvst_kernels/integrations/compare.py: bytes that are known, times in turns, and a line that says both."""

from __future__ import annotations

import torch

from fastvst_kernels.integrations.compare import MIB, Comparison, Cost, compare, peak_bytes


def mib(count: int) -> torch.Tensor:
    return torch.ones(count * MIB // 4)


def test_peak_bytes_are_those_held_at_once():
    kept = mib(64)  # before the call

    def run() -> torch.Tensor:
        first = mib(10)
        second = mib(20)
        del first
        return second.add_(mib(5)[0].item() + kept[0].item())

    assert 30 * MIB <= peak_bytes(run) < 30.1 * MIB
    assert peak_bytes(lambda: None) == 0


def test_what_backward_keeps_counts():
    x = torch.ones(MIB // 4, requires_grad=True)
    one = peak_bytes(lambda: torch.autograd.grad(x.exp().sum(), x))
    three = peak_bytes(lambda: torch.autograd.grad(x.exp().exp().exp().sum(), x))
    assert three - one >= 2 * MIB


def test_both_run_in_turns_and_once_more_for_their_memory():
    calls = []
    found = compare(lambda: calls.append("host"), lambda: calls.append("ours"), rounds=3)
    assert calls == ["host", "ours"] * 4 + ["host", "ours"]
    assert found.host.peak_bytes == 0 and found.ours.milliseconds >= 0


def test_the_line():
    line = str(Comparison(Cost(12.0, 40 * MIB), Cost(8.0, 10 * MIB)))
    assert line == "host 12 ms and 40 MiB, fastvst 8 ms and 10 MiB: 1.50 times the speed, 0.25 of the memory"
