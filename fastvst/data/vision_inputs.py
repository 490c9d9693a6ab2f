"""The images and videos of one sample: their sizes and grids from file headers, and their patches."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst.data.augment import augmented
from fastvst.data.file_range import FileRange, VideoFrame
from fastvst.data.images import PatchGeometry, image_header, load_rgb, patchify, resize_planar, target_size
from fastvst.data.media_cache import Cache
from fastvst.data.processor_config import ProcessorConfig
from fastvst.data.sample import Message, Part
from fastvst.data.video import (
    BUDGET_SLACK,
    FrameSelection,
    decode_video,
    explicit_size,
    pixel_limits,
    select_frames,
    total_pixel_budget,
)

Size = tuple[int, int]
# Sizes of the images that this process encoded last, and a reference to an image in memory, whose key is its address.
ENCODED_SIZES: Cache[tuple[Size, Size, Any]] = Cache(256)


@dataclass(frozen=True)
class VisionInput:
    """One image or video of a sample, before any pixel is decoded.

    Attributes:
        part: the part of `Sample.messages`.
        source_size: (width, height) in pixels as displayed, before resizing.
        size: (width, height) in pixels after resizing.
        grid: patches (t, h, w).
        frames: the frames of a video; None for an image.
        notes: codes of the rules that change it, see docs/images_and_video.md.
    """

    part: Part
    source_size: tuple[int, int]
    size: tuple[int, int]
    grid: tuple[int, int, int]
    frames: FrameSelection | None = None
    notes: tuple[str, ...] = ()


def measure_vision_inputs(
    messages: Sequence[Message], config: ProcessorConfig, geometry: PatchGeometry
) -> list[VisionInput]:
    """All images and videos in reading order. Reads the headers of files, and the first frame of videos.

    Raises:
        MediaError: an image or video that cannot be used.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] in ("image", "video")]
    budget = total_pixel_budget(config.max_seq_len, geometry.factor)
    images = sum(part["type"] == "image" for part in parts)
    max_pixels = _max_image_pixels(images, budget, config)
    video_budget = budget // max(len(parts) - images, 1)
    inputs = []
    for part in parts:
        if part["type"] == "image":
            inputs.append(_measure_image(part, max_pixels, config, geometry))
        else:
            inputs.append(_measure_video(part, video_budget, config, geometry))
    return inputs


def _measure_image(part: Part, max_pixels: int, config: ProcessorConfig, geometry: PatchGeometry) -> VisionInput:
    header = image_header(part["image"], max_source_pixels=config.max_source_pixels, rules=config.rules)
    least, most = pixel_limits(part, config.min_pixels, max_pixels)
    size = target_size(
        *header.size, factor=geometry.factor, min_pixels=least, max_pixels=most, explicit=explicit_size(part)
    )
    grid = (1, size[1] // geometry.patch_size, size[0] // geometry.patch_size)
    return VisionInput(part, header.size, size, grid, notes=header.notes)


def _measure_video(part: Part, budget: int, config: ProcessorConfig, geometry: PatchGeometry) -> VisionInput:
    frames = select_frames(
        part,
        config.video,
        total_pixels=budget,
        factor=geometry.factor,
        max_source_pixels=config.max_source_pixels,
        rules=config.rules,
    )
    width, height = frames.size
    steps = len(frames.indices) // geometry.temporal_patch_size
    grid = (steps, height // geometry.patch_size, width // geometry.patch_size)
    return VisionInput(part, frames.source_size, frames.size, grid, frames, frames.notes)


def _max_image_pixels(images: int, budget: int, config: ProcessorConfig) -> int:
    """Most pixels of one image in a sample with `images` of them."""
    most = config.max_pixels
    if config.share_pixels and images > 1:
        most = min(most, max(budget // images, int(BUDGET_SLACK * config.video_min_pixels)))
    return max(most, config.min_pixels)


def load_patches(
    inputs: Sequence[VisionInput], config: ProcessorConfig, geometry: PatchGeometry, dtype: type = np.float32
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode, resize and patchify: (P, patch_dim) patches, inputs in order; and the codes of what decoding changed.

    Args:
        dtype: np.float32 for normalised values, np.uint8 for the pixels as they are.

    Raises:
        MediaError: an image or video that cannot be decoded.
    """
    counts = [t * h * w for t, h, w in (one.grid for one in inputs)]
    patches: np.ndarray = np.empty((sum(counts), geometry.patch_dim), dtype=dtype)
    notes: tuple[str, ...] = ()
    at = 0
    for one, count in zip(inputs, counts, strict=True):
        if one.frames is None:
            image = load_rgb(
                one.part["image"],
                max_source_pixels=config.max_source_pixels,
                time_limit=config.image_time_limit,
                rules=config.rules,
            )
            if "augment" in one.part:
                image = augmented(image, one.part["augment"])
            frames = [resize_planar(image, one.size, config.resize)]
            _remember(one)
        else:
            video = decode_video(
                one.part,
                one.frames,
                time_limit=config.video_time_limit,
                max_source_pixels=config.max_source_pixels,
                resize=config.resize,
                rules=config.rules,
            )
            frames = video.frames
            notes += video.notes
        patchify(frames, geometry, patches[at : at + count])
        at += count
    return patches, notes


def encoded_sizes(media: Any) -> tuple[Size, Size] | None:
    """((width, height) as displayed, (width, height) after resizing) of an image that this process encoded last.

    None if it was not among the last 256 images.
    """
    found = ENCODED_SIZES.get(_address(media))
    if found is None or (found[2] is not None and found[2]() is not media):
        return None
    return found[0], found[1]


def _remember(one: VisionInput) -> None:
    media = one.part["image"]
    reference = weakref.ref(media) if isinstance(media, Image.Image) else None
    ENCODED_SIZES.put(_address(media), (one.source_size, one.size, reference))


def _address(media: Any) -> Hashable:
    if isinstance(media, (str, Path)):
        return str(media)
    if isinstance(media, (FileRange, VideoFrame)):
        return media
    if isinstance(media, (bytes, bytearray, memoryview)):
        middle = len(media) // 2
        return len(media), bytes(media[middle : middle + 4096])
    return id(media)


def to_source_pixels(
    box: tuple[float, float, float, float], size: Size, source_size: Size
) -> tuple[float, float, float, float]:
    """A box x1, y1, x2, y2 in the pixels of the image that the model sees, in those of the image that the user gave."""
    x = source_size[0] / size[0]
    y = source_size[1] / size[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y
