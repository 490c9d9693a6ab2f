"""The tiny preset's pretrained vision tower: its training targets are true, and the shipped tower predicts them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.qwen25vl import TINY_TOWER
from fastvst.model.vision import VisionTower
from fastvst.spatial import draw
from tools import build_tower as bt

UNSEEN = range(900_000, 900_008)  # the shipped tower was trained on rooms 0 to 1,199 of its split


@pytest.fixture(scope="module")
def shots() -> list[bt.Shot]:
    return bt.take_shots(UNSEEN, 2)


@pytest.fixture(scope="module")
def names() -> list[str]:
    with safe_open(TINY_TOWER, "pt") as file:
        return json.loads(file.metadata()["names"])


def batch_of(shots: list[bt.Shot], names: list[str], seed: int = 0) -> bt.ImageBatch:
    rng = random.Random(seed)
    processor = bt.tiny_processor()
    return bt.collate([bt.example(s, rng, processor, names, rng.choice(bt.SIZES)) for s in shots])


def test_targets_are_in_the_order_of_the_tower(shots: list[bt.Shot], names: list[str]) -> None:
    """Row and column of each token agree with the positions that the tower receives, for images of several sizes."""
    made = batch_of(shots[:9], names)
    places = made.positions.view(-1, 4, 2)[:, 0] // 2  # (row, column) of merged tokens
    ends = (made.cu_images // 4).tolist()
    for begin, end in zip(ends, ends[1:], strict=False):
        size = places[begin:end].max(0).values + 1
        expected = (places[begin:end] + 0.5) / size * 2 - 1
        torch.testing.assert_close(made.targets.values[begin:end, 4:6], expected.float())
    assert len({e - b for b, e in zip(ends, ends[1:], strict=False)}) > 1, "sizes differ"


def test_marks_are_where_the_targets_say(shots: list[bt.Shot], names: list[str]) -> None:
    """The pixels of a marked token contain the colour of the mark; its depth is that of the depth map."""
    shot = shots[0]
    processor = bt.tiny_processor()
    found = 0
    points = [seed for seed in range(20) if random.Random(seed).random() >= 0.25]  # the others draw boxes
    for seed in points:
        sample, targets = bt.example(shot, random.Random(seed), processor, names, None)
        pixels = sample.patches.view(-1, 4, 3, 2, 196)[:, :, :, 0].float()  # reading order: token, patch, colour, pixel
        mean = torch.tensor(processor.geometry.mean)
        std = torch.tensor(processor.geometry.std)
        pixels = ((pixels.permute(0, 1, 3, 2) * std + mean) * 255).flatten(1, 2)
        for token in torch.nonzero(targets.colour).flatten().tolist():
            wanted = torch.tensor(draw.COLOURS[bt.COLOURS[int(targets.colour[token]) - 1]], dtype=torch.float32)
            assert (pixels[token] - wanted).abs().amax(1).min() < 60, "resizing blurs, but the colour remains"
            v, u = ((targets.values[token, 13:15].numpy() + 1) / 2 * shot.depth.shape).round(3)
            depth = float(shot.depth[int(v), int(u)])
            assert targets.values[token, 12] == pytest.approx(2 * np.log(np.clip(depth, 0.3, 20) / 3), abs=1e-3)
            found += 1
    assert found > 12


def test_targets_of_a_synthetic_view(names: list[str]) -> None:
    """A sofa 2 m away in the left half, a wall 6 m away in the right half."""
    depth = np.full((112, 168), 6.0, dtype=np.float16)
    ids = np.zeros((112, 168), dtype=np.int16)
    depth[:, :84] = 2.0
    ids[:, :84] = 1
    box = np.array([[-1.0, 0.5, 2.0, 2.2, 0.8, 0.9, 0, 0, 0]], dtype=np.float32)
    shot = bt.Shot(b"", depth, ids, ("sofa",), box, np.zeros((0, 7), dtype=np.float32))
    targets = bt.targets_of(shot, [bt.Mark(100.0, 30.0, 6.0, 2)], (4, 6), names)
    left = (torch.arange(24) % 6) < 3
    assert (targets.name > 0).tolist() == left.tolist() and set(targets.name[left].tolist()) == {
        1 + names.index("sofa")
    }
    near = 2 * np.log(2 / 3)
    far = 2 * np.log(6 / 3)
    assert targets.values[left, 0].numpy() == pytest.approx(near, abs=1e-3)
    assert targets.values[~left, 0].numpy() == pytest.approx(far, abs=1e-3)
    assert targets.values[:, 1:4].abs().max() < 1e-5, "each token is flat"
    assert targets.values[0, 6:9].numpy() == pytest.approx(np.log([2.2, 0.8, 0.9]), abs=1e-6)
    assert targets.values[0, 9:12].numpy() == pytest.approx([-0.5, 0.25, 1.0])
    marked = 1 * 6 + 3  # pixel (100, 30) in tokens of 28 pixels
    assert torch.nonzero(targets.colour).flatten().tolist() == [marked] and targets.colour[marked] == 3
    assert targets.values[marked, 12].item() == pytest.approx(far, abs=1e-3)


def test_the_shipped_tower_predicts_its_targets(shots: list[bt.Shot], names: list[str]) -> None:
    """Measured on unseen rooms. A random tower fails the same bounds, so they mean something."""
    made = batch_of(shots, names, seed=3)
    with safe_open(TINY_TOWER, "pt") as file:
        directions = bt.Directions(*(file.get_tensor(f"directions.{n}").float() for n in ("colour", "name", "values")))
    tower = Qwen25VL.fresh("tiny").visual
    seen = bt.report(tower, made, directions)
    assert seen["colour"] > 0.8 and seen["mark_order"] > 0.75 and seen["name"] > 0.4 and seen["depth_error"] < 0.3
    torch.manual_seed(0)
    blind = bt.report(Qwen25VL(ModelConfig.preset("tiny")).visual, made, directions)
    assert blind["colour"] < 0.4 and blind["mark_order"] < 0.7 and blind["name"] < 0.2


def test_a_fresh_tiny_model_has_the_pretrained_tower_and_a_random_decoder() -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(Qwen25VL.fresh("tiny"))
    with safe_open(TINY_TOWER, "pt") as file:
        for name, weight in made[0].visual.named_parameters():
            torch.testing.assert_close(weight.data, file.get_tensor(f"visual.{name}").float(), rtol=0, atol=0)
    towers, embeddings = ([f(m) for m in made] for f in (lambda m: m.visual, lambda m: m.model.embed_tokens.weight))
    assert all(torch.equal(a, b) for a, b in zip(towers[0].parameters(), towers[1].parameters(), strict=True))
    assert not torch.equal(*embeddings)


@pytest.mark.slow
def test_a_few_steps_reduce_the_loss_and_the_file_loads(
    shots: list[bt.Shot], names: list[str], tmp_path, capsys
) -> None:
    tower, directions = bt.train(shots, names, steps=200, batch=8, lr=2e-3, heldout=15)
    out = capsys.readouterr().out
    assert "step 200/200" in out
    test = batch_of(shots[:20], names)
    start = bt.loss_of(test.encode_images(bt.initial_tower(test)), test.targets, directions).item()
    end = bt.loss_of(test.encode_images(tower), test.targets, directions).item()
    assert end < 0.8 * start
    before = bt.report(tower, test, directions)
    plain = test.encode_images(tower)
    unit = directions
    tower, directions = bt.rescale(tower, directions)
    after = bt.report(tower, test, directions)
    assert {k: after[k] for k in before if k != "length"} == pytest.approx(
        {k: v for k, v in before.items() if k != "length"}
    )
    for rows, gain in ((unit.colour[1:], bt.MARK_GAIN), (unit.values[12:13], bt.MARK_GAIN), (unit.name, bt.OTHER_GAIN)):
        torch.testing.assert_close(test.encode_images(tower) @ rows.T, gain * (plain @ rows.T), rtol=1e-3, atol=1e-3)
    bt.save(tmp_path / "tower.safetensors", tower, directions, names)
    with safe_open(tmp_path / "tower.safetensors", "pt") as file:
        assert json.loads(file.metadata()["names"]) == names
        stored = {n.removeprefix("visual."): file.get_tensor(n).float() for n in file.keys() if "visual." in n}  # noqa: SIM118
    again = VisionTower(tower.config)
    again.load_state_dict(stored)
    torch.testing.assert_close(test.encode_images(again), test.encode_images(tower), rtol=0.02, atol=0.02)
