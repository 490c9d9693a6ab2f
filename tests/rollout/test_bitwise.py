"""The trainer's log-probabilities minus the sampler's: exactly 0.0 in bitwise mode, small in fast mode."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvst.data.batch import Cost, EncodedSample, pack
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.bitwise import ROWS, attend_tiles, batch_invariant, make_tiles, tiled_mm
from fastvst.rollout.mismatch import mismatch
from fastvst_kernels import linear_logprobs, packed_attention
from hf_parity import make_models, make_sample, small_config

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


def answer_sample(tokens: list[int], position: int) -> EncodedSample:
    """An answer as a sequence of its own behind a shared prompt, as RL packs it."""
    ids, empty = torch.tensor(tokens, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    return EncodedSample(
        tokens=ids, labels=ids, positions=(position + torch.arange(len(tokens))).expand(3, -1).int(),
        patches=torch.zeros(0, 1176), grid=empty.view(0, 3), vision_slots=empty, window_order=empty,
        window_lengths=empty, image_lengths=empty, vision_positions=empty.view(0, 2), cost=Cost(len(tokens), 0, 0.0),
    )  # fmt: skip


def teacher_forced(model, samples, rollouts, *, shared: bool) -> torch.Tensor:
    """The trainer's log-probabilities of all answers, in order, from one pack."""
    sequences, groups = [], []
    for sample, many in zip(samples, rollouts, strict=True):
        prompt = dataclasses.replace(sample, labels=torch.full_like(sample.labels, -100))
        position = int(sample.positions.max()) + 1
        answers = [answer_sample(r.tokens, position) for r in many]
        if shared:
            groups += [-1] + [len(sequences)] * len(answers)
            sequences += [prompt, *answers]
            continue
        for answer in answers:
            joined = {
                name: torch.cat([getattr(prompt, name), getattr(answer, name)], dim=-1)
                for name in ("tokens", "labels", "positions")
            }
            sequences.append(dataclasses.replace(prompt, **joined))
    batch = pack(sequences, groups=groups if shared else None)
    hidden = model(batch)
    return linear_logprobs(hidden[batch.loss_rows], model.head_weight, batch.targets)[0]


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
    assert 0 < close.max < 1e-4, "the plain forward rounds differently, and by no more than float32 does"
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
    """The products that reach torch: (operator, rows of the first factor)."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            factor = args[1] if func.overloadpacket is torch.ops.aten.addmm else args[0]
            self.products.append((str(func.overloadpacket), factor.shape[0]))
        return func(*args, **(kwargs or {}))


def test_every_product_goes_through_tiles(model, config):
    batch = pack([make_sample(config, PARTS[0], seed=3)])

    def run() -> None:
        linear_logprobs(model(batch)[batch.loss_rows], model.head_weight, batch.targets)[0].sum().backward()

    with Recorder() as plain:
        run()
    assert len({rows for _, rows in plain.products}) > 3, "the recorder sees the products of a plain run"
    with Recorder() as tiled, batch_invariant():
        run()
    assert set(tiled.products) == {("aten.mm", ROWS)}
    model.zero_grad()


def test_products_do_not_depend_on_the_rows_beside():
    torch.manual_seed(0)
    a, b = torch.randn(70, 96), torch.randn(96, 300)
    whole = tiled_mm(a, b)
    torch.testing.assert_close(whole, a @ b)
    for row in (0, 15, 16, 69):
        assert torch.equal(tiled_mm(a[row : row + 1], b)[0], whole[row])
    assert tiled_mm(a[:0], b).shape == (0, 300)


def test_tiles_are_causal_attention():
    torch.manual_seed(0)
    offsets, groups = torch.tensor([0, 70, 75, 90, 93], dtype=torch.int32), torch.tensor([-1, 0, 0, -1])
    q, k, v = (torch.randn(93, h, 16) for h in (4, 2, 2))
    with batch_invariant():
        out, lse = packed_attention(q, k, v, offsets, causal=True, groups=groups, return_lse=True)
    expected, expected_lse = packed_attention(
        q, k, v, offsets, causal=True, groups=groups, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    rows = np.arange(75, 90)
    keys = np.concatenate([np.arange(70), rows])
    last, _ = attend_tiles(q[89:90], k, v, make_tiles([(np.array([0]), 84, keys)], 1), 0.25)
    assert torch.equal(last[0], out[89]) and ROWS == 16


def test_the_report_says_what_it_says():
    sampler = torch.log(torch.tensor([0.5, 0.25, 0.2]))
    trainer = torch.log(torch.tensor([0.5, 0.5, 0.1]))
    report = mismatch(trainer, sampler)
    ratios = [1.0, 2.0, 0.5]
    assert report.mean == pytest.approx(2 * math.log(2) / 3) and report.max == pytest.approx(math.log(2))
    assert report.kl == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 3, rel=1e-5)
    assert report.outside == pytest.approx(2 / 3) and "3 tokens" in report.describe()
    with pytest.raises(ValueError, match="must be one"):
        mismatch(trainer, sampler[:2])
