"""Prompts with images and groups of random completions, for the tests of packing and of the policy update."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from fastvst.data import Processor, Sample
from fastvst.rl.packing import Answer, Group
from small_run import small_config


def small_processor() -> Processor:
    return Processor.preset("tiny", model_config=small_config(), max_pixels=84 * 84, max_seq_len=256)


def prompt_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts with 1, 0, 2, 1, 0, 2, ... images."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        images = [
            Image.fromarray(rng.integers(0, 255, (*rng.integers(40, 90, 2), 3), dtype=np.uint8))
            for _ in range((1, 0, 2)[index % 3])
        ]
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        parts.append({"type": "text", "text": "how far is the chair " * (1 + index % 3)})
        samples.append(Sample.from_messages([{"role": "user", "content": parts}], id=str(index)))
    return samples


def make_groups(processor: Processor, count: int, answers: int = 4, seed: int = 0) -> list[Group]:
    rng = torch.Generator().manual_seed(seed)

    def completion(length: int) -> Answer:
        tokens = torch.randint(10, 300, (length,), generator=rng, dtype=torch.int32)
        logprobs = -3 * torch.rand(length, generator=rng)
        return Answer(tokens, logprobs, advantage=float(torch.randn((), generator=rng)))

    groups = []
    for sample in prompt_samples(count, seed):
        prompt = processor.encode(sample, add_generation_prompt=True)
        lengths = torch.randint(1, 12, (answers,), generator=rng).tolist()
        groups.append(Group(prompt, tuple(completion(length) for length in lengths)))
    return groups
