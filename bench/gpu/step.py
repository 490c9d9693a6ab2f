"""A real training step on one GPU: forward, loss, backward, clipping, AdamW, as `examples/sft.py` runs them.

`python -m bench.gpu.step --out FILE`. Random weights; float32 masters behind FSDP2 over one GPU, bf16 compute; packs of
16,384 tokens, 61 % of them images. Models whose optimizer state does not fit are cut in depth, which the case's name
says; a layer then costs what it costs in the whole model. The profile of one step, sixty operators by GPU time, is
written next to FILE.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import numpy as np
import torch

from bench.gpu.block import Cases, Figures, Options, command
from bench.gpu.ceilings import matmul_tflops
from fastvst.batch import Cost, EncodedSample, PackedBatch, pack
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.flops import sample_flops
from fastvst.model.positions import IMAGE, TEXT, mrope_positions, vision_layout
from fastvst.train.distributed import ParallelConfig, place, start, stop
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from fastvst_kernels import linear_cross_entropy

# Preset, layers of the decoder and of the tower (None: all), recompute policy.
MODELS: tuple[tuple[str, int | None, int | None, str], ...] = (
    ("3b", None, None, "full"),
    ("7b", 6, 8, "light"),
    ("7b", 6, 8, "full"),
    ("3b", 12, 8, "light"),
)
GRID = (1, 40, 64)  # patches of one image: 640 tokens
TEXT_TOKENS = 410


def cut(preset: str, layers: int | None, blocks: int | None) -> ModelConfig:
    """A preset with fewer layers and vision blocks; every fourth block then attends to the whole image."""
    config = ModelConfig.preset(preset)
    if layers is None or blocks is None:
        return config
    vision = dataclasses.replace(config.vision, depth=blocks, fullatt_block_indexes=tuple(range(3, blocks, 4)))
    return dataclasses.replace(config, num_hidden_layers=layers, vision=vision)


def sample(config: ModelConfig, grid: tuple[int, int, int], text: int, generator: torch.Generator) -> EncodedSample:
    """One image of `grid` patches followed by `text` supervised tokens."""
    patches = grid[1] * grid[2]
    merged = patches // 4
    words = torch.randint(0, 1000, (text,), generator=generator)
    tokens = torch.cat([torch.full((merged,), config.image_token_id), words])
    layout = vision_layout([grid])
    return EncodedSample(
        tokens=tokens.int(),
        labels=torch.where(tokens == config.image_token_id, -100, tokens).int(),
        positions=torch.from_numpy(mrope_positions(np.array([IMAGE] * merged + [TEXT] * text), [grid])),
        patches=torch.randn(patches, config.vision.patch_values, generator=generator),
        grid=torch.tensor([grid], dtype=torch.int32),
        vision_slots=torch.arange(merged, dtype=torch.int32),
        window_order=torch.from_numpy(layout.window_order),
        window_lengths=torch.from_numpy(layout.window_lengths),
        image_lengths=torch.from_numpy(layout.image_lengths),
        vision_positions=torch.from_numpy(layout.positions),
        cost=Cost(len(tokens), patches, sample_flops(config, len(tokens), [grid], text)),
    )


def synthetic(config: ModelConfig, tokens: int, grid: tuple[int, int, int], text: int) -> PackedBatch:
    """A pack of samples, at most `tokens` tokens, at least one sample."""
    generator = torch.Generator().manual_seed(0)
    each = grid[1] * grid[2] // 4 + text
    return pack([sample(config, grid, text, generator) for _ in range(max(1, tokens // each))])


class Trainer:
    """A model, its optimizer and one pack on the device."""

    def __init__(self, config: ModelConfig, policy: str, options: Options) -> None:
        self.options = options
        grid, text = options.pick((GRID, TEXT_TOKENS), ((1, 4, 4), 6))
        self.host = synthetic(config, options.pick(16_384, 20), grid, text)
        if options.compile_only:
            with torch.device("meta"):
                self.model = Qwen25VL(config).to(options.dtype)
            self.model.recompute = "light" if policy == "light" else "none"  # "full" launches the same as "none"
            self.batch = self.host.to(options.device)
            return
        self.world = start(ParallelConfig(device=options.device.type), environment={})
        with torch.device("meta"):
            skeleton = Qwen25VL(config)
        self.model = place(Qwen25VL(config), skeleton, self.world)
        self.model.recompute = policy
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, OptimizerConfig())
        self.batch = self.host.to(options.device)

    def forward_backward(self) -> None:
        batch = self.batch
        loss = self.model(batch, head=lambda h, w: linear_cross_entropy(h[batch.loss_rows], w, batch.targets))
        loss.backward()

    def update(self) -> None:
        clip_gradients(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self) -> float:
        """Seconds, after the device has ended its work."""
        if not self.options.dry:
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, name: str) -> Figures:
        """Seconds of a step and of its parts, MFU of the measured ceiling, peak memory, and the profile."""
        for _ in range(2):
            self.forward_backward()
            self.update()
        begin = self.wait()
        self.forward_backward()
        issued = time.perf_counter() - begin
        after_backward = self.wait()
        self.update()
        end = self.wait()
        seconds = after_backward - begin
        tflops = self.host.flops / seconds * 1e-12
        return {
            "tokens": self.host.num_tokens,
            "patches": self.host.num_patches,
            "forward_backward_s": seconds,
            "host_s": issued,
            "update_s": end - after_backward,
            "tokens_per_s": self.host.num_tokens / (end - begin),
            "tflops": tflops,
            "mfu_of_ceiling": tflops / matmul_tflops(self.options),
            "peak_gb": 0.0 if self.options.dry else torch.cuda.max_memory_allocated() * 1e-9,
        } | self.profile(name)

    def profile(self, name: str) -> Figures:
        """The busiest kernels of one step; sixty operators go into a file."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([] if self.options.dry else [ProfilerActivity.CUDA])]
        with profile(activities=activities) as profiler:
            begin = self.wait()
            self.forward_backward()
            self.update()
            wall = self.wait() - begin
        found = profiler.key_averages()
        order = "self_cpu_time_total" if self.options.dry else "self_cuda_time_total"
        file = self.options.out.with_name(f"profile-{name.replace(' ', '-').replace(',', '')}.txt")
        file.write_text(found.table(sort_by=order, row_limit=60, max_name_column_width=90))
        kernels: list[Any] = sorted(
            (e for e in found if str(e.device_type).endswith("CUDA")), key=lambda e: -e.self_device_time_total
        )
        return {
            "profiled_s": wall,
            "gpu_busy_s": sum(e.self_device_time_total for e in kernels) * 1e-6,
            "launches": sum(e.count for e in kernels),
            "top": [f"{e.self_device_time_total * 1e-3:.2f} ms x{e.count} {e.key[:60]}" for e in kernels[:14]],
        }


def cases(options: Options) -> Cases:
    """The whole 3B with full recompute first: it is the step that a user runs."""
    for preset, layers, blocks, policy in options.pick(MODELS, (("tiny", None, None, "light"),)):
        cutting = "" if layers is None else f" {layers} + {blocks} layers"
        name = f"{preset}{cutting}, {policy}"

        def work(
            preset: str = preset,
            layers: int | None = layers,
            blocks: int | None = blocks,
            policy: str = policy,
            name: str = name,
        ) -> Figures:
            if options.compile_only:  # one layer and four blocks launch what all do
                Trainer(cut(preset, 1, 4), policy, options).forward_backward()
                return {}
            trainer = Trainer(cut(preset, layers, blocks), policy, options)
            try:
                return trainer.measure(name)
            finally:
                stop(trainer.world)  # the next case makes a process group of its own
                del trainer
                if not options.dry:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()

        yield name, work


if __name__ == "__main__":
    sys.exit(command("step", cases, __doc__))
