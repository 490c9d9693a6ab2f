"""`load`: a model directory as a model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastvst.data.processor import Processor
from fastvst.model import Qwen25VL


def load(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **options: Any
) -> tuple[Qwen25VL, Processor]:
    """The model of a Qwen2.5-VL directory, published or written by training, and its processor.

    Args:
        path: directory with config.json, weights and tokenizer, or a name on the Hugging Face Hub.
        device: of the model.
        dtype: of the weights. None: float32 on the CPU, bfloat16 on a GPU.
        options: fields of `fastvst.data.ProcessorConfig` in place of the directory's, such as max_pixels.

    Returns:
        (model in evaluation mode, processor). `model.train()` makes no difference: the model has no dropout.

    Raises:
        FileNotFoundError, ValueError: as `Qwen25VL.from_pretrained` and `Processor.from_pretrained`.
    """
    where = torch.device(device)
    chosen = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    processor = Processor.from_pretrained(path, **options)
    return Qwen25VL.from_pretrained(path, dtype=chosen, device=where).eval(), processor
