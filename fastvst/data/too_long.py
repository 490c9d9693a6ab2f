"""Which option would admit a sample that is longer than max_seq_len."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from fastvst.data.images import PatchGeometry
from fastvst.data.processor_config import ProcessorConfig
from fastvst.data.sample import Message
from fastvst.data.vision_inputs import measure_vision_inputs

MOST_STEPS = 60  # of the search for a length; the pixel budget grows by 0.8 tokens for every token of max_seq_len


def how_to_admit(messages: Sequence[Message], text: int, config: ProcessorConfig, geometry: PatchGeometry) -> str:
    """A sentence with every single option that would admit the sample, each with a value that was tried.

    Args:
        messages: the sample's messages, whose images are measured again.
        text: its tokens that are not of images or videos.
    """

    def length(trial: ProcessorConfig) -> int:
        merge = geometry.merge_size**2
        inputs = measure_vision_inputs(messages, trial, geometry)
        return text + sum(t * h * w // merge for t, h, w in (one.grid for one in inputs))

    needed = config.max_seq_len
    for _ in range(MOST_STEPS):
        found = length(dataclasses.replace(config, max_seq_len=needed))
        if found <= needed:
            break
        needed = found
    options = [f"raise max_seq_len to {needed}"]
    kinds = {part["type"] for message in messages for part in message["content"]}
    for name in _names(kinds):
        value = next((v for v in _smaller(config, name) if length(_with(config, name, v)) <= config.max_seq_len), None)
        if value is not None:
            options.append(f"lower {name} to {value}")
    return "To admit it, " + ", or ".join(options)


def _names(kinds: set[str]) -> list[str]:
    names = ["max_pixels"] if "image" in kinds else []
    return names + (["video_max_pixels", "max_frames"] if "video" in kinds else [])


def _smaller(config: ProcessorConfig, name: str) -> Iterator[int]:
    """Half of the option's value, a quarter, ..., down to the least that the configuration allows."""
    least = {"max_pixels": config.min_pixels, "video_max_pixels": config.video_min_pixels, "max_frames": 2}[name]
    value = int(getattr(config, name)) // 2
    while value > least:
        yield value
        value //= 2
    if getattr(config, name) > least:
        yield least


def _with(config: ProcessorConfig, name: str, value: int) -> ProcessorConfig:
    changes: dict[str, Any] = {name: value}
    if name == "max_frames":
        changes["min_frames"] = min(config.min_frames, value)
    return dataclasses.replace(config, **changes)
