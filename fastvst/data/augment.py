"""Augmented images of robot demonstrations: a random crop, and changed colours.

As in VST's training on LIBERO: a share of the samples is cropped to 80 to 100 % of the area and resized to the size
from before, and brightness, contrast and saturation change by a factor of 0.8 to 1.2, the hue by up to 0.05 of a turn,
in random order. All random numbers follow from the row and its place in the stream, so that a resumed run sees the same
images, and an epoch others than the one before.
"""

from __future__ import annotations

import dataclasses
import math
import random
import zlib
from collections.abc import Callable, Sequence

from PIL import Image, ImageEnhance

from fastvst.data.sample import Sample

LEAST_AREA = 0.8
FACTOR = (0.8, 1.2)
HUE = 0.05


def augment_some(sample: Sample, share: float, place: Sequence[int]) -> Sample:
    """The sample, with probability `share` a copy whose images are to be augmented (`augment` of their parts).

    Args:
        place: integers that name the row and its place in the stream.
    """
    rng = random.Random(zlib.crc32(repr(tuple(map(int, place))).encode()))
    if rng.random() >= share:
        return sample
    messages = [
        {
            **message,
            "content": [
                {**part, "augment": rng.getrandbits(32)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in sample.messages
    ]
    return dataclasses.replace(sample, messages=messages)


def augmented(image: Image.Image, seed: int) -> Image.Image:
    """An image in RGB, cropped and recoloured; of the same size."""
    rng = random.Random(seed)
    side = math.sqrt(rng.uniform(LEAST_AREA, 1.0))
    width, height = (max(1, round(full * side)) for full in image.size)
    left = rng.randint(0, image.width - width)
    top = rng.randint(0, image.height - height)
    image = image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    factors = [rng.uniform(*FACTOR) for _ in range(3)]
    turn = rng.uniform(-HUE, HUE)
    changes: list[Callable[[Image.Image], Image.Image]] = [
        lambda one: ImageEnhance.Brightness(one).enhance(factors[0]),
        lambda one: ImageEnhance.Contrast(one).enhance(factors[1]),
        lambda one: ImageEnhance.Color(one).enhance(factors[2]),
        lambda one: _turned_hue(one, turn),
    ]
    rng.shuffle(changes)
    for change in changes:
        image = change(image)
    return image


def _turned_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turn * 255)
    return Image.merge("HSV", (hue.point(lambda level: (level + shift) % 256), saturation, value)).convert("RGB")
