"""The trainer's minus the sampler's log-probabilities: exactly 0.0 in bitwise mode, small in fast mode."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvst.batch import pack
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.batch_invariant import batch_invariant
from fastvst.rollout.mismatch import mismatch
from fastvst_kernels import linear_logprobs, packed_attention, prepare
from fastvst_kernels.attention.library_op import attend
from hf_parity import make_models, make_sample, small_config
from teacher import teacher_forced

PARTS = [
    [("text", 5), ("image", 3, 4), ("text", 60)],
    [("text", 9)],
    [("text", 1), ("video", 2, 1, 2, 1.0), ("text", 2)],
]


@pytest.fixture(scope="module")
def config():
    return small_config(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80)


@pytest.fixture(scope="module")
def model(config):
    return make_models(config, torch.float32, seed=1)[0]


@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "repeated prompts"])
def test_bitwise_is_exactly_zero(model, config, shared):
    samples = [make_sample(config, parts, seed=i) for i, parts in enumerate(PARTS)]
    params = SamplingParams(n=3, max_tokens=21, ignore_eos=True, seed=2)
    options = {"page_size": 4, "prefill_tokens": 31, "max_sequences": 5, "memory": 1 << 20}
    rollouts = Engine(model, numerics="bitwise", **options).generate(samples, params)
    sampled = torch.tensor([x for many in rollouts for r in many for x in r.logprobs], dtype=torch.float64)
    assert [r.raw_logprobs for m in rollouts for r in m] == [r.logprobs for m in rollouts for r in m]
    with batch_invariant():
        trained = teacher_forced(model, samples, rollouts, shared=shared)
    report = mismatch(trained, sampled)
    assert report.max == 0.0 and report.kl == 0.0 and report.tokens == 3 * 3 * 21

    loose = teacher_forced(model, samples, rollouts, shared=shared)
    close = mismatch(loose, sampled)
    assert 0 < close.max < 1e-4, "the plain forward rounds differently, within float32 precision"
    fast = Engine(model, **options).generate(samples, params)
    assert [[r.tokens for r in m] for m in fast] == [[r.tokens for r in m] for m in rollouts]
    found = torch.tensor([x for many in fast for r in many for x in r.logprobs], dtype=torch.float64)
    assert mismatch(loose, found).max < 1e-4


def test_a_gradient_flows_through_the_invariant_forward(model, config):
    sample = make_sample(config, PARTS[0], seed=3)
    batch = pack([sample])
    gradients = []
    for context in (batch_invariant(), torch.enable_grad()):
        model.zero_grad()
        with context:
            linear_logprobs(model(batch)[batch.loss_rows], model.head_weight, batch.targets)[0].sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    model.zero_grad()


class Recorder(TorchDispatchMode):
    """Records the names of the matrix products that reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name.rstrip("_").endswith((".mm", "_mm", "addmm", "linear", "matmul")):
            self.products.add(name)
        return func(*args, **(kwargs or {}))


def test_every_product_is_invariant(model, config):
    batch = pack([make_sample(config, PARTS[0], seed=3)])

    def run() -> None:
        linear_logprobs(model(batch)[batch.loss_rows], model.head_weight, batch.targets)[0].sum().backward()

    with Recorder() as plain:
        run()
    assert {"aten.mm", "aten.addmm"} <= plain.products, "the recorder sees the products of a plain run"
    with Recorder() as tiled, batch_invariant():
        run()
    assert tiled.products == {"fastvst.invariant_mm"}
    model.zero_grad()


def test_packed_attention_in_the_mode_is_the_same_function():
    torch.manual_seed(0)
    offsets = torch.tensor([0, 70, 75, 90, 93], dtype=torch.int32)
    groups = torch.tensor([-1, 0, 0, -1])
    q, k, v = (torch.randn(93, h, 16) for h in (4, 2, 2))
    with batch_invariant():
        out, lse = packed_attention(q, k, v, offsets, causal=True, groups=groups, return_lse=True)
    expected, expected_lse = packed_attention(
        q, k, v, offsets, causal=True, groups=groups, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_a_library_is_not_called_in_the_mode():
    """flash-attn is not installed here, so a call would raise."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 70, 75, 90, 93], dtype=torch.int32)
    groups = torch.tensor([-1, 0, 0, -1])
    qkv = tuple(torch.randn(93, h, 16) for h in (4, 2, 2))
    plan = prepare(offsets, groups, causal=True)
    with batch_invariant():
        expected = packed_attention(*qkv, offsets, causal=True, groups=groups)
        out, _ = attend("flash-attn-2", qkv, offsets, groups, plan.prompts, longest=70, causal=True, scale=0.25)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


def test_mismatch_figures():
    sampler = torch.log(torch.tensor([0.5, 0.25, 0.2]))
    trainer = torch.log(torch.tensor([0.5, 0.5, 0.1]))
    report = mismatch(trainer, sampler)
    ratios = [1.0, 2.0, 0.5]
    assert report.mean == pytest.approx(2 * math.log(2) / 3) and report.max == pytest.approx(math.log(2))
    assert report.kl == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 3, rel=1e-5)
    assert report.outside == pytest.approx(2 / 3) and "3 tokens" in report.describe()
    with pytest.raises(ValueError, match="expected one shape"):
        mismatch(trainer, sampler[:2])
