"""Merged vision tokens of images that several prompts show: equal images go through the vision tower once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastvst.batch import IGNORE, EncodedSample, pack
from fastvst.model import Qwen25VL
from fastvst.rollout.request import PromptState
from fastvst_kernels.shared.tensors import send


@dataclass
class VisionCache:
    """Features of sets of images (all images and videos of a prompt), kept while a prompt still needs them.

    The set that was used last stays until another one replaces it, or until `forget`: questions about one video follow
    each other, but not always in one call.

    Attributes:
        users: number of prompts that still need each set.
        features: (N, hidden) of each set, in reading order.
        shapes: the grids of the sets that have a key now.
        recent: the set that was used last.
        runs: number of samples that went through the vision tower so far.
    """

    users: dict[bytes, int] = field(default_factory=dict)
    features: dict[bytes, Tensor] = field(default_factory=dict)
    shapes: dict[bytes, tuple] = field(default_factory=dict)
    recent: bytes | None = None
    runs: int = 0

    def expect(self, samples: Sequence[EncodedSample]) -> list[bytes | None]:
        """Register new prompts. Returns a key for each: equal for equal images, None if nothing can be shared."""
        sizes: dict[tuple, int] = {}
        shapes = [tuple(s.grid.flatten().tolist()) for s in samples]
        for shape in shapes:
            sizes[shape] = sizes.get(shape, 0) + 1
        keys: list[bytes | None] = []
        known = set(self.shapes.values())
        for number, (sample, shape) in enumerate(zip(samples, shapes, strict=True), start=1):
            key = None
            # Images of another size cannot be equal. The last sample gets a key because the next call may repeat it.
            if shape and (sizes[shape] > 1 or shape in known or number == len(samples)):
                # 1 GB/s: a 640 x 480 image (8.2 MB of patches) takes 8 ms; the tower takes far more on a CPU.
                key = hashlib.sha1(repr(shape).encode() + np.ascontiguousarray(sample.patches.numpy()).data).digest()
                self.users[key] = self.users.get(key, 0) + 1
                self.shapes[key] = shape
            keys.append(key)
        return keys

    def done(self, prompt: PromptState) -> None:
        """`prompt` does not need its images any more: it has them, or it will never be computed."""
        key = prompt.vision_key
        prompt.vision_key = None
        if key is None or key not in self.users:
            return
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
        if self.recent != key:
            self.forget()
            self.recent = key

    def forget(self) -> None:
        """Drop the set that was used last unless a prompt still needs it: the weights may change after this."""
        if self.recent is not None and self.recent not in self.users:
            self.features.pop(self.recent, None)
            self.shapes.pop(self.recent, None)
        self.recent = None

    def clear(self) -> None:
        """Drop everything except the count of runs."""
        self.users.clear()
        self.features.clear()
        self.shapes.clear()
        self.recent = None


def embed_prompts(model: Qwen25VL, prompts: Sequence[PromptState], cache: VisionCache) -> None:
    """Set `embedded` of prompts: token embeddings, with the merged vision tokens in the rows of their placeholders.

    Prompts with new images share one call of the vision tower; equal images go through it once.
    """
    new: list[PromptState] = []
    repeated: list[PromptState] = []
    features = dict(cache.features)  # kept until this call ends, whatever the cache drops meanwhile
    for prompt in prompts:
        key = prompt.vision_key
        known = key is not None and (key in features or any(p.vision_key == key for p in new))
        (repeated if known else new).append(prompt)
    for prompt, rows in zip(new, _embed_packed(model, [p.sample for p in new]), strict=True):
        prompt.embedded = rows
        key = prompt.vision_key
        cache.runs += bool(len(prompt.sample.grid))
        if key is not None:
            features[key] = rows[send(prompt.sample.vision_slots.long(), rows.device)]
            if key in cache.users:
                cache.features[key] = features[key]
        cache.done(prompt)
    for prompt in repeated:
        assert prompt.vision_key is not None
        rows = model.model.embed_tokens(send(prompt.sample.tokens.long(), model.head_weight.device))
        slots = send(prompt.sample.vision_slots.long(), rows.device)
        prompt.embedded = rows.index_copy(0, slots, features[prompt.vision_key])
        cache.done(prompt)


def _embed_packed(model: Qwen25VL, samples: Sequence[EncodedSample]) -> Sequence[Tensor]:
    """(length, hidden) input rows of each sample, from one packed batch."""
    if not samples:
        return []
    unlabelled = [dataclasses.replace(s, labels=torch.full_like(s.labels, IGNORE)) for s in samples]
    batch = send(pack(unlabelled), model.head_weight.device)
    rows = model.model.embed_tokens(batch.tokens)
    if batch.num_patches:
        rows = rows.index_copy(0, batch.vision_slots, model.encode_images(batch).to(rows.dtype))
    return rows.split([len(s) for s in samples])
