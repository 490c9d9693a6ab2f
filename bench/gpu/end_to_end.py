"""Training speed of the whole model on a GPU, random weights, one pack: `python -m bench.gpu.end_to_end --out FILE`.

Forward and backward of Qwen2.5-VL 3B in bf16 on a synthetic pack of images and text. Model FLOPs include the vision
tower and the attention pairs; the share is of 989 TFLOP/s (H100/H200 dense bf16).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from bench.gpu.attention import machine, milliseconds
from fastvst.batch import Cost, EncodedSample, PackedBatch, pack
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.flops import sample_flops
from fastvst.model.positions import IMAGE, TEXT, mrope_positions, vision_layout
from fastvst_kernels import linear_cross_entropy

PEAK = 989e12  # FLOP/s


def sample(config: ModelConfig, grid: tuple[int, int, int], text: int, generator: torch.Generator) -> EncodedSample:
    """One image of `grid` patches followed by `text` supervised tokens."""
    patches = grid[1] * grid[2]
    merged = grid[1] * grid[2] // 4
    tokens = torch.cat(
        [torch.full((merged,), config.image_token_id), torch.randint(0, 1000, (text,), generator=generator)]
    )
    labels = torch.where(tokens == config.image_token_id, -100, tokens)
    modality = np.array([IMAGE] * merged + [TEXT] * text)
    layout = vision_layout([grid])
    return EncodedSample(
        tokens=tokens.int(),
        labels=labels.int(),
        positions=torch.from_numpy(mrope_positions(modality, [grid])),
        patches=torch.randn(patches, 1176, generator=generator),
        grid=torch.tensor([grid], dtype=torch.int32),
        vision_slots=torch.arange(merged, dtype=torch.int32),
        window_order=torch.from_numpy(layout.window_order),
        window_lengths=torch.from_numpy(layout.window_lengths),
        image_lengths=torch.from_numpy(layout.image_lengths),
        vision_positions=torch.from_numpy(layout.positions),
        cost=Cost(len(tokens), patches, sample_flops(config, len(tokens), [grid], text)),
    )


def synthetic(config: ModelConfig, tokens: int) -> PackedBatch:
    """A pack of about `tokens` tokens: samples of 512 merged vision tokens and 512 of text."""
    generator = torch.Generator().manual_seed(0)
    return pack([sample(config, (1, 32, 64), 512, generator) for _ in range(max(1, tokens // 1024))])


def main(argv: list[str] | None = None) -> int:
    """Write tokens/s, model FLOP/s and peak memory; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="3b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--recompute", default="light")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu/end_to_end.py needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    config = ModelConfig.preset(arguments.preset)
    with torch.device("cuda"):
        model = Qwen25VL(config).bfloat16()
    model.recompute = arguments.recompute
    host = synthetic(config, arguments.tokens)
    batch = host.to("cuda")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(batch, head=lambda h, w: linear_cross_entropy(h[batch.loss_rows], w, batch.targets)).backward()

    step()
    torch.cuda.reset_peak_memory_stats()
    seconds = milliseconds(step, rounds=5) * 1e-3
    found = {
        "preset": arguments.preset,
        "tokens": host.num_tokens,
        "patches": host.num_patches,
        "step_s": seconds,
        "tokens_per_s": host.num_tokens / seconds,
        "tflops": host.flops / seconds * 1e-12,
        "share_of_989": host.flops / seconds / PEAK,
        "peak_gb": torch.cuda.max_memory_allocated() * 1e-9,
        "recompute": arguments.recompute,
        "machine": machine(),
        "complete": True,
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
