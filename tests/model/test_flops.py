"""The FLOP formula against torch's counter on the model itself."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvst.batch import pack
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.flops import TRAINING, decoder_flops, pack_flops, sample_flops, vision_flops
from fastvst_kernels import linear_cross_entropy
from hf_parity import make_sample, small_config

ROWS = [[("text", 4), ("image", 5, 9), ("text", 6)], [("text", 9)], [("video", 2, 4, 3, 1.0), ("text", 5)]]


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def lengths(batch):
    return batch.cu_images.diff().tolist(), batch.cu_windows.diff().tolist()


def test_pack_equals_the_counter():
    config = small_config()
    model = Qwen25VL(config)
    encoded = [make_sample(config, parts, seed=i) for i, parts in enumerate(ROWS)]
    batch = pack(encoded)
    # Without a gradient of the pixels the tower's first product would count twice instead of three times.
    batch = dataclasses.replace(batch, patches=batch.patches.requires_grad_())

    def step():
        hidden = model(batch)
        linear_cross_entropy(hidden[batch.loss_rows], model.head_weight, batch.targets).backward()

    parts = pack_flops(config, [len(s) for s in encoded], *lengths(batch), batch.num_targets)
    assert sum(parts.values()) == count(step)


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_each_tower_equals_the_counter(part):
    config = small_config(num_attention_heads=4, num_key_value_heads=1)
    model = Qwen25VL(config)
    encoded = [make_sample(config, parts, seed=i) for i, parts in enumerate(ROWS)]
    batch = pack(encoded)
    with torch.no_grad():
        if part == "vision":
            got = count(lambda: model.embed(batch))
            want = vision_flops(config, *lengths(batch))
        else:
            text = [make_sample(config, [("text", n)]) for n in (3, 20, 1)]
            got = count(lambda: model(pack(text)))
            want = decoder_flops(config, [3, 20, 1])
    assert got == want


def test_samples_add_up_to_their_pack():
    config = ModelConfig.preset("tiny")
    encoded = [make_sample(config, parts, seed=i) for i, parts in enumerate(ROWS)]
    batch = pack(encoded)
    whole = pack_flops(config, [len(s) for s in encoded], *lengths(batch), 11)
    each = sum(sample_flops(config, len(s), s.grid.tolist(), 0) for s in encoded)
    assert each == pytest.approx(whole["vision"] + whole["decoder"], rel=1e-12)
    assert sample_flops(config, 100, []) == pytest.approx(sum(pack_flops(config, [100], [], [], 100).values()))


def test_shared_prompts_count_their_pairs_once():
    """A prompt of P and completions of A tokens: P (P + 1) / 2 pairs once, A P + A (A + 1) / 2 for a completion."""
    config = small_config()
    shared = decoder_flops(config, [50, 7, 9], [0, 50, 50])
    per_pair = 4 * config.hidden_size * config.num_hidden_layers
    linear = decoder_flops(config, [1]) - per_pair
    assert shared == pytest.approx(66 * linear + per_pair * (50 * 51 / 2 + 7 * 50 + 28 + 9 * 50 + 45))


def test_order_of_magnitude_of_the_published_7b():
    """6 x parameters x tokens for text: 6.5 B decoder and 0.54 B head parameters at 1,000 tokens, without attention."""
    got = sample_flops(ModelConfig.preset("7b"), 1000, [])
    assert got / (6 * 7.07e9 * 1000) == pytest.approx(1.0, abs=0.02)
    assert TRAINING == 3.0
