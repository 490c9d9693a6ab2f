"""The decode kernels and the engine's CUDA graphs on a GPU. Not run yet."""

from __future__ import annotations

import pytest
import torch

from decode_case import assert_close, make_case
from fastvst_kernels import decode_attention
from fastvst_kernels.decode.kernels import decode

SHARED = [(1600, [400] * 8), (70, [3, 33, 1]), (0, [5, 900]), (333, [64] * 17)]


def run(case, **options):
    return decode_attention(
        case.q, case.k_pages, case.v_pages, case.page_table, case.lengths, return_lse=True, **case.options(), **options
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "width"), [((28, 4), 128), ((16, 2), 128), ((4, 4), 80), ((2, 1), 256), ((6, 2), 32)]
)
def test_real_sizes(heads, width, dtype):
    case = make_case(SHARED, heads, width, dtype, page_size=64).to("cuda")
    assert_close(case, run(case))


@pytest.mark.parametrize("splits", [1, 2, 16])
def test_splits_and_bitwise_repeats(splits):
    case = make_case(SHARED, (28, 4), 128, torch.bfloat16, page_size=16).to("cuda")
    first = decode(case.q, case.k_pages, case.v_pages, case.tables, 128**-0.5, splits)
    assert_close(case, first)
    for _ in range(10):
        again = decode(case.q, case.k_pages, case.v_pages, case.tables, 128**-0.5, splits)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_graphs_give_the_eager_tokens_and_survive_new_weights():
    from bench.gpu.rollout import text_prompt
    from fastvst.model import ModelConfig, Qwen25VL
    from fastvst.rollout import Engine, SamplingParams

    torch.manual_seed(0)
    model = Qwen25VL(ModelConfig.preset("tiny")).cuda()
    samples = [text_prompt(model.config, 3 + 20 * i, seed=i) for i in range(5)]
    graphs = Engine(model, memory=1 << 28)
    eager = Engine(model, memory=1 << 28, cuda_graphs=False)
    params = SamplingParams(n=3, max_tokens=20, temperature=0)
    for _ in range(2):
        found = [[[r.tokens for r in m] for m in e.generate(samples, params)] for e in (graphs, eager)]
        assert found[0] == found[1]
        captures = graphs.runner.graphs.captures
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.03)
    graphs.generate(samples, params)
    assert graphs.runner.graphs.captures == captures, "in-place updates need no new capture"
