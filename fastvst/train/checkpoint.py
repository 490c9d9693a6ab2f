"""Resumable checkpoints: one folder each, either complete or absent.

    <folder>/step-000200/
        state/*.safetensors      weights and both Adam moments; every rank writes its own shards
        rank-00000.json ...      state of each rank (random state, loader position)
        train.json               step, guard, names and shapes of the tensors, optimizer steps of every parameter
        config.json              the resolved configuration
        hf/                      optional: the model as a Hugging Face directory
        COMPLETE                 the marker: every file with its size and checksums, branch and parent (see resume.py)

The tensors are written by torch.distributed.checkpoint (DCP) in its safetensors format. A run can resume on another
number of ranks, bit for bit, and nothing is unpickled (DCP's default format reads a pickled .metadata file). A
checkpoint is written to `.step-000200.partial`, marked, flushed to the disk, and then renamed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from fastvst import checksum
from fastvst.train import resume
from fastvst.train.distributed import World
from fastvst.train.resume import CheckpointError, Lineage, commit, complete, prune, some, verify
from fastvst.train.resume import resolve as resolve

SUMS = ".sums-{:05d}.json"  # checksums of one rank's files, until they are in the marker
WriteHF = Callable[[Path, dict[str, Tensor]], None]


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written.

    Attributes:
        every: optimizer steps between two checkpoints; 0 = only at the end.
        keep: number of complete checkpoints to keep, the newest ones.
        hf: also write a Hugging Face directory, in the compute dtype, into every checkpoint.
    """

    every: int = 500
    keep: int = 2
    hf: bool = True

    def __post_init__(self) -> None:
        if self.keep < 1 or self.every < 0:
            raise ValueError(f"keep must be at least 1 and every at least 0; got {self.keep} and {self.every}")


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    config: Mapping[str, Any],
    write_hf: WriteHF | None = None,
    hf_dtype: torch.dtype = torch.float32,
    keep: int = 2,
    lineage: Lineage | None = None,
) -> Path:
    """Write `folder/step-XXXXXX`; every rank calls it. A checkpoint of another branch with this name is renamed.

    Args:
        step: optimizer steps done so far.
        state: JSON-able state that all ranks share; the one of rank 0 is written.
        rank_state: JSON-able state of this rank.
        write_hf: called on rank 0 as write_hf(directory, full state dict on the CPU in `hf_dtype`); None = no `hf/`.
        keep: complete checkpoints to keep; those written earlier are deleted after this one has been written.
        lineage: recorded in the marker; a complete checkpoint of this step and branch is not written again.

    Raises:
        CheckpointError: on every rank if any rank fails (disk full, ...); older checkpoints are untouched.
    """
    target = folder / f"step-{step:06d}"
    written = world.is_main and lineage is not None and resume.branch_of(target) == lineage.branch
    if world.sum(torch.tensor(float(written), device=world.device)).item():
        return target
    partial = folder / f".{target.name}.partial"
    tensors, steps = _tensors(model, optimizer)

    def prepare() -> None:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)

    def write_tensors() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns that there is a single process
            writer = dcp.HuggingFaceStorageWriter(str(partial / "state"), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)
        rng = torch.get_rng_state().numpy().tobytes().hex()
        _write_json(partial / f"rank-{world.rank:05d}.json", {"rng": rng, **rank_state})
        own = [f"state/{p.name}" for p in sorted((partial / "state").glob(f"shard-{world.rank + 1:05d}-*"))]
        # Read back while the pages are still in memory; rank 0 moves the sums into the marker.
        sums = checksum.measure(partial, [*own, f"rank-{world.rank:05d}.json"])
        _write_json(partial / SUMS.format(world.rank), sums)

    def write_rest() -> None:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        _write_json(partial / "config.json", config)
        _write_json(
            partial / "train.json",
            {"step": step, "world_size": world.size, "tensors": shapes, "optimizer_steps": steps, **state},
        )
        if write_hf is not None:
            write_hf(partial / "hf", full)
        commit(partial, target, _all_sums(partial, world), lineage)

    _together(world, target, partial, prepare)
    _together(world, target, partial, write_tensors)
    full = gather(model, world, hf_dtype) if write_hf is not None else {}
    _together(world, target, partial, write_rest if world.is_main else lambda: None)
    if world.is_main:
        prune(folder, keep)
    return target


def save_hf(target: Path, model: nn.Module, world: World, write_hf: WriteHF, dtype: torch.dtype) -> Path:
    """Gather the model; rank 0 writes it as the Hugging Face directory `target`. Every rank calls it.

    `write_hf` must leave an older directory intact when it fails, as `fastvst.model.weights.save` does.

    Raises:
        CheckpointError: as `save`.
    """
    full = gather(model, world, dtype)
    _together(world, target, None, (lambda: write_hf(target, full)) if world.is_main else lambda: None)
    return target


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, *, verified: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint into the model and the optimizer, in place, on any number of ranks; every rank calls it.

    The CPU random state is restored if the number of ranks is unchanged.

    Args:
        verified: `resolve` has just compared the files with their checksums.

    Returns:
        (`state` with the keys step and world_size, `rank_state` of this rank, or of rank 0 if this rank did not exist).

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or belongs to another model or other frozen parts.
    """
    if not verified:
        verify(path, world)
    state = _read_json(path / "train.json", "step", "world_size", "tensors", "optimizer_steps")
    own = path / f"rank-{world.rank:05d}.json"
    rank_state = _read_json(own if own.exists() else path / "rank-00000.json", "rng")
    tensors, _ = _tensors(model, optimizer)
    have = state.pop("tensors")
    want = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if have != want:
        missing = sorted(set(want) - set(have))
        extra = sorted(set(have) - set(want))
        other = sorted(n for n in set(want) & set(have) if want[n] != have[n])
        raise CheckpointError(
            f"{path} does not fit this model and optimizer (was model.preset or optimizer.freeze different?): "
            f"missing: {some(missing)}; unexpected: {some(extra)}; other shapes: {some(other)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.HuggingFaceStorageReader(str(path / "state"))
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=world.size == 1)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{path}: the tensors in state/ cannot be read: {_reason(error)}") from error
    steps = state.pop("optimizer_steps")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter]["step"].fill_(steps[name])
    rng = rank_state.pop("rng")
    if state["world_size"] == world.size:
        try:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(rng), dtype=torch.uint8))
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{own} has no valid random state: {error}") from error
    return state, rank_state


def set_aside(out: Path) -> Path | None:
    """Rename the folder of an earlier run, if any, to `<out>-1`, `<out>-2`, ...; returns the new path."""
    if not (out / "metrics.jsonl").exists() and not (out / "checkpoints").exists():
        return None
    number = next(n for n in itertools.count(1) if not out.with_name(f"{out.name}-{n}").exists())
    moved = out.with_name(f"{out.name}-{number}")
    out.rename(moved)
    print(f"{out} contained an earlier run, which was renamed to {moved}", flush=True)
    return moved


def gather(model: nn.Module, world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    """Full tensors on the CPU of rank 0 in `dtype` (an empty dict elsewhere), one tensor on the device at a time."""
    full: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            full[name] = whole.detach().to("cpu", dtype)
    return full


def _all_sums(partial: Path, world: World) -> dict[str, dict[str, Any]]:
    """Size and checksums of every file: those that each rank has left, which are deleted, and those of the rest."""
    sums: dict[str, dict[str, Any]] = {}
    for rank in range(world.size):
        part = partial / SUMS.format(rank)
        sums |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    rest = [p for p in partial.rglob("*") if p.is_file() and p.parent != partial / "state"]
    names = sorted({str(p.relative_to(partial)) for p in rest} - set(sums))
    return sums | checksum.measure(partial, names)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(all tensors to save, optimizer steps by parameter). Creates Adam's moments where they do not exist yet."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    steps: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:  # as fused AdamW creates them in the first step of a parameter
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors[f"exp_avg.{name}"] = state["exp_avg"].detach()
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"].detach()
        steps[name] = int(state["step"])
    return tensors, steps


def _together(world: World, target: Path, partial: Path | None, action: Callable[[], None]) -> None:
    """Run `action`. If it fails on any rank, delete the partial folder and raise CheckpointError on every rank."""
    error: BaseException | None = None
    try:
        action()
    except (Exception, CheckpointException) as caught:
        error = caught
    failed = world.sum(torch.tensor([float(error is not None)], device=world.device))
    if not failed.item():
        return
    if world.is_main and partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    why = _reason(error) if error is not None else "another rank failed; see its message"
    try:
        free = f"{shutil.disk_usage(target.parent).free / 2**30:.2f} GiB are free there"
    except OSError:
        free = "the folder cannot be read"
    raise CheckpointError(
        f"rank {world.rank}: could not write {target}: {why}; {free}. Complete checkpoints are untouched: "
        f"{some([p.name for p in complete(target.parent)])}. Free disk space or pass another --out, then --resume"
    ) from error


def _reason(error: BaseException) -> str:
    """The error without DCP's wrapper, which holds one exception for each rank."""
    if isinstance(error, CheckpointException):
        parts = [f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(error.failures.items())]
        return "; ".join(parts)
    return f"{type(error).__name__}: {error}"


def _read_json(path: Path, *needed: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint, which has at least the keys `needed`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in needed if name not in content]
        if not isinstance(content, dict) or missing:
            raise ValueError(f"expected an object with {missing or needed}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not the state of a run: {error}") from error
    return content


def _write_json(path: Path, values: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
