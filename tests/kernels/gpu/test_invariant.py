"""The batch-invariant kernels on a GPU, alone and in the rollout engine's bitwise mode."""

from __future__ import annotations

import pytest
import torch

from fastvst_kernels.invariant.op import invariant_attention
from invariant_case import assert_attention, assert_invariant_attention, assert_invariant_mm, make_case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 2048, 256), (300, 3584, 512), (65, 1280, 3420), (4100, 96, 64)])
def test_products(shape, dtype):
    assert_invariant_mm(*shape, dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "width"), [((28, 4), 128), ((16, 16), 80), ((4, 2), 64), ((2, 1), 256)])
def test_attention(heads, width, dtype):
    case = make_case([(1600, [400, 65]), (1, []), (64, [65, 0, 1]), (0, [300])], heads, width, dtype, "cuda")
    assert_attention(case, invariant_attention(*case.qkv, case.tiles, case.scale))
    assert_invariant_attention(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "repeated prompts"])
def test_the_engine_and_the_trainer_agree_to_the_last_bit(shared, dtype):
    pytest.importorskip("transformers")  # hf_parity makes the samples
    from fastvst.model import Qwen25VL
    from fastvst.rollout import Engine, SamplingParams
    from fastvst.rollout.batch_invariant import batch_invariant
    from fastvst.rollout.mismatch import mismatch
    from hf_parity import make_sample, small_config
    from teacher import teacher_forced

    config = small_config(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80)
    torch.manual_seed(0)
    model = Qwen25VL(config).to("cuda", dtype)
    parts = [[("text", 5), ("image", 3, 4), ("text", 60)], [("text", 9)], [("text", 1), ("image", 4, 2), ("text", 2)]]
    samples = [make_sample(config, part, seed=i) for i, part in enumerate(parts)]
    params = SamplingParams(n=3, max_tokens=21, ignore_eos=True, seed=2)
    engine = Engine(model, numerics="bitwise", page_size=4, prefill_tokens=31, max_sequences=5, memory=1 << 22)
    rollouts = engine.generate(samples, params)
    sampled = torch.tensor([x for many in rollouts for r in many for x in r.logprobs], dtype=torch.float64)
    with batch_invariant(), torch.no_grad():
        trained = teacher_forced(model, samples, rollouts, shared=shared)
    assert mismatch(trained.cpu(), sampled).max == 0.0
    alone = engine.generate(samples[1:2], params)
    assert [r.tokens for r in alone[0]] == [r.tokens for r in rollouts[1]], "the same tokens in any batch"
