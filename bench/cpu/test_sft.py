"""Useful tokens per second of packed SFT compared with transformers.Trainer, on the same tiny model and samples.

Both start from the same checkpoint, take PIL images, run AdamW in float32 and include all preprocessing in the measured
time, without worker processes. Trainer pads every batch to its longest sample, as is usual; useful tokens are those of
the samples, without padding. The samples resemble those of the rooms: 60 to 400 tokens of text, one or two images.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.cases.images import photograph
from bench.table import Result
from fastvst.batch import pack
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst_kernels import linear_cross_entropy

ROWS = 96
BATCH = 16
PACK_TOKENS = 4096
LEARNING_RATE = 1e-3
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 224 * 168}


def rows(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    words = ["the", "red", "point", "is", "closer", "to", "camera", "than", "chair", "table", "of", "room", "left"]
    made = []
    for index in range(count):
        images = [{"type": "image", "image": photograph(320, 240, seed)} for seed in range(1 + int(rng.random() < 0.3))]
        text = " ".join(rng.choice(words, int(np.exp(rng.uniform(np.log(20), np.log(300))))))
        answer = " ".join(rng.choice(words, int(rng.integers(2, 40))))
        content = [*images, {"type": "text", "text": text}]
        made.append(
            Sample.from_messages(
                [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], id=str(index)
            )
        )
    return made


def ours(directory: Path, samples: list[Sample], device: torch.device) -> tuple[float, float]:
    """(seconds, first loss) of one epoch of packed training."""
    model = Qwen25VL.from_pretrained(directory, device=device)
    processor = Processor.from_pretrained(directory, **PIXELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    begin = time.perf_counter()
    first = None
    waiting = []
    held = 0

    def step() -> None:
        nonlocal first
        batch = pack(waiting).to(device)
        weights = batch.target_weights / batch.num_targets
        loss = model(
            batch, head=lambda h, w: linear_cross_entropy(h[batch.loss_rows], w, batch.targets, row_weights=weights)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first = float(loss.detach()) if first is None else first

    for sample in samples:
        encoded = processor.encode(sample)
        if held + len(encoded) > PACK_TOKENS:
            step()
            waiting = []
            held = 0
        waiting.append(encoded)
        held += len(encoded)
    step()
    return time.perf_counter() - begin, first or 0.0


def padding_collator(directory: Path) -> Callable[[list[Sample]], dict[str, torch.Tensor]]:
    """Preprocessing by the Hugging Face processors, with every batch padded to its longest sample."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(directory)
    size = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
    images = Qwen2VLImageProcessorPil(size=size)
    pad, image_pad = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|image_pad|>"])

    def collate(batch: list[Sample]) -> dict[str, torch.Tensor]:
        ids = []
        labels = []
        pixels = []
        grids = []
        for sample in batch:
            encoded = [images(images=p["image"], return_tensors="pt") for p in sample.parts("image")]
            texts = [m["content"][-1]["text"] for m in sample.messages]
            media = "".join(
                "<|vision_start|>" + "<|image_pad|>" * int(e["image_grid_thw"].prod() // 4) + "<|vision_end|>"
                for e in encoded
            )
            prompt = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                f"{media}{texts[0]}<|im_end|>\n"
            )
            head = tokenizer(prompt).input_ids
            tail = tokenizer(f"<|im_start|>assistant\n{texts[1]}<|im_end|>\n").input_ids
            ids.append(head + tail)
            labels.append([-100] * len(head) + tail)
            pixels += [e["pixel_values"] for e in encoded]
            grids += [e["image_grid_thw"] for e in encoded]
        longest = max(map(len, ids))
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        return {
            "input_ids": input_ids,
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
            "mm_token_type_ids": (input_ids == image_pad).int(),
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.cat(grids),
        }

    return collate


def trainer(directory: Path, samples: list[Sample], device: torch.device, out: Path) -> float:
    """Seconds of one epoch of transformers.Trainer."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "use_cpu": device.type == "cpu",
        "train_sampling_strategy": "sequential",
    }
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    run = Trainer(
        model=model,
        args=TrainingArguments(**{k: v for k, v in arguments.items() if k in names}),
        train_dataset=samples,
        data_collator=padding_collator(directory),
    )
    begin = time.perf_counter()
    run.train()
    return time.perf_counter() - begin


@pytest.mark.needs("accelerate")
def test_sft(record: Callable[..., None], full: bool, tmp_path: Path, device: torch.device) -> None:
    torch.set_num_threads(torch.get_num_threads())
    config = ModelConfig.preset("tiny")
    processor = Processor.preset("tiny", model_config=config, **PIXELS)
    Qwen25VL(config).save_pretrained(tmp_path / "model", processor=processor)
    samples = rows(ROWS)
    lengths = [len(processor.encode(s)) for s in samples]
    ours(tmp_path / "model", samples[:8], device)
    trainer(tmp_path / "model", samples[:BATCH], device, tmp_path / "warm")
    times: dict[str, list[float]] = {"ours": [], "trainer": []}
    for _ in range(3 if full else 1):  # in turns, so that other load on the machine slows both
        times["ours"].append(ours(tmp_path / "model", samples, device)[0])
        times["trainer"].append(trainer(tmp_path / "model", samples, device, tmp_path / "out"))
    seconds = {name: min(values) for name, values in times.items()}
    padded = sum(max(lengths[i : i + BATCH]) * len(lengths[i : i + BATCH]) for i in range(0, ROWS, BATCH))
    ours_rate = sum(lengths) / seconds["ours"]
    trainer_rate = sum(lengths) / seconds["trainer"]
    record(
        "SFT of the tiny preset, useful tokens",
        Result("tokens/s", ours_rate, "transformers.Trainer", trainer_rate),
        ours_tokens_per_s=ours_rate,
        trainer_tokens_per_s=trainer_rate,
        ratio=seconds["trainer"] / seconds["ours"],
        trainer_padding_share=1 - sum(lengths) / padded,
    )
