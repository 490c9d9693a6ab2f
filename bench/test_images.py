"""Pictures to patches, beside the Hugging Face image processor, one thread each, in the same run."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from fastvst.data.encode import Processor
from fastvst.data.sample import Sample
from timing import interleaved


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: compresses and resizes like a picture, unlike white noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("width, height", [(640, 480), (1024, 768)])
def test_images(record: Callable[..., None], width: int, height: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.set_num_threads(1)
    processor = Processor.preset("tiny", min_pixels=56 * 56, max_pixels=12_845_056)
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 12_845_056})
    images = [photograph(width, height, seed) for seed in range(8)]
    samples = [
        Sample.from_messages(
            [{"role": "user", "content": [{"type": "image", "image": i}]}, {"role": "assistant", "content": "."}]
        )
        for i in images
    ]

    def ours() -> list[torch.Tensor]:
        return [processor.encode(s).patches for s in samples]

    def hugging_face() -> list[torch.Tensor]:
        return [theirs(images=i, return_tensors="pt")["pixel_values"] for i in images]

    for a, b in zip(ours(), hugging_face(), strict=True):
        assert torch.equal(a, b), "both must compute the same patches, or the comparison means nothing"
    seconds = interleaved({"ours": ours, "hugging_face": hugging_face}, rounds=7)
    record(
        f"decoded {width}x{height} to patches",
        ours_images_per_s=len(images) / seconds["ours"],
        hugging_face_images_per_s=len(images) / seconds["hugging_face"],
        ratio=seconds["hugging_face"] / seconds["ours"],
    )
    buffers = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        buffers.append(buffer.getvalue())
    encoded = [
        Sample.from_messages(
            [{"role": "user", "content": [{"type": "image", "image": b}]}, {"role": "assistant", "content": "."}]
        )
        for b in buffers
    ]
    seconds = interleaved(
        {
            "ours": lambda: [processor.encode(s) for s in encoded],
            "hugging_face": lambda: [
                theirs(images=Image.open(io.BytesIO(b)).convert("RGB"), return_tensors="pt") for b in buffers
            ],
        },
        rounds=5,
    )
    record(
        f"JPEG {width}x{height} to patches",
        ours_images_per_s=len(images) / seconds["ours"],
        hugging_face_images_per_s=len(images) / seconds["hugging_face"],
        ratio=seconds["hugging_face"] / seconds["ours"],
    )
