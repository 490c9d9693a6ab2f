"""The shipped base of the tiny preset: what it keeps of the aligned start, and what it has learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastvst.batch import pack_groups
from fastvst.generate.presets import BASE
from fastvst.generate.rooms import scene_samples
from fastvst.model import Qwen25VL
from fastvst.model.qwen25vl import TINY_BASE, TINY_TOWER
from fastvst.model.tiny_start import ALIGNED
from fastvst.scenes.scene import Scene
from tools.build_base import group
from tools.tower_batches import tiny_processor


@pytest.fixture(scope="module")
def base() -> Qwen25VL:
    return Qwen25VL.fresh("tiny", start="base").eval()


def test_the_shipped_files_are_small() -> None:
    assert TINY_BASE.stat().st_size + TINY_TOWER.stat().st_size < 12e6


def test_nothing_of_it_is_random(base: Qwen25VL) -> None:
    torch.manual_seed(99)
    for one, two in zip(base.parameters(), Qwen25VL.fresh("tiny", start="base").parameters(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, one.to(torch.bfloat16).float())


def test_it_keeps_the_parts_that_were_frozen_and_trains_the_rest(base: Qwen25VL) -> None:
    torch.manual_seed(0)
    start = dict(Qwen25VL.fresh("tiny", start="aligned").named_parameters())
    for name, now in base.named_parameters():
        before = start[name].to(torch.bfloat16).float()
        if name.startswith(ALIGNED):
            torch.testing.assert_close(now, before, rtol=1e-2, atol=1e-4)  # a QR's last bits depend on the threads
        elif now.dim() == 2 and name.startswith("model.layers"):
            assert (now - before).norm() > 0.1 * before.norm(), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("pattern", "least"),
    [("^Which is farther (left|right)", 0.8), ("^Which is (higher|lower)", 0.8), ("^Which part", 0.5)],
)
def test_it_reads_places_of_marks_in_rooms_that_it_has_not_seen(
    base: Qwen25VL, scenes: list[Scene], pattern: str, least: float
) -> None:
    """Two marks: 50 % by chance; nine parts of the image: 11 %. The random decoder has none right."""
    processor = tiny_processor()
    right = {id(base): [], id(None): []}
    torch.manual_seed(1)
    models = {id(base): base, id(None): Qwen25VL.fresh("tiny").eval()}
    for number, scene in enumerate(scenes):
        for sample in scene_samples(scene, number, BASE):
            if sample.metadata["task"] != "general_marks":
                continue
            prompt, turns = group(sample, processor, pattern)
            if not turns:
                continue
            batch = pack_groups([(prompt, turns)])
            for key, model in models.items():
                best = model.logits(batch)[batch.loss_rows.long()].argmax(1) == batch.targets
                ends = np.cumsum([int((turn.labels >= 0).sum()) for turn in turns])
                right[key] += [bool(part.all()) for part in best.tensor_split(torch.tensor(ends[:-1]))]
    assert len(right[id(base)]) >= 30
    assert np.mean(right[id(base)]) > least and np.mean(right[id(None)]) < 0.05, np.mean(right[id(base)])
