"""The tiny model's trained vision tower: what it is trained to tell is true, and the one in the package tells it."""

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

NEVER_TRAINED = range(900_000, 900_008)  # the shipped tower has seen rooms 0 to 1,199 of its split


@pytest.fixture(scope="module")
def shots() -> list[bt.Shot]:
    return bt.take_shots(NEVER_TRAINED, 2)


@pytest.fixture(scope="module")
def names() -> list[str]:
    with safe_open(TINY_TOWER, "pt") as file:
        return json.loads(file.metadata()["names"])


def pictures(shots: list[bt.Shot], names: list[str], seed: int = 0) -> bt.Pictures:
    rng = random.Random(seed)
    processor = bt.tiny_processor()
    return bt.together([bt.example(s, rng, processor, names, rng.choice(bt.SIZES)) for s in shots])


def test_truths_follow_the_towers_order(shots: list[bt.Shot], names: list[str]) -> None:
    """Row and column of each token against the positions that the tower itself is given, pictures of several sizes."""
    made = pictures(shots[:9], names)
    places = made.positions.view(-1, 4, 2)[:, 0] // 2  # (row, column) of merged tokens
    ends = (made.cu_images // 4).tolist()
    for begin, end in zip(ends, ends[1:], strict=False):
        size = places[begin:end].max(0).values + 1
        expected = (places[begin:end] + 0.5) / size * 2 - 1
        torch.testing.assert_close(made.truth.values[begin:end, 4:6], expected.float())
    assert len({e - b for b, e in zip(ends, ends[1:], strict=False)}) > 1, "sizes differ"


def test_marks_are_where_the_truth_says(shots: list[bt.Shot], names: list[str]) -> None:
    """The colour of a dot is found in the pixels of its token, and its depth is that of the depth map."""
    shot = shots[0]
    processor = bt.tiny_processor()
    found = 0
    points = [seed for seed in range(20) if random.Random(seed).random() >= 0.25]  # the others draw boxes
    for seed in points:
        sample, truth = bt.example(shot, random.Random(seed), processor, names, None)
        pixels = sample.patches.view(-1, 4, 3, 2, 196)[:, :, :, 0].float()  # reading order: token, patch, colour, pixel
        mean = torch.tensor(processor.geometry.mean)
        std = torch.tensor(processor.geometry.std)
        pixels = ((pixels.permute(0, 1, 3, 2) * std + mean) * 255).flatten(1, 2)
        for token in torch.nonzero(truth.colour).flatten().tolist():
            wanted = torch.tensor(draw.COLOURS[bt.COLOURS[int(truth.colour[token]) - 1]], dtype=torch.float32)
            assert (pixels[token] - wanted).abs().amax(1).min() < 60, "resizing blurs, but the colour is there"
            v, u = ((truth.values[token, 13:15].numpy() + 1) / 2 * shot.depth.shape).round(3)
            depth = float(shot.depth[int(v), int(u)])
            assert truth.values[token, 12] == pytest.approx(2 * np.log(np.clip(depth, 0.3, 20) / 3), abs=1e-3)
            found += 1
    assert found > 12


def test_what_a_token_shows(names: list[str]) -> None:
    """A made-up view: a sofa 2 m away in the left half, nothing before a wall at 6 m in the right half."""
    depth = np.full((112, 168), 6.0, dtype=np.float16)
    ids = np.zeros((112, 168), dtype=np.int16)
    depth[:, :84] = 2.0
    ids[:, :84] = 1
    box = np.array([[-1.0, 0.5, 2.0, 2.2, 0.8, 0.9, 0, 0, 0]], dtype=np.float32)
    shot = bt.Shot(b"", depth, ids, ("sofa",), box, np.zeros((0, 7), dtype=np.float32))
    truth = bt.truth_of(shot, [bt.Mark(100.0, 30.0, 6.0, 2)], (4, 6), names)
    left = (torch.arange(24) % 6) < 3
    assert (truth.name > 0).tolist() == left.tolist() and set(truth.name[left].tolist()) == {1 + names.index("sofa")}
    near = 2 * np.log(2 / 3)
    far = 2 * np.log(6 / 3)
    assert truth.values[left, 0].numpy() == pytest.approx(near, abs=1e-3)
    assert truth.values[~left, 0].numpy() == pytest.approx(far, abs=1e-3)
    assert truth.values[:, 1:4].abs().max() < 1e-5, "each token is flat"
    assert truth.values[0, 6:9].numpy() == pytest.approx(np.log([2.2, 0.8, 0.9]), abs=1e-6)
    assert truth.values[0, 9:12].numpy() == pytest.approx([-0.5, 0.25, 1.0])
    marked = 1 * 6 + 3  # pixel (100, 30) in tokens of 28 pixels
    assert torch.nonzero(truth.colour).flatten().tolist() == [marked] and truth.colour[marked] == 3
    assert truth.values[marked, 12].item() == pytest.approx(far, abs=1e-3)


def test_the_shipped_tower_sees(shots: list[bt.Shot], names: list[str]) -> None:
    """On rooms it was not trained on; the same questions to a random tower show that the bounds mean something."""
    made = pictures(shots, names, seed=3)
    with safe_open(TINY_TOWER, "pt") as file:
        directions = bt.Directions(*(file.get_tensor(f"directions.{n}").float() for n in ("colour", "name", "values")))
    tower = Qwen25VL.fresh("tiny").visual
    seen = bt.report(tower, made, directions)
    assert seen["colour"] > 0.8 and seen["mark_order"] > 0.75 and seen["name"] > 0.4 and seen["depth_error"] < 0.3
    torch.manual_seed(0)
    blind = bt.report(Qwen25VL(ModelConfig.preset("tiny")).visual, made, directions)
    assert blind["colour"] < 0.4 and blind["mark_order"] < 0.7 and blind["name"] < 0.2


def test_a_fresh_tiny_model_has_the_trained_tower_and_a_random_decoder() -> None:
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
def test_a_few_steps_train_and_the_file_is_read_back(shots: list[bt.Shot], names: list[str], tmp_path, capsys) -> None:
    tower, directions = bt.train(shots, names, steps=200, batch=8, lr=2e-3, held=15)
    out = capsys.readouterr().out
    assert "step 200/200" in out
    test = pictures(shots[:20], names)
    start = bt.loss_of(test.see(bt.initial_tower(test)), test.truth, directions).item()
    end = bt.loss_of(test.see(tower), test.truth, directions).item()
    assert end < 0.8 * start
    before = bt.report(tower, test, directions)
    quiet = test.see(tower)
    unit = directions
    tower, directions = bt.louden(tower, directions)
    after = bt.report(tower, test, directions)
    assert {k: after[k] for k in before if k != "length"} == pytest.approx(
        {k: v for k, v in before.items() if k != "length"}
    )
    for rows, gain in ((unit.colour[1:], bt.LOUD), (unit.values[12:13], bt.LOUD), (unit.name, bt.QUIET)):
        torch.testing.assert_close(test.see(tower) @ rows.T, gain * (quiet @ rows.T), rtol=1e-3, atol=1e-3)
    bt.save(tmp_path / "tower.safetensors", tower, directions, names)
    with safe_open(tmp_path / "tower.safetensors", "pt") as file:
        assert json.loads(file.metadata()["names"]) == names
        stored = {n.removeprefix("visual."): file.get_tensor(n).float() for n in file.keys() if "visual." in n}  # noqa: SIM118
    again = VisionTower(tower.config)
    again.load_state_dict(stored)
    torch.testing.assert_close(test.see(again), test.see(tower), rtol=0.02, atol=0.02)
