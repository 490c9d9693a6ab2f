"""torch.compile compiles a decoder block and a vision block as one graph, with the same outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from fastvst.model.decoder import DecoderLayer
from fastvst.model.vision import VisionBlock
from fastvst_kernels import packed_attention
from hf_parity import small_config


def check(block: torch.nn.Module, forward, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    results = []
    for run in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, *block.parameters()))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("light", [False, True])
def test_decoder_block(light: bool):
    config = small_config()
    layer = DecoderLayer(config, 0)
    positions = torch.arange(12, dtype=torch.int32).expand(3, 12)
    offsets = torch.tensor([0, 5, 9, 12]).int()
    groups = torch.tensor([-1, 0, -1], dtype=torch.int32)

    def attend(_, q, k, v):
        return packed_attention(q, k, v, offsets, causal=True, groups=groups, max_seqlen=5)

    check(layer, lambda x: layer(x, positions, attend, light=light), torch.randn(12, config.hidden_size))


@pytest.mark.parametrize("windowed", [True, False])
def test_vision_block(windowed: bool):
    config = small_config().vision
    block = VisionBlock(config, windowed=windowed)
    positions = torch.randint(0, 9, (24, 2)).int()
    offsets = torch.tensor([0, 16, 24]).int()
    x = torch.randn(24, config.hidden_size)
    check(block, lambda x: block(x, positions, offsets, 16, light=False), x)
