"""transformers' Qwen2.5-VL with our weights, and its padded inputs."""

from __future__ import annotations

import json
from typing import Any

import torch

from fastvst.batch import EncodedSample
from fastvst.model import ModelConfig, Qwen25VL


def peer(model: Qwen25VL) -> Any:
    """transformers' model with the same weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from hf_parity import hf_name

    made = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(model.config.to_json()))).float()
    made.load_state_dict({hf_name(n): p for n, p in model.state_dict().items()}, strict=False)
    made.tie_weights()
    return made.eval()


def padded(config: ModelConfig, samples: list[EncodedSample]) -> dict[str, torch.Tensor]:
    """Arguments of a batched `generate`, with prompts padded on the left."""
    longest = max(map(len, samples))
    ids = torch.full((len(samples), longest), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample) :] = sample.tokens.long()
        mask[row, longest - len(sample) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == config.image_token_id).int()}
    if any(len(s.patches) for s in samples):
        inputs["pixel_values"] = torch.cat([s.patches for s in samples])
        inputs["image_grid_thw"] = torch.cat([s.grid for s in samples]).long()
    return inputs
