"""A processor that needs no pixels, and small data sets for it; an image is the text "rows x columns" of tokens."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from fastvst.batch import IGNORE, Cost, EncodedSample
from fastvst.data.ledger import SampleError
from fastvst.data.sample import Sample
from fastvst.model.positions import IMAGE, mrope_positions, vision_layout


class FakeProcessor:
    """Has `measure` and `encode` like Processor; every word is one token.

    `measure` finds the image "0x0" broken, only `encode` finds one that ends in "!". A sample whose text has the word
    `deadly` kills its process, `sleepy` takes a minute, `buggy` raises a KeyError, all while encoding.
    """

    def measure(self, sample: Sample) -> Cost:
        words, grids = self._contents(sample)
        if any(grid[1] == 0 for grid in grids):
            raise SampleError("broken_image", sample.source, sample.id, "an image without pixels")
        patches = sum(t * h * w for t, h, w in grids)
        tokens = len(words) + patches // 4
        return Cost(tokens, patches, 6.0 * tokens + 2.0 * patches + 1e-3 * tokens**2)

    def encode(self, sample: Sample) -> EncodedSample:
        cost = self.measure(sample)
        words, grids = self._contents(sample)
        if any(str(p["image"], "ascii").endswith("!") for p in sample.parts("image")):
            raise SampleError("broken_image", sample.source, sample.id, "the pixels end early")
        if "deadly" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "sleepy" in words:
            time.sleep(60)
        if "buggy" in words:
            raise KeyError("a mistake in the code")
        vision = cost.patches // 4
        modality = np.array([IMAGE] * vision + [0] * len(words))
        layout = vision_layout(grids)
        ids = [zlib.crc32(word.encode()) % 1000 for word in words]
        tokens = torch.tensor([1] * vision + ids, dtype=torch.int32)
        labels = torch.where(torch.arange(len(tokens)) < vision + 1, IGNORE, tokens).int()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{sample.source}/{sample.id}".encode()))
        return EncodedSample(
            tokens=tokens,
            labels=labels,
            positions=torch.from_numpy(mrope_positions(modality, grids)),
            patches=torch.randn((cost.patches, 1176), generator=generator),
            grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
            vision_slots=torch.arange(vision, dtype=torch.int32),
            window_order=torch.from_numpy(layout.window_order.astype(np.int32)),
            window_lengths=torch.from_numpy(layout.window_lengths),
            image_lengths=torch.from_numpy(layout.image_lengths),
            vision_positions=torch.from_numpy(layout.positions),
            cost=cost,
            source=sample.source,
            id=sample.id,
        )

    @staticmethod
    def _contents(sample: Sample) -> tuple[list[str], list[tuple[int, int, int]]]:
        words = [word for part in sample.parts("text") for word in part["text"].split()]
        sizes = [str(part["image"], "ascii").rstrip("!").split("x") for part in sample.parts("image")]
        return words, [(1, 2 * int(rows), 2 * int(columns)) for rows, columns in sizes]


def fake_row(identifier: str, words: int, images: tuple[str, ...] = (), extra: str = "") -> dict:
    """A LLaVA row with `words` words in total and its images as data URIs."""
    question = "<image>" * len(images) + " ".join(f"w{identifier}_{i}" for i in range(words - 2))
    return {
        "id": identifier,
        "image": ["data:text/plain;base64," + base64.b64encode(p.encode()).decode() for p in images],
        "conversations": [
            {"from": "human", "value": f"{question} {extra}".strip()},
            {"from": "gpt", "value": f"answer {identifier}"},
        ],
    }


def fake_rows(count: int, seed: int = 0, prefix: str = "") -> list[dict]:
    """Rows of 3 to 60 words with 0 to 2 images of 1 to 30 merged tokens."""
    random_ = random.Random(seed)
    return [
        fake_row(
            f"{prefix}{index}",
            random_.randint(3, 60),
            tuple(f"{random_.randint(1, 5)}x{random_.randint(1, 6)}" for _ in range(random_.choice([0, 1, 1, 2]))),
        )
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
