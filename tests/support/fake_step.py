"""Whole training steps of published sizes on tensors without memory, with FSDP2 over fake ranks, counted by LiveBytes.

Run as a program, because it registers a device and a process group for the whole process:

    python tests/support/fake_step.py '[{"size": "7b", ...}]'     # a JSON list of `Step`s; prints bytes as JSON

The device is torch's Python backend ("privateuse1") under another name: autograd and FSDP2 treat it as an accelerator,
and fake tensors on it have shapes, dtypes and storages without memory. Collectives are those of torch's fake process
group. The Triton kernels of the LM head do not run on it, so what they allocate stands in for them: nothing but their
small outputs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration

from fastvst.batch import PackedBatch
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.live_bytes import LiveBytes
from fastvst.train import distributed
from fastvst.train.distributed import World
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, freeze, init_state, make_optimizer
from fastvst_kernels import linear_cross_entropy
from fastvst_kernels.lm_head import chunked
from fastvst_kernels.lm_head.cross_entropy import cross_entropy_forward
from fastvst_kernels.lm_head.types import Coefficients

DEVICE = "fakegpu"


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        ranks: that share the model; one process can have fake groups of one size only.
        layers, blocks: of the decoder and of the tower; 0 = as published.
    """

    size: str
    ranks: int
    tokens: int
    patches: int
    targets: int
    recompute: Any
    state: str = "fp32"
    frozen: tuple[str, ...] = ()
    layers: int = 0
    blocks: int = 0

    def config(self) -> ModelConfig:
        config = ModelConfig.preset(self.size)
        if self.layers:
            config = dataclasses.replace(config, num_hidden_layers=self.layers)
        if self.blocks:
            vision = dataclasses.replace(config.vision, depth=self.blocks, fullatt_block_indexes=(1,))
            config = dataclasses.replace(config, vision=vision)
        return config


def make_device() -> None:
    """Register the device, with streams that do nothing."""
    module = types.ModuleType(DEVICE)

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *_: Any) -> Event:
            return self

        def wait(self, *_: Any) -> None: ...

    given: dict[str, Any] = {
        "Stream": torch.cpu.Stream,
        "Event": Event,
        "current_stream": torch.cpu.current_stream,
        "stream": torch.cpu.stream,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda _: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
    }
    for name, value in given.items():
        setattr(module, name, value)
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=module)


def fake_batch(step: Step) -> PackedBatch:
    """A pack of four sequences and images of at most 4,096 patches; its integers are zeros."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)

    frames = max(1, -(-step.patches // 4096))
    wide = torch.int64
    return PackedBatch(
        tokens=zeros(step.tokens, dtype=wide),
        labels=zeros(step.tokens, dtype=wide),
        loss_weights=zeros(step.tokens, dtype=torch.float32),
        loss_rows=zeros(step.targets, dtype=wide),
        targets=zeros(step.targets, dtype=wide),
        target_weights=zeros(step.targets, dtype=torch.float32),
        positions=zeros(3, step.tokens),
        cu_seqlens=zeros(5),
        origins=zeros(4),
        groups=None,
        vision_slots=zeros(step.patches // 4, dtype=wide),
        patches=zeros(step.patches, 1176, dtype=torch.uint8),
        vision_positions=zeros(step.patches, 2),
        window_order=zeros(step.patches // 4, dtype=wide),
        cu_windows=zeros(max(1, -(-step.patches // 64)) + 1),
        cu_images=zeros(frames + 1),
        grid=zeros(frames, 3),
        pixel_stats=zeros(2, 3, dtype=torch.float32),
        max_seqlen=-(-step.tokens // 4),
        max_window=64,
        max_image=4096,
        sample_ids=("a",) * 4,
    )


def no_statistics(buffer: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of the kernel that reduces logits: its output."""
    return buffer.new_empty(5, buffer.shape[0])


def same_memory(buffer: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of the kernel that turns logits into their gradient: bfloat16 values in the memory of the logits."""
    return buffer.view(torch.bfloat16)[:, : buffer.shape[1]]


def all_rows(coefficients: Coefficients) -> Tensor:
    """On a GPU no row is left out."""
    return torch.empty(1 << 40, device="meta")


def measure(step: Step) -> dict[str, int]:
    """Bytes of the states, and the peaks of the forward pass with the loss, the backward pass and the clipping."""
    config = step.config()
    live = LiveBytes(DEVICE)
    mesh = init_device_mesh(DEVICE, (step.ranks,), mesh_dim_names=("shard",))
    world = World(0, step.ranks, 0, step.ranks, torch.device(DEVICE, 0), torch.bfloat16, mesh, None, "localhost")
    options = OptimizerConfig(state=step.state, freeze=step.frozen)  # type: ignore[arg-type]
    chunk = chunked.default_chunk_rows(config.vocab_size, "cuda")
    with torch.device("meta"):
        model = Qwen25VL(config).to(options.weights)
    with FakeTensorMode(allow_non_fake_inputs=True):
        freeze(model, step.frozen)
        distributed.shard(model, world)
        model.to_empty(device=world.device)
        model.vision_on_every_rank = True
        model.recompute = step.recompute
        optimizer = make_optimizer(model, options)
        for parameter in model.parameters():
            live.see(parameter)
            if parameter.requires_grad:  # from an earlier micro-batch
                parameter.grad = torch.zeros_like(parameter)
                init_state(optimizer, parameter)
                moments = [value for name, value in optimizer.state[parameter].items() if name != "step"]
                live.see(parameter.grad, *moments)
        with live:
            found = {"states": live.reset()}
            batch = fake_batch(step)

            def head(hidden: Tensor, weight: Tensor) -> Tensor:
                rows = hidden[batch.loss_rows]
                given = (None, batch.targets, batch.target_weights, None, 1.0, None, chunk, None, 0)
                with torch.no_grad():  # what the operator does inside: fake tensors only see its outputs
                    trained = weight.requires_grad
                    cross_entropy_forward(rows, weight, *given, config.vocab_size, 0.0, 0.0, [True, trained, False])
                return linear_cross_entropy(
                    rows, weight, batch.targets, row_weights=batch.target_weights, chunk_rows=chunk
                )

            loss = model(batch, head=head)
            found["forward"] = live.peak
            live.reset()
            loss.backward()
            found["backward"] = live.peak
            live.reset()
            clip_gradients(model.parameters(), 1.0)
            found["clip"] = live.peak
    return found


def main() -> None:
    steps = [Step(**values) for values in json.loads(sys.argv[1])]
    make_device()
    dist.init_process_group(f"cpu:fake,{DEVICE}:fake", rank=0, world_size=steps[0].ranks, store=FakeStore())
    with (
        mock.patch.object(chunked, "partial_statistics_", no_statistics),
        mock.patch.object(chunked, "row_gradient_plain_", same_memory),
        mock.patch.object(Coefficients, "nonzero_rows", all_rows),
    ):
        print(json.dumps([measure(step) for step in steps]))


if __name__ == "__main__":
    main()
