"""What one checkpoint holds: this rank's share, fixed at one step, so that it can be written while training continues.

The copy is made by torch.distributed.checkpoint's stager into host memory that is kept for the next checkpoint: pinned
if there is a GPU, so that the copy runs at the speed of the bus. Each rank needs the size of its shards (weights and
both moments: 12 bytes a parameter, 6 with optimizer.state bf16, 4 with 8bit; divided by the ranks of one replica) and,
with `hf`, of its share of the published weights (2 bytes a parameter in bfloat16, divided by all ranks). 7B (8.3e9
parameters) in float32: 99.5 + 16.6 GB a node.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from fastvst.model import weights
from fastvst.model.published import layout_of, publish
from fastvst.train.distributed import World
from fastvst.train.optimizer import init_state
from fastvst.train.resume import Lineage


@dataclass(frozen=True)
class HFDirectory:
    """How the model becomes a Hugging Face directory.

    Attributes:
        dtype: of its tensors.
        write_settings: called on rank 0 with the directory, after its weights; writes config.json and so on.
    """

    dtype: torch.dtype
    write_settings: Callable[[Path], object]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds besides the tensors.

    Attributes:
        state: JSON-able state that all ranks share; the one of rank 0 is written.
        rank_state: JSON-able state of this rank.
        config: JSON-able configuration of the run.
        hf: how to write `hf/`; None = no such directory.
        keep: complete checkpoints to keep; those written earlier are deleted after this one has been written.
        lineage: recorded in the marker; a complete checkpoint of this step and branch is not written again. A
            checkpoint of another branch with this name is renamed.
    """

    state: Mapping[str, Any]
    rank_state: Mapping[str, Any]
    config: Mapping[str, Any]
    hf: HFDirectory | None = None
    keep: int = 2
    lineage: Lineage | None = None


@dataclass(frozen=True)
class HFPart:
    """This rank's files of a Hugging Face directory, in host memory.

    Attributes:
        shards: the files of all ranks.
        sizes: bytes of every tensor of the model.
        tensors: those of this rank's files, whole.
    """

    rank: int
    shards: tuple[weights.Shard, ...]
    sizes: dict[str, int]
    tensors: dict[str, Tensor]
    write_settings: Callable[[Path], object]

    def own_files(self) -> list[str]:
        return [shard.file for shard in self.shards if shard.part == self.rank]

    def write(self, directory: Path) -> None:
        """Write this rank's files."""
        weights.write_shards(directory, [s for s in self.shards if s.part == self.rank], self.tensors)

    def write_rest(self, directory: Path) -> None:
        """Write what only one rank writes, after the files of all ranks."""
        weights.write_index(directory, self.shards, self.sizes)
        self.write_settings(directory)


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of one checkpoint.

    Attributes:
        step: optimizer steps done.
        tensors: "model.x", "exp_avg.x" and so on of the optimizer's state -> the tensor, or this rank's shard of it (a
            DTensor).
        texts: file name -> its JSON; rank 0 also has the files that are common to all ranks.
        keep: complete checkpoints to keep.
    """

    step: int
    tensors: dict[str, Tensor]
    texts: dict[str, str]
    hf: HFPart | None
    keep: int
    lineage: Lineage | None


def take(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    contents: Contents,
    stager: DefaultStager | None = None,
) -> Snapshot:
    """The snapshot of this moment; every rank calls it.

    Args:
        stager: copies the tensors; without one they are those of the model, which must not change until they are
            written.
    """
    tensors, steps = tensors_of(model, optimizer)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    rng = torch.get_rng_state().numpy().tobytes().hex()
    texts = {f"rank-{world.rank:05d}.json": json.dumps({"rng": rng, **contents.rank_state})}
    if world.is_main:
        dtypes = {name: dtype_name(tensor) for name, tensor in tensors.items()}
        common = {"step": step, "world_size": world.size, "tensors": shapes, "dtypes": dtypes, "optimizer_steps": steps}
        texts |= {"config.json": json.dumps(contents.config), "train.json": json.dumps({**common, **contents.state})}
    part = hf_part(model, world, contents.hf) if contents.hf is not None else None
    copies = tensors if stager is None else cast(dict[str, Tensor], stager.stage(tensors))
    return Snapshot(step, copies, texts, part, contents.keep, contents.lineage)


def make_stager(device: torch.device) -> DefaultStager:
    """Copies to host memory that it keeps: to pinned memory, without waiting for each tensor, if there is a GPU."""
    on_gpu = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
        )
    )


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(all tensors to save, optimizer steps by parameter). Creates Adam's moments where they do not exist yet."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    steps: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        init_state(optimizer, parameter)
        state = optimizer.state[parameter]
        tensors |= {f"{kind}.{name}": value.detach() for kind, value in state.items() if kind != "step"}
        steps[name] = int(state["step"])
    return tensors, steps


def dtype_name(tensor: Tensor) -> str:
    """As in train.json: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def hf_part(model: nn.Module, world: World, hf: HFDirectory) -> HFPart:
    """This rank's whole tensors, gathered one at a time on the device; every rank calls it.

    Tensors are cast before they are gathered, so that bfloat16 travels and not float32.
    """
    layout = layout_of(model)
    shapes = {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters()}
    sizes = {name: tensor.numel() * hf.dtype.itemsize for name, tensor in publish(shapes, layout).items()}
    shards = weights.plan_shards(sizes, parts=world.size)
    own = {name for shard in shards if shard.part == world.rank for name in shard.names}
    tensors = {}
    for name, parameter in model.named_parameters():
        whole = parameter.detach().to(hf.dtype)
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        for published, tensor in publish({name: whole}, layout).items():
            if published in own:
                tensors[published] = torch.empty(tensor.shape, dtype=hf.dtype).copy_(tensor)
    return HFPart(world.rank, tuple(shards), sizes, tensors, hf.write_settings)
