"""Random small models and samples, ours and transformers', with the same weights and the same inputs."""

from __future__ import annotations

import json

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fastvst.batch import Cost, EncodedSample
from fastvst.model import ModelConfig, Qwen25VL, VisionConfig
from fastvst.model.positions import IMAGE, TEXT, VIDEO, mrope_positions, vision_layout
from fastvst.model.published import layout_of, publish

IMAGE_ID = 90
VIDEO_ID = 91
VISION_START = 92
VISION_END = 93
SPECIAL = 90  # ids below are ordinary text


def small_config(**changes) -> ModelConfig:
    """A model of about 60 k parameters; `vision` is a dict of changes to its tower."""
    tower = {"depth": 3, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "fullatt_block_indexes": (1,)}
    tower |= {"out_hidden_size": changes.get("hidden_size", 64)} | changes.pop("vision", {})
    defaults = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mrope_section": (2, 3, 3),
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "bos_token_id": 94,
        "pad_token_id": 94,
        "eos_token_ids": (95, 94),
        "video_rule": "grid",
    }
    return ModelConfig(**(defaults | changes), vision=VisionConfig(**tower))


def make_models(config: ModelConfig, dtype: torch.dtype, seed: int = 0):
    """(ours, transformers') with equal random weights; biases and norms are random too."""
    torch.manual_seed(seed)
    ours = Qwen25VL(config)
    with torch.no_grad():
        for name, parameter in ours.state_dict().items():  # views: the numbers do not depend on the layout
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.dim() == 1:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.15)
    ours = ours.to(dtype)
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(config.to_json()))).to(dtype)
    theirs.load_state_dict({hf_name(n): p for n, p in ours.state_dict().items()}, strict=False)
    if not config.tie_word_embeddings:
        assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)
    assert torch.equal(theirs.model.language_model.embed_tokens.weight, ours.model.embed_tokens.weight)
    return ours, theirs.eval()


def published_grads(model: Qwen25VL) -> dict[str, torch.Tensor]:
    """The gradients of a model by published name; parameters without one are left out."""
    return publish({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, layout_of(model))


def hf_name(name: str) -> str:
    """transformers 5's name of a published one."""
    for prefix, replacement in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def make_sample(config: ModelConfig, parts: list[tuple], seed: int = 0, *, supervised: int | None = None):
    """An EncodedSample of random text and pixels.

    Args:
        parts: ("text", n), ("image", rows, columns) and ("video", frames, rows, columns, second_per_grid) in merged
            tokens; vision_start and vision_end enclose images and videos.
        supervised: the last that many tokens are labels; default a random half of the text.
    """
    rng = np.random.default_rng(seed)
    v = config.vision
    tokens = []
    modality = []
    grids = []
    seconds = []
    for kind, *numbers in parts:
        if kind == "text":
            tokens += rng.integers(0, SPECIAL, numbers[0]).tolist()
            modality += [TEXT] * numbers[0]
            continue
        frames, rows, columns = (1, *numbers) if kind == "image" else numbers[:3]
        count = frames * rows * columns
        tokens += [VISION_START] + [IMAGE_ID if kind == "image" else VIDEO_ID] * count + [VISION_END]
        modality += [TEXT] + [IMAGE if kind == "image" else VIDEO] * count + [TEXT]
        grids.append((frames, rows * v.spatial_merge_size, columns * v.spatial_merge_size))
        if kind == "video":
            seconds.append(numbers[3])
    modality = np.asarray(modality, dtype=np.int64)
    layout = vision_layout(grids, merge_size=v.spatial_merge_size, window_size=v.window_size, patch_size=v.patch_size)
    positions = mrope_positions(
        modality,
        grids,
        merge_size=v.spatial_merge_size,
        tokens_per_second=v.tokens_per_second,
        second_per_grid_ts=seconds,
        video_rule=config.video_rule,
    )
    tokens = torch.tensor(tokens, dtype=torch.int32)
    picked = (modality == TEXT) & (rng.random(len(tokens)) < 0.5)
    if supervised is not None:
        picked = np.arange(len(tokens)) >= len(tokens) - supervised
    picked[:1] = False
    pixels = np.random.default_rng([seed, 1])  # the same images for every text
    patches = pixels.standard_normal((sum(int(np.prod(g)) for g in grids), v.patch_values)).astype(np.float32)
    return EncodedSample(
        tokens=tokens,
        labels=torch.where(torch.from_numpy(picked), tokens, -100).int(),
        positions=torch.from_numpy(positions),
        patches=torch.from_numpy(patches),
        grid=torch.tensor(grids, dtype=torch.int32).view(-1, 3),
        vision_slots=torch.from_numpy(np.flatnonzero(modality != TEXT).astype(np.int32)),
        window_order=torch.from_numpy(layout.window_order),
        window_lengths=torch.from_numpy(layout.window_lengths),
        image_lengths=torch.from_numpy(layout.image_lengths),
        vision_positions=torch.from_numpy(layout.positions),
        cost=Cost(len(tokens), len(patches), 0.0),
        id=str(seed),
    )


def hf_inputs(config: ModelConfig, sample: EncodedSample, theirs) -> dict:
    """The arguments of a transformers call on one sample; positions are its own."""
    ids = sample.tokens.long()[None]
    kinds = torch.where(ids == config.image_token_id, 1, torch.where(ids == config.video_token_id, 2, 0)).int()
    inputs: dict = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = []
    videos = []
    at = 0
    pixels: dict[int, list] = {1: [], 2: []}
    order = [int(k) for k in kinds[0][sample.vision_slots.long()]]
    unit = config.vision.spatial_merge_size**2
    for t, h, w in sample.grid.tolist():
        kind = order[at // unit]
        (images if kind == 1 else videos).append((t, h, w))
        pixels[kind].append(sample.patches[at : at + t * h * w])
        at += t * h * w
    grids = {}
    if images:
        grids["image_grid_thw"] = torch.tensor(images)
        inputs["pixel_values"] = torch.cat(pixels[1])
    if videos:
        grids["video_grid_thw"] = torch.tensor(videos)
        inputs["pixel_values_videos"] = torch.cat(pixels[2])
    positions = sample.positions.long()[:, None]
    if grids and config.video_rule == "grid" and not videos:
        positions, _ = theirs.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
    return inputs | grids | {"position_ids": positions, "mm_token_type_ids": kinds}


def hf_forward(config: ModelConfig, sample: EncodedSample, theirs):
    """transformers' final hidden states (L, H) and logits (L, V) of one sample."""
    out = theirs(**hf_inputs(config, sample, theirs), output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0], out.logits[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of b."""
    if not b.numel():
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
