"""bench/gpu/clock.py on a simulated GPU: the host's time is not in the figures."""

import json

import pytest
import torch

from bench.cases.pointwise import TINY_CASES
from bench.gpu import pointwise
from bench.gpu.block import Options
from bench.gpu.clock import forward_backward, milliseconds
from bench.timing import interleaved


class Simulated:
    """A stream that runs what the host issued, in order; the host's clock moves when the host works."""

    def __init__(self):
        self.host = 0.0
        self.stream = 0.0

    def now(self):
        return self.host

    def event(self):
        self.host += 1e-6
        self.stream = max(self.stream, self.host)
        return self.stream

    def between(self, first, second):
        return 1e3 * (second - first)

    def hold(self, seconds):
        self.launch(0.0, seconds)

    def flush(self):
        self.launch(5e-6, 100e-6)

    def wait(self):
        self.host = max(self.host, self.stream)

    def launch(self, host, device):
        self.host += host
        self.stream = max(self.stream, self.host) + device


def test_a_slow_launcher_does_not_change_the_figure():
    for slow in (0.0, 1e-3):
        gpu = Simulated()
        found = milliseconds(
            {
                "a": lambda gpu=gpu, slow=slow: gpu.launch(20e-6 + slow, 50e-6),
                "b": lambda gpu=gpu: gpu.launch(20e-6, 2e-3),
            },
            gpu,
        )
        assert abs(found["a"] - 0.05) < 1e-9 and abs(found["b"] - 2.0) < 1e-9


@pytest.mark.parametrize("slow", [0.0, 1e-3])
def test_a_slow_launcher_changes_neither_direction(slow):
    """Forward and backward of a function whose launchers sleep: 30 and 70 us on the GPU."""
    gpu = Simulated()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            gpu.launch(15e-6 + slow, 30e-6)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            gpu.launch(15e-6 + slow, 70e-6)
            return grad

    x = torch.ones(2, requires_grad=True)
    found, failures = forward_backward({"ours": lambda: Slow.apply(x)}, (x,), gpu)
    assert not failures
    assert abs(found["forward"]["ours"] - 0.03) < 1e-9 and abs(found["backward"]["ours"] - 0.07) < 1e-9


def test_a_clock_without_the_hold_would_show_the_sleep(monkeypatch):
    """A test of the simulation: the GPU is idle while the host sleeps, and the events tell it."""
    gpu = Simulated()
    monkeypatch.setattr(gpu, "hold", lambda seconds: None)
    monkeypatch.setattr(gpu, "flush", lambda: None)
    found = milliseconds({"a": lambda: gpu.launch(1e-3, 50e-6)}, gpu)
    assert found["a"] > 1.0


def test_contenders_take_turns_and_rotate():
    gpu = Simulated()
    order = []

    def run(name):
        order.append(name)
        gpu.launch(10e-6, 1e-3)

    milliseconds({name: lambda name=name: run(name) for name in "abc"}, gpu, budget=0.006)
    assert "".join(order[-15:]) == "abc" + "bca" + "cab" + "abc" + "bca"
    order.clear()
    interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda c: c.name)
def test_shares_divide_by_the_ceiling_of_the_same_file(case, tmp_path):
    options = Options(tmp_path / "x.jsonl", dry=True)
    options.out.write_text(json.dumps({"block": "ceilings", "case": "copy 2 GiB", "tbps": 0.25}) + "\n")
    found = pointwise.measure(case, options)
    ours = found["fastvst"]
    assert found["goal"] == {"forward": case.goal_forward, "backward": case.goal_backward}
    assert 0 < found["goal"]["forward"] <= 1, "a goal is a share"
    for way, size in (("forward", case.bytes_forward), ("backward", case.bytes_backward)):
        speed = size / ours[f"{way}_ms"] * 1e-9
        assert ours[f"{way}_tbps"] == pytest.approx(speed)
        assert ours[f"{way}_share"] == pytest.approx(speed / 0.25)
