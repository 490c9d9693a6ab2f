"""Floating-point operations of training, counted from shapes (a multiply-add is 2), the vision tower included.

Forward + backward is 3 x forward. Norms, activations, rotary embeddings and softmax do not count, nor do operations
that a recompute policy repeats: divided by time this is model FLOP/s, not hardware FLOP/s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastvst.model.config import ModelConfig
from fastvst.model.positions import frame_windows, window_side

TRAINING = 3.0


def vision_flops(config: ModelConfig, frame_lengths: Iterable[int], window_lengths: Iterable[int]) -> float:
    """Forward operations of the vision tower and merger.

    Args:
        frame_lengths: patches in each frame.
        window_lengths: patches in each window.
    """
    v = config.vision
    frames = [int(n) for n in frame_lengths]
    patches = float(sum(frames))
    of_frames = float(sum(n * n for n in frames))
    of_windows = float(sum(int(n) ** 2 for n in window_lengths))
    merged = v.hidden_size * v.spatial_merge_size**2
    block = 2 * v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size)
    full = len(set(v.fullatt_block_indexes))
    attention = 4 * v.hidden_size * (full * of_frames + (v.depth - full) * of_windows)
    merger = 2 * merged * (merged + v.out_hidden_size) * patches / v.spatial_merge_size**2
    return patches * (2 * v.patch_values * v.hidden_size + v.depth * block) + attention + merger


def decoder_flops(config: ModelConfig, seqlens: Iterable[int], prompt_lengths: Iterable[int] | None = None) -> float:
    """Forward operations of the decoder's layers; causal attention over L tokens has L (L + 1) / 2 pairs.

    Args:
        seqlens: tokens in each sequence of the row.
        prompt_lengths: for each sequence the length of the shared prompt that it attends to (0: none).
    """
    lengths = [int(n) for n in seqlens]
    prompts = [0] * len(lengths) if prompt_lengths is None else [int(n) for n in prompt_lengths]
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = 2 * config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    pairs = float(sum(n * (n + 1) // 2 + n * p for n, p in zip(lengths, prompts, strict=True)))
    return config.num_hidden_layers * (float(sum(lengths)) * layer + 4 * q * pairs)


def light_flops(config: ModelConfig, tower: str) -> float:
    """Forward operations that recompute policy "light" repeats in one block, for a token or a patch.

    The output projection; in the vision tower also gate and up (`fastvst.model.recompute`).
    """
    if tower == "decoder":
        return 2.0 * config.hidden_size * config.num_attention_heads * config.head_dim
    v = config.vision
    return 2.0 * v.hidden_size * (v.hidden_size + 2 * v.intermediate_size)


def head_flops(config: ModelConfig, num_targets: int) -> float:
    """Forward operations of the LM head on the supervised rows."""
    return 2.0 * num_targets * config.hidden_size * config.vocab_size


def pack_flops(
    config: ModelConfig,
    seqlens: Iterable[int],
    frame_lengths: Iterable[int],
    window_lengths: Iterable[int],
    num_targets: int,
) -> dict[str, float]:
    """Training FLOPs of a pack by part: {"vision", "decoder", "head"}."""
    return {
        "vision": TRAINING * vision_flops(config, frame_lengths, window_lengths),
        "decoder": TRAINING * decoder_flops(config, seqlens),
        "head": TRAINING * head_flops(config, num_targets),
    }


def sample_flops(
    config: ModelConfig, num_tokens: int, grids: Iterable[Sequence[int]], num_targets: int | None = None
) -> float:
    """Training FLOPs (forward + backward) of one sample.

    Args:
        num_tokens: tokens of the sequence, vision tokens included.
        grids: (t, h, w) patch grids of its images and videos.
        num_targets: supervised tokens; default all of them, for a packer that does not have the labels yet.
    """
    v = config.vision
    side = window_side(v.spatial_merge_size, v.window_size, v.patch_size)
    frames: list[int] = []
    windows: list[int] = []
    for t, h, w in grids:
        frames += [h * w] * t
        windows += frame_windows(h, w, v.spatial_merge_size, side) * t
    targets = num_tokens if num_targets is None else num_targets
    return sum(pack_flops(config, [num_tokens], frames, windows, targets).values())
