"""The tiny preset's pretrained vision tower: its training targets are true, and the shipped tower predicts them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.qwen25vl import TINY_TOWER
from fastvst.spatial import draw
from tools import build_tower as bt
from tools import tower_batches as batches
from tools import tower_data as data

UNSEEN = range(900_000, 900_012)  # the shipped tower was trained on rooms 0 to 799 of its split


@pytest.fixture(scope="module")
def views() -> data.Views:
    return data.take_views(UNSEEN, 2)


@pytest.fixture(scope="module")
def shots(views: data.Views) -> list[data.Shot]:
    return views.shots


@pytest.fixture(scope="module")
def names() -> list[str]:
    return bt.load(TINY_TOWER)[3]


def batch_of(shots: list[data.Shot], names: list[str], seed: int = 0) -> batches.ImageBatch:
    rng = random.Random(seed)
    processor = batches.tiny_processor()
    return batches.collate([data.example(s, rng, processor, names, rng.choice(data.SIZES)) for s in shots])


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


def test_marks_are_where_the_targets_say(shots: list[data.Shot], names: list[str]) -> None:
    """The pixels of a marked token contain the colour of the mark; the depth of a dot is that of the depth map."""
    shot = shots[0]
    processor = batches.tiny_processor()
    found = Counter()
    for seed in range(30):
        sample, targets, marks = data.example(shot, random.Random(seed), processor, names, None)
        drawn = (targets.colour[:, 1:] > 0).any(0)
        assert not (marks.present[0] & ~drawn).any()
        assert not (marks.boxed & ~marks.present).any() and not (marks.ring & (marks.boxed | ~marks.present)).any()
        pixels = sample.patches.view(-1, 4, 3, 2, 196)[:, :, :, 0].float()  # reading order: token, patch, colour, pixel
        mean = torch.tensor(processor.geometry.mean)
        std = torch.tensor(processor.geometry.std)
        pixels = ((pixels.permute(0, 1, 3, 2) * std + mean) * 255).flatten(1, 2)
        for token in torch.nonzero(targets.marked).flatten().tolist():
            boxed = bool((targets.values[token, 15:17] != 0).any())
            for colour in torch.nonzero(targets.colour[token, 1:]).flatten().tolist():
                wanted = torch.tensor(draw.COLOURS[data.COLOURS[colour]], dtype=torch.float32)
                # resizing blurs a line of two pixels more than a dot
                near = (pixels[token] - wanted).abs().amax(1).min()
                assert near < (150 if boxed else 90), (seed, token, data.COLOURS[colour])
            if not boxed:
                only = int(targets.colour[token, 1:].argmax())
                if marks.present[0, only] and targets.colour[token, 1 + only] == 1:
                    known = 20 if targets.ringed[token] else 17  # the surface is seen in rings only
                    expected = marks.values[0, only, : known - 12]
                    torch.testing.assert_close(targets.values[token, 12:known], expected)
                v, u = ((targets.values[token, 13:15].numpy() + 1) / 2 * shot.depth.shape).round(3)
                depth = float(shot.depth[int(v), int(u)])
                assert targets.values[token, 12] == pytest.approx(2 * np.log(np.clip(depth, 0.3, 20) / 3), abs=1e-3)
            found["box" if boxed else "dot"] += 1
    assert min(found[kind] for kind in ("box", "dot")) > 20


def test_the_outline_of_a_box_is_where_pillow_draws_it() -> None:
    """The tokens with a line are those with pixels of a drawn rectangle; the lengths add up to the outline."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = np.sort(rng.uniform(0, 319, 2))
        y = np.sort(rng.uniform(0, 239, 2))
        box = (float(x[0]), float(y[0]), float(x[1]), float(y[1]))
        length = data.outline(box, (4, 6), (240, 320)).reshape(4, 6)
        image = Image.new("L", (320, 240))
        ImageDraw.Draw(image).rectangle(box, outline=255)
        drawn = np.zeros((4, 6), dtype=int)
        for v, u in np.argwhere(np.array(image) > 0):
            drawn[int(v / 60), int(u / 320 * 6)] += 1
        assert (length[drawn == 0] < 0.05).all() and (drawn[length > 0.1] > 0).all()
        assert length.sum() == pytest.approx(2 * (np.diff(x)[0] / 320 * 6 + np.diff(y)[0] / 240 * 4), abs=1e-3)


def test_a_mirror_and_the_way_back_change_the_words(views: data.Views, names: list[str]) -> None:
    """The words follow from the poses, and a shot that is mirrored twice is itself."""
    opposite = {"left": "right", "up": "down", "backward": "forward"}
    opposite |= {b: a for a, b in opposite.items()}
    processor = batches.tiny_processor()
    seen = set()
    for motion in views.motions:
        if len(motion.there) == 1:
            assert motion.back == (opposite[motion.there[0]],)
        for seed in range(4):
            examples, words = data.motion_example(motion, random.Random(seed), processor, names)
            assert len(examples) == 2 and set(words) <= set(data.MOTIONS)
            seen.add(words)
    assert {(word,) for word in data.MOTIONS} <= seen
    shot = views.shots[0]
    twice = data.mirrored(data.mirrored(shot))
    assert (
        (twice.image == shot.image).all()
        and np.allclose(twice.points, shot.points)
        and np.allclose(twice.boxes, shot.boxes)
    )
    assert (data.mirrored(shot).ids[:, 0] == shot.ids[:, -1]).all()


def test_differences_of_pairs(views: data.Views, names: list[str]) -> None:
    """The mean token of the second image minus that of the first, whatever the order of the tower."""
    rng = random.Random(0)
    processor = batches.tiny_processor()
    singles = [data.example(shot, rng, processor, names, rng.choice(data.SIZES)) for shot in views.shots[:3]]
    pairs = [data.motion_example(motion, rng, processor, names) for motion in views.motions[:4]]
    together = batches.collate(singles, pairs)
    tower = Qwen25VL.fresh("tiny").visual
    found = together.pair_differences(together.encode_images(tower))
    for row, (two, words) in zip(range(4), pairs, strict=True):
        first, second = (batches.collate([one]).encode_images(tower).mean(0) for one in two)
        torch.testing.assert_close(found[row], second - first, rtol=1e-3, atol=1e-3)
        assert {data.MOTIONS[k] for k in torch.nonzero(together.motion[row]).flatten()} == set(words)


def test_a_head_of_attention_finds_the_marks(shots: list[data.Shot], names: list[str]) -> None:
    """Tokens that are made of the targets have a loss near 0, are read exactly, and give every pair in the right order;
    attention is torch's softmax over the tokens of one image."""
    made = batch_of(shots[:12], names)
    directions = bt.Directions.draw(192, len(names))
    tokens = 4 * made.targets.colour @ directions.colour + made.targets.values @ directions.values
    weights, values = bt.read_marks(tokens, made, directions)
    for image in range(12):
        own = made.image == image
        scores = bt.SHARPNESS * tokens[own] @ directions.colour[1:].T
        torch.testing.assert_close(weights[image][:, own].exp(), scores.softmax(0).T)
    assert (weights.exp().sum(2) - 1).abs().max() < 1e-4
    single = made.marks.present & ~made.marks.boxed
    torch.testing.assert_close(values[single][:, :5], made.marks.values[single][:, :5], rtol=0, atol=2e-3)
    ring = made.marks.ring & made.marks.present
    assert ring.any(), "the surface is told in rings only"
    torch.testing.assert_close(values[ring], made.marks.values[ring], rtol=0, atol=2e-3)
    gap, true = bt.depth_gaps(values, made.marks)
    expected = sum(n * (n - 1) // 2 for n in single.sum(1).tolist())
    assert len(gap) == len(true) == expected > 5
    torch.testing.assert_close(gap, true, rtol=0, atol=4e-3)
    right = bt.mark_loss(tokens, made, directions).item()
    turned = tokens - 2 * made.targets.values[:, 12:13] @ directions.values[12:13]  # the nearer one looks farther
    assert right < bt.mark_loss(turned, made, directions).item() - 1
    moved = 4 * made.targets.colour.roll(1, 0) @ directions.colour + made.targets.values @ directions.values
    assert right < bt.mark_loss(moved, made, directions).item() - 5


def test_targets_of_a_synthetic_view(names: list[str]) -> None:
    """A sofa 2 m away in the left half, a wall 6 m away in the right half."""
    depth = np.full((112, 168), 6.0, dtype=np.float16)
    ids = np.zeros((112, 168), dtype=np.uint8)
    depth[:, :84] = 2.0
    ids[:, :84] = 1
    box = np.array([[-1.0, 0.5, 2.0, 2.2, 0.8, 0.9, 0, 0, 0]], dtype=np.float32)
    image = np.full((112, 168, 3), 100, dtype=np.uint8)
    shot = data.Shot(image, depth, ids, ("sofa",), box, np.zeros((0, 7), dtype=np.float32))
    targets = data.targets_of(shot, [data.Mark(100.0, 30.0, 6.0, 2, "3")], (4, 6), names)
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
    assert torch.nonzero(targets.marked).flatten().tolist() == [marked] and targets.colour[marked, 3] == 1
    assert torch.nonzero(targets.label).flatten().tolist() == [marked] and data.LABELS[targets.label[marked] - 1] == "3"
    assert targets.values[marked, 12].item() == pytest.approx(far, abs=1e-3)
    assert targets.values[:, 17:].numpy() == pytest.approx(100 / 127.5 - 1, abs=1e-6), "the photograph's colour"
    assert not targets.ringed.any()


def test_a_ring_tells_the_surface_in_it(names: list[str]) -> None:
    """A red patch of 8 pixels in a grey image: the token's mean is nearly grey, the surface in the ring is red."""
    image = np.full((112, 168, 3), 100, dtype=np.uint8)
    image[26:34, 96:104] = (200, 40, 30)
    depth = np.full((112, 168), 4.0, dtype=np.float16)
    nothing = np.zeros((0, 9), dtype=np.float32)
    shot = data.Shot(image, depth, np.zeros((112, 168), dtype=np.uint8), (), nothing, nothing[:, :7])
    ring = data.point_at(shot, 100.0, 30.0, 2, "", True)
    dot = data.point_at(shot, 100.0, 30.0, 2, "", False)
    red = np.array([200, 40, 30]) / 127.5 - 1
    token = 1 * 6 + 3
    found = data.targets_of(shot, [ring], (4, 6), names)
    assert torch.nonzero(found.ringed).flatten().tolist() == [token]
    assert found.values[token, 17:].numpy() == pytest.approx(red, abs=0.02)
    plain = data.targets_of(shot, [dot], (4, 6), names)
    mean = 100 / 127.5 - 1
    assert np.abs(plain.values[token, 17:].numpy() - mean).max() < 0.2 < np.abs(red - mean).max()
    seen = data.image_targets([ring], (112, 168))
    assert seen.values[0, 2, 5:].numpy() == pytest.approx(red, abs=0.02)


def test_the_shipped_tower_predicts_its_targets(views: data.Views, names: list[str]) -> None:
    """Measured on unseen rooms. A random tower fails the same bounds, so they mean something."""
    made = bt.report_batch(views, names, seed=3)
    _, directions, head, _ = bt.load(TINY_TOWER)
    seen = bt.report(Qwen25VL.fresh("tiny").visual, made, directions, head)
    assert seen["dot"] > 0.93 and seen["ring"] > 0.88 and seen["box"] > 0.9
    assert seen["mark_order"] > 0.8 and seen["motion"] > 0.55
    assert seen["name"] > 0.28 and seen["depth_error"] < 0.3 and seen["box_error"] < 0.3
    torch.manual_seed(0)
    blind = bt.report(Qwen25VL(ModelConfig.preset("tiny")).visual, made, directions, head)
    assert blind["dot"] < 0.4 and blind["box"] < 0.4 and blind["mark_order"] < 0.7 and blind["name"] < 0.2
    assert blind["motion"] < 0.4


def test_a_fresh_tiny_model_has_the_pretrained_tower_and_a_random_decoder() -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(Qwen25VL.fresh("tiny"))
    with safe_open(TINY_TOWER, "pt") as file:
        for name, weight in made[0].visual.state_dict().items():
            torch.testing.assert_close(weight, file.get_tensor(f"visual.{name}").float(), rtol=0, atol=0)
    towers, embeddings = ([f(m) for m in made] for f in (lambda m: m.visual, lambda m: m.model.embed_tokens.weight))
    assert all(torch.equal(a, b) for a, b in zip(towers[0].parameters(), towers[1].parameters(), strict=True))
    assert not torch.equal(*embeddings)


@pytest.mark.slow
def test_a_few_steps_reduce_the_loss_and_the_file_loads(views: data.Views, names: list[str], tmp_path, capsys) -> None:
    rest = data.Views(views.shots[15:], views.motions[6:])
    unseen = data.Views(views.shots[:15], views.motions[:6])
    tower, directions, head = bt.train(rest, unseen, names, bt.Recipe(200, 2e-3, 6, 2))
    assert "step 200/200" in capsys.readouterr().out
    test = bt.report_batch(unseen, names)
    first = bt.initial_tower(test)
    start = bt.loss_of(test.encode_images(first), test, directions, bt.MotionHead()).item()
    end = bt.loss_of(test.encode_images(tower), test, directions, head).item()
    assert end < 0.8 * start
    before = bt.report(tower, test, directions, head)
    plain = test.encode_images(tower)
    unit = directions
    tower, directions = bt.rescale(tower, directions)
    after = bt.report(tower, test, directions, head)
    assert {k: after[k] for k in before if k != "length"} == pytest.approx(
        {k: v for k, v in before.items() if k != "length"}, abs=1e-4
    )
    gains = ((unit.colour[1:], bt.MARK_GAIN), (unit.values[12:13], bt.MARK_GAIN), (unit.name, bt.OBJECT_GAIN))
    for rows, gain in gains:
        torch.testing.assert_close(test.encode_images(tower) @ rows.T, gain * (plain @ rows.T), rtol=1e-3, atol=1e-3)
    bt.save(tmp_path / "tower.safetensors", tower, directions, head, names)
    again, _, _, found = bt.load(tmp_path / "tower.safetensors")
    assert found == names
    torch.testing.assert_close(test.encode_images(again), test.encode_images(tower), rtol=0.02, atol=0.02)
    back, orthonormal, weight = bt.unscaled(tmp_path / "tower.safetensors", names)  # to continue from
    torch.testing.assert_close(test.encode_images(back), plain, rtol=0.02, atol=0.02)
    torch.testing.assert_close(weight.weight, head.weight, rtol=1e-3, atol=1e-3)
    for found, expected in zip(bt.parts_of(orthonormal), bt.parts_of(unit), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    start = bt.Recipe(20, 1e-4, 6, 2, start=tmp_path / "tower.safetensors")
    more = bt.train(rest, unseen, names, start)
    loss = bt.loss_of(test.encode_images(more[0]), test, more[1], more[2]).item()
    assert loss < end + 0.3, "training continues where it ended"
    with pytest.raises(ValueError, match="a tower for"):
        bt.unscaled(tmp_path / "tower.safetensors", names[1:])
