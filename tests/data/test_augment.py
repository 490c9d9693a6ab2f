"""Augmentation: sizes stay, amounts are VST's, and a resumed run sees the images of the uninterrupted one."""

from __future__ import annotations

import colorsys
import json

import numpy as np
import pytest
from PIL import Image

from action_data import actions, write_libero
from fastvst.data import Ledger, LoaderConfig, MixtureConfig, Processor, make_loader
from fastvst.data.augment import augment_some, augmented
from fastvst.data.mixture import SourceConfig
from fastvst.data.sample import Sample
from fastvst.data.sources.action_rows import ActionRows


def test_a_grey_ramp_is_cropped_to_80_to_100_percent_and_keeps_its_size() -> None:
    ramp = np.repeat(np.arange(0, 240, dtype=np.uint8)[None], 240, 0)  # brightness tells the column
    image = Image.fromarray(np.stack([ramp] * 3, 2))
    shares = []
    for seed in range(200):
        found = np.asarray(augmented(image, seed), np.float64)
        assert found.shape == (240, 240, 3)
        assert np.ptp(found, axis=2).max() <= 3  # grey has no hue and no saturation
        row = found[120, :, 0]
        inner = row[40:200]
        slope = np.polyfit(np.arange(160), inner, 1)[0]  # crop share x brightness x contrast
        shares.append(slope)
    assert min(shares) > 0.8**0.5 * 0.8 * 0.8 * 0.97 and max(shares) < 1.2 * 1.2 * 1.03
    assert np.std(shares) > 0.05


def test_the_hue_turns_by_at_most_a_twentieth() -> None:
    image = Image.new("RGB", (16, 16), (200, 60, 60))
    hues = []
    for seed in range(200):
        r, g, b = np.asarray(augmented(image, seed))[8, 8] / 255
        hue = colorsys.rgb_to_hsv(r, g, b)[0]
        hues.append((hue + 0.5) % 1 - 0.5)
    assert -0.065 < min(hues) < -0.03 and 0.03 < max(hues) < 0.065


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (256, 256)])
def test_any_size(size) -> None:
    for seed in range(20):
        assert augmented(Image.new("RGB", size, (9, 99, 199)), seed).size == size


def test_the_share_of_samples_and_the_same_choice_for_the_same_place() -> None:
    sample = Sample.from_messages(
        [{"role": "user", "content": [{"type": "image", "image": "a"}] * 2}], id="a", source="s"
    )
    marked = [augment_some(sample, 0.5, (0, 1, row, 7)) for row in range(2000)]
    chosen = [one for one in marked if one is not sample]
    assert 900 < len(chosen) < 1100
    seeds = {part["augment"] for one in chosen for part in one.parts("image")}
    assert len(seeds) == 2 * len(chosen)  # every image of its own
    assert not any("augment" in part for part in sample.parts("image"))
    again = augment_some(sample, 0.5, (0, 1, 3, 7))
    assert again.messages == augment_some(sample, 0.5, (0, 1, 3, 7)).messages
    assert augment_some(sample, 0.0, (0,)) is sample and augment_some(sample, 1.0, (0,)) is not sample


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_same_images_and_an_epoch_others(tmp_path, workers) -> None:
    write_libero(tmp_path / "open_it_demo.hdf5", {"demo_0": actions(12)})
    options = ActionRows("text", 999, augment=0.5)
    source = SourceConfig(str(tmp_path / "open_it_demo.hdf5"), actions=options)
    processor = Processor.preset("tiny", max_pixels=56 * 56, max_seq_len=512)

    def loader(count: int, start: dict | None = None):
        config = LoaderConfig(tokens_per_pack=1024, num_workers=count, buffer_samples=8)
        made = make_loader(
            MixtureConfig((source,), shuffle_buffer=4), processor, config, ledger=Ledger(max_fraction=0.0)
        )
        if start is not None:
            made.load_state_dict(start)
        return made

    whole = loader(0)
    stream = iter(whole)
    packs = [next(stream) for _ in range(2)]
    state = json.loads(json.dumps(whole.state_dict()))
    rest = [next(stream) for _ in range(3)]
    resumed = iter(loader(workers, state))
    for wanted in rest:
        found = next(resumed)
        assert found.sample_ids == wanted.sample_ids and np.array_equal(found.patches, wanted.patches)
    seen: dict[str, set[bytes]] = {}
    for one in (*packs, *rest):
        ends = np.cumsum(one.grid.prod(1).numpy())
        for name, patches in zip(one.sample_ids, np.split(one.patches.numpy(), ends[:-1]), strict=True):
            seen.setdefault(name, set()).add(patches.tobytes())
    assert len(seen) == 12 and max(map(len, seen.values())) > 1
