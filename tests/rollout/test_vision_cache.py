"""Equal images go through the vision tower once."""

from __future__ import annotations

import pytest
import torch

from fastvst.rollout import Engine, SamplingParams
from hf_parity import make_models, make_sample, small_config

CONFIG = small_config()
PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
SMALL = [("image", 2, 4), ("text", 3)]
LARGE = [("image", 4, 4), ("text", 3)]


@pytest.fixture(scope="module")
def model():
    return make_models(CONFIG, torch.float64, seed=4)[0]


def test_equal_images_of_one_call_are_encoded_once(model):
    same = [make_sample(CONFIG, [("text", n), ("image", 2, 3), ("text", 2)], seed=7) for n in (3, 4, 5)]
    other = make_sample(CONFIG, [("text", 3), ("image", 2, 3), ("text", 2)], seed=8)
    engine = Engine(model, memory=1 << 20, page_size=4)
    together = engine.generate([*same, other], PARAMS)
    assert engine.stats.vision_runs == 2
    alone = [Engine(model, memory=1 << 20, page_size=4).generate([s], PARAMS)[0] for s in (*same, other)]
    assert [r[0].tokens for r in together] == [r[0].tokens for r in alone]
    assert not engine.vision.features and not engine.vision.users


def test_equal_images_of_a_later_call_are_encoded_once(model):
    """The images of a prompt that waits are known by their own shape, whatever the last prompt of its call shows."""
    small = make_sample(CONFIG, SMALL, seed=1)
    engine = Engine(model, memory=1 << 20, prefill_tokens=4)
    engine.add_many([small, small, make_sample(CONFIG, LARGE, seed=1)], [PARAMS] * 3)
    engine.add_many([small, make_sample(CONFIG, LARGE, seed=3)], [PARAMS] * 2)
    while not engine.idle:
        engine.step()
    assert engine.stats.vision_runs == 3
    assert not engine.vision.users and not engine.vision.features and not engine.vision.shapes
