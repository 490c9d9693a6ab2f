"""Batches for the vision tower of the tiny preset, in the order in which the tower returns its tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvst.data import Processor, pack
from fastvst.model.vision import VisionTower
from tools.tower_data import (
    MOTIONS,
    SIZES,
    Example,
    ImageTargets,
    TokenTargets,
    Views,
    example,
    mirrored,
    motion_example,
)


@dataclass(frozen=True)
class ImageBatch:
    """A batch: the arguments of the tower, the targets of its tokens in the order of the tower, the targets of images.

    `image` (N,): the image of each token. The last 2 P images are P pairs; `motion` (P, 6): shares of the words MOTIONS
    of each pair, which sum to 1.
    """

    patches: Tensor
    positions: Tensor
    cu_windows: Tensor
    cu_images: Tensor
    max_window: int
    max_image: int
    targets: TokenTargets
    marks: ImageTargets
    image: Tensor
    motion: Tensor

    def encode_images(self, tower: VisionTower) -> Tensor:
        """Merged tokens (N, hidden)."""
        return tower(
            self.patches,
            self.positions,
            self.cu_windows,
            self.cu_images,
            max_window=self.max_window,
            max_image=self.max_image,
        )

    def pair_differences(self, tokens: Tensor) -> Tensor:
        """(P, hidden): mean token of the second image of each pair minus that of the first."""
        count = int(self.image.max()) + 1
        total = tokens.new_zeros(count, tokens.shape[1]).index_add_(0, self.image, tokens)
        mean = total / torch.bincount(self.image, minlength=count)[:, None]
        pairs = mean[count - 2 * len(self.motion) :].view(-1, 2, tokens.shape[1])
        return pairs[:, 1] - pairs[:, 0]

    def own(self) -> Tensor:
        """(images, N) bool: the tokens of each image."""
        return self.image == torch.arange(len(self.marks.present))[:, None]

    def log_attention(self, scores: Tensor) -> Tensor:
        """(images, C, N): for each column of `scores` (N, C) its log softmax over the tokens of each image.

        So a head of the decoder that looks for the thing of this column weighs the tokens. Tokens of other images have
        -inf.
        """
        return scores.T.masked_fill(~self.own()[:, None], float("-inf")).log_softmax(-1)


def collate(examples: Sequence[Example], pairs: Sequence[tuple[list[Example], tuple[str, ...]]] = ()) -> ImageBatch:
    """One batch of several examples, then of several pairs."""
    examples = [*examples, *(one for two, _ in pairs for one in two)]
    samples = [sample for sample, _, _ in examples]
    batch = pack(samples)
    # Targets are in reading order, the order of rows in a pack. The tower orders its tokens by windows.
    starts = np.cumsum([0, *(len(sample) for sample in samples)])
    rows = torch.cat([sample.vision_slots.long() + int(s) for sample, s in zip(samples, starts, strict=False)])
    order = torch.searchsorted(rows, batch.vision_slots.long())
    fields = [field.name for field in dataclasses.fields(TokenTargets)]
    targets = TokenTargets(*(torch.cat([getattr(t, field) for _, t, _ in examples])[order] for field in fields))
    fields = [field.name for field in dataclasses.fields(ImageTargets)]
    marks = ImageTargets(*(torch.cat([getattr(m, field) for _, _, m in examples]) for field in fields))
    image = torch.cat([torch.full((len(t.name),), k) for k, (_, t, _) in enumerate(examples)])[order]
    motion = torch.zeros(len(pairs), len(MOTIONS))
    for k, (_, words) in enumerate(pairs):
        motion[k, [MOTIONS.index(word) for word in words]] = 1 / len(words)
    return ImageBatch(
        batch.patches,
        batch.vision_positions,
        batch.cu_windows,
        batch.cu_images,
        batch.max_window,
        batch.max_image,
        targets,
        marks,
        image,
        motion,
    )


class BatchStream(torch.utils.data.IterableDataset):
    """Endless batches of `singles` random shots with random marks and `pairs` random pairs, for a DataLoader worker."""

    def __init__(self, views: Views, names: list[str], singles: int, pairs: int, seed: int) -> None:
        self.views = views
        self.names = names
        self.singles = singles
        self.pairs = pairs
        self.seed = seed

    def __iter__(self) -> Iterator[ImageBatch]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        processor = tiny_processor()
        while True:
            shots = [rng.choice(self.views.shots) for _ in range(self.singles)]
            shots = [mirrored(shot) if rng.random() < 0.5 else shot for shot in shots]
            motions = [rng.choice(self.views.motions) for _ in range(self.pairs)]
            yield collate(
                [example(shot, rng, processor, self.names, rng.choice(SIZES)) for shot in shots],
                [motion_example(motion, rng, processor, self.names) for motion in motions],
            )


def tiny_processor() -> Processor:
    """The processor of examples/sft.py."""
    return Processor.preset("tiny", max_pixels=168 * 126, max_seq_len=4096, fov_base_width=200)
