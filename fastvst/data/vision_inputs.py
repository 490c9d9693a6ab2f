"""The images and videos of one sample: their sizes and grids from file headers, and their patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastvst.data.images import PatchGeometry, image_size, load_rgb, patchify, resize_planar, target_size
from fastvst.data.processor_config import ProcessorConfig
from fastvst.data.sample import Message, Part
from fastvst.data.video import (
    BUDGET_SLACK,
    FrameSelection,
    explicit_size,
    load_frames,
    select_frames,
    total_pixel_budget,
)


@dataclass(frozen=True)
class VisionInput:
    """One image or video of a sample, before any pixel is decoded.

    Attributes:
        part: the part of `Sample.messages`.
        size: (width, height) in pixels after resizing.
        grid: patches (t, h, w).
        frames: the frames of a video; None for an image.
    """

    part: Part
    size: tuple[int, int]
    grid: tuple[int, int, int]
    frames: FrameSelection | None = None


def measure_vision_inputs(
    messages: Sequence[Message], config: ProcessorConfig, geometry: PatchGeometry
) -> list[VisionInput]:
    """All images and videos in reading order. Reads file headers only.

    Raises:
        MediaError: an image or video that cannot be used.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] in ("image", "video")]
    budget = total_pixel_budget(config.max_seq_len, geometry.factor)
    max_pixels = _max_image_pixels(sum(part["type"] == "image" for part in parts), budget, config)
    inputs = []
    for part in parts:
        frames = None
        steps = 1
        if part["type"] == "image":
            width, height = image_size(part["image"], max_source_pixels=config.max_source_pixels)
            size = target_size(
                width,
                height,
                factor=geometry.factor,
                min_pixels=part.get("min_pixels") or config.min_pixels,
                max_pixels=part.get("max_pixels") or max_pixels,
                explicit=explicit_size(part),
            )
        else:
            frames = select_frames(
                part,
                config.video,
                total_pixels=budget,
                factor=geometry.factor,
                max_source_pixels=config.max_source_pixels,
            )
            size = frames.size
            steps = len(frames.indices) // geometry.temporal_patch_size
        grid = (steps, size[1] // geometry.patch_size, size[0] // geometry.patch_size)
        inputs.append(VisionInput(part, size, grid, frames))
    return inputs


def _max_image_pixels(images: int, budget: int, config: ProcessorConfig) -> int:
    """Most pixels of one image in a sample with `images` of them."""
    most = config.max_pixels
    if config.share_pixels and images > 1:
        most = min(most, max(budget // images, int(BUDGET_SLACK * config.video_min_pixels)))
    return max(most, config.min_pixels)


def load_patches(inputs: Sequence[VisionInput], config: ProcessorConfig, geometry: PatchGeometry) -> np.ndarray:
    """Decode, resize, normalise and patchify: (P, patch_dim) float32, inputs in order.

    Raises:
        MediaError: an image or video that cannot be decoded.
    """
    counts = [t * h * w for t, h, w in (one.grid for one in inputs)]
    patches = np.empty((sum(counts), geometry.patch_dim), dtype=np.float32)
    at = 0
    for one, count in zip(inputs, counts, strict=True):
        if one.frames is None:
            image = load_rgb(
                one.part["image"], max_source_pixels=config.max_source_pixels, time_limit=config.image_time_limit
            )
            frames = [resize_planar(image, one.size, config.resize)]
        else:
            frames = load_frames(
                one.part,
                one.frames,
                time_limit=config.video_time_limit,
                max_source_pixels=config.max_source_pixels,
                resize=config.resize,
            )
        patchify(frames, geometry, patches[at : at + count])
        at += count
    return patches
