"""Images to patches, compared with the Hugging Face image processor: one thread each, in the same run.

Both resize methods are measured: Pillow's, which gives the same bits as theirs, and torch's (`resize="torch"`), which
does not.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from bench.cases.images import photograph
from bench.table import Result
from bench.timing import interleaved
from fastvst.data.images import CLIP_STD
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample


@pytest.mark.parametrize("width, height", [(640, 480), (1024, 768)])
def test_images(record: Callable[..., None], width: int, height: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.set_num_threads(1)
    limits = {"min_pixels": 56 * 56, "max_pixels": 12_845_056}
    processor = Processor.preset("tiny", **limits)
    fast = Processor.preset("tiny", **limits, resize="torch")
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 12_845_056})
    images = [photograph(width, height, seed) for seed in range(8)]
    samples = [
        Sample.from_messages(
            [{"role": "user", "content": [{"type": "image", "image": i}]}, {"role": "assistant", "content": "."}]
        )
        for i in images
    ]

    def ours(with_: Processor, these: list[Sample]) -> list[torch.Tensor]:
        return [with_.encode(s).patches for s in these]

    def hugging_face() -> list[torch.Tensor]:
        return [theirs(images=i, return_tensors="pt")["pixel_values"] for i in images]

    for a, b, c in zip(ours(processor, samples), hugging_face(), ours(fast, samples), strict=True):
        assert torch.equal(a, b), "both must compute the same patches, otherwise the comparison means nothing"
        assert (a - c).abs().max() <= 2.01 / 255 / min(CLIP_STD), "the fast resize: at most 2 of 255 levels"
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

    def hugging_face_jpeg() -> list[torch.Tensor]:
        opened = [Image.open(io.BytesIO(b)).convert("RGB") for b in buffers]
        return [theirs(images=i, return_tensors="pt")["pixel_values"] for i in opened]

    for what, these, hf in (("decoded", samples, hugging_face), ("JPEG", encoded, hugging_face_jpeg)):
        runs = {
            "same bits": lambda these=these: ours(processor, these),
            "torch": lambda these=these: ours(fast, these),
            "hugging_face": hf,
        }
        seconds = interleaved(runs, rounds=7)
        rates = {name: len(images) / value for name, value in seconds.items()}
        peer = ("Hugging Face", rates["hugging_face"])
        record(
            f"{what} {width}x{height} to patches",
            Result("images/s", rates["same bits"], *peer),
            Result("images/s", rates["torch"], *peer, goal=2.0, what='resize="torch"'),
            ours_images_per_s=rates["same bits"],
            ours_resize_torch_images_per_s=rates["torch"],
            hugging_face_images_per_s=rates["hugging_face"],
            ratio=rates["same bits"] / peer[1],
            ratio_resize_torch=rates["torch"] / peer[1],
        )
