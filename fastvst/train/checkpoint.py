"""Resumable checkpoints: one folder each, either complete or absent.

    <folder>/step-000200/
        state/*.safetensors      weights and moments (8-bit ones with scales); every rank writes its own shards
        rank-00000.json ...      state of each rank (random state, loader position)
        train.json               step, guard, names and shapes of the tensors, optimizer steps of every parameter
        config.json              the resolved configuration
        hf/                      optional: the model as a Hugging Face directory; every rank writes its own files
        COMPLETE                 the marker: every file with its size and checksums, branch and parent (see resume.py)

The tensors are written by torch.distributed.checkpoint (DCP) in its safetensors format. A run can resume on another
number of ranks, bit for bit, and nothing is unpickled (DCP's default format reads a pickled .metadata file). A
checkpoint is written to `.step-000200.partial`, marked, flushed to the disk, and then renamed. No process ever holds
the whole model. `CheckpointWriter` (checkpoint_writer.py) does the writing while training continues.
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
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from fastvst import checksum, jsonl
from fastvst.config import check_at_least
from fastvst.model import checkpoint_files
from fastvst.train import resume
from fastvst.train.distributed import World
from fastvst.train.older_layout import OlderLayout
from fastvst.train.resume import CheckpointError, Lineage, commit, complete, prune, some, verify
from fastvst.train.resume import resolve as resolve
from fastvst.train.snapshot import Contents, HFDirectory, Snapshot, dtype_name, hf_part, take, tensors_of

SUMS = ".sums-{:05d}.json"  # checksums of one rank's files, until they are in the marker
FILE_BYTES = 2**30  # bytes of a rank's shards in one file, about


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written.

    Attributes:
        every: optimizer steps between two checkpoints; 0 = only at the end.
        every_minutes: minutes between two checkpoints, by the clock of rank 0, added to `every`; 0 = off.
        keep: number of complete checkpoints to keep, the newest ones; the best one by evaluation is kept besides.
        hf: also write a Hugging Face directory, in the compute dtype, into every checkpoint.
    """

    every: int = 500
    every_minutes: float = 0.0
    keep: int = 2
    hf: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, keep=self.keep)
        check_at_least(0, every=self.every, every_minutes=self.every_minutes)


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
    hf: HFDirectory | None = None,
    keep: int = 2,
    lineage: Lineage | None = None,
) -> Path:
    """Write `folder/step-XXXXXX` and wait for it; every rank calls it.

    Args:
        step: optimizer steps done so far.
        state, ..., lineage: see `Contents`.

    Raises:
        CheckpointError: on every rank if any rank fails (disk full, ...); older checkpoints are untouched.
    """
    if is_written(folder, step, world, lineage):
        return path_of(folder, step)
    contents = Contents(state, rank_state, config, hf, keep, lineage)
    return write(folder, take(step, model, optimizer, world, contents), world)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def is_written(folder: Path, step: int, world: World, lineage: Lineage | None) -> bool:
    """True on every rank if this branch has a complete checkpoint of this step; every rank calls it."""
    written = world.is_main and lineage is not None and resume.branch_of(path_of(folder, step)) == lineage.branch
    return bool(world.sum(torch.tensor(float(written), device=world.device)).item())


def write(folder: Path, snapshot: Snapshot, world: World, group: dist.ProcessGroup | None = None) -> Path:
    """Write the snapshots of all ranks as one checkpoint; every rank calls it.

    Args:
        group: of all ranks, with a CPU backend; a thread has its own. None = the default group.

    Raises:
        CheckpointError: as `save`.
    """
    target = path_of(folder, snapshot.step)
    partial = folder / f".{target.name}.partial"
    hf = snapshot.hf

    def prepare() -> None:
        for left in folder.glob(".step-*.partial"):  # of a process that was killed
            shutil.rmtree(left)
        (partial / "state").mkdir(parents=True)
        (partial / "hf" if hf is not None else partial).mkdir(exist_ok=True)

    def write_own() -> None:
        names = write_tensors(partial / "state", snapshot.tensors, world, group)
        for name, text in snapshot.texts.items():
            _write_text(partial / name, text)
        if hf is not None:
            hf.write(partial / "hf")
            names += [f"hf/{name}" for name in hf.own_files()]
        # Read back while the pages are still in memory; rank 0 moves the sums into the marker.
        sums = checksum.measure(partial, [*names, *snapshot.texts])
        _write_text(partial / SUMS.format(world.rank), json.dumps(sums))

    def finish() -> None:
        if hf is not None:
            hf.write_rest(partial / "hf")
        commit(partial, target, _all_sums(partial, world), snapshot.lineage)

    _together(world, group, target, partial, prepare if world.is_main else _nothing)
    _together(world, group, target, partial, write_own)
    _together(world, group, target, partial, finish if world.is_main else _nothing)
    if world.is_main:
        prune(folder, snapshot.keep)
    return target


def write_tensors(
    state: Path, tensors: Mapping[str, Tensor], world: World, group: dist.ProcessGroup | None
) -> list[str]:
    """Write this rank's shards into the folder `state`; returns "state/<file>" of each file.

    DCP builds each file in host memory before it writes it, so a rank's shards are divided into files of FILE_BYTES.
    """
    places: dict[str, int] = {}
    total = 0
    for name, tensor in tensors.items():
        places[name] = 1 + total // (FILE_BYTES * world.size)
        total += tensor.numel() * tensor.element_size()
    writer = dcp.HuggingFaceStorageWriter(str(state), fqn_to_index_mapping=places, save_distributed=True)
    # A filter that stays: `catch_warnings` in a thread would change the filters of the others.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=world.size == 1)
    return sorted(f"state/{path.name}" for path in state.glob(f"shard-{world.rank + 1:05d}-*"))


def save_hf(target: Path, model: nn.Module, world: World, hf: HFDirectory) -> Path:
    """Write the model as the Hugging Face directory `target`; every rank calls it and writes its own files.

    They are written next to `target` and then moved into it (see `checkpoint_files.update`).

    Raises:
        CheckpointError: on every rank if any rank fails; an older directory is what it was before.
    """
    parts = target.with_name(f".{target.name}.parts")
    part = hf_part(model, world, hf)

    def prepare() -> None:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)

    def finish() -> None:
        with checkpoint_files.update(target) as partial:
            for file in parts.iterdir():
                shutil.move(file, partial / file.name)
            part.write_rest(partial)
        parts.rmdir()

    _together(world, None, target, parts, prepare if world.is_main else _nothing)
    _together(world, None, target, parts, lambda: part.write(parts))
    _together(world, None, target, parts, finish if world.is_main else _nothing)
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
    tensors, _ = tensors_of(model, optimizer)
    have = state.pop("tensors")
    _check_dtypes(path, state.pop("dtypes", None) or dict.fromkeys(have, "float32"), tensors)
    want = {name: list(tensor.shape) for name, tensor in tensors.items()}
    older = OlderLayout(model, tensors)
    if have not in (want, older.shapes):
        missing = sorted(set(want) - set(have))
        extra = sorted(set(have) - set(want))
        other = sorted(n for n in set(want) & set(have) if want[n] != have[n])
        raise CheckpointError(
            f"{path} does not fit this model and optimizer (was model.preset, optimizer.freeze or optimizer.state "
            f"different?): missing: {some(missing)}; unexpected: {some(extra)}; other shapes: {some(other)}"
        )
    steps = state.pop("optimizer_steps")
    if have == want:
        _read_tensors(path, world, tensors)
    else:
        older.read(lambda parts: _read_tensors(path, world, parts))
        steps = older.steps(steps)
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


def _read_tensors(path: Path, world: World, tensors: dict[str, Tensor]) -> None:
    """Fill tensors by their names in a checkpoint. Raises CheckpointError if its files cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.HuggingFaceStorageReader(str(path / "state"))
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=world.size == 1)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{path}: the tensors in state/ cannot be read: {_reason(error)}") from error


def set_aside(out: Path) -> Path | None:
    """Rename the folder of an earlier run, if any, to `<out>-1`, `<out>-2`, ...; returns the new path."""
    if not (out / "metrics.jsonl").exists() and not (out / "checkpoints").exists():
        return None
    number = next(n for n in itertools.count(1) if not out.with_name(f"{out.name}-{n}").exists())
    moved = out.with_name(f"{out.name}-{number}")
    out.rename(moved)
    print(f"{out} contained an earlier run, which was renamed to {moved}", flush=True)
    return moved


def _all_sums(partial: Path, world: World) -> dict[str, dict[str, Any]]:
    """Size and checksums of every file: those that each rank has left, which are deleted, and those of the rest."""
    sums: dict[str, dict[str, Any]] = {}
    for rank in range(world.size):
        part = partial / SUMS.format(rank)
        sums |= jsonl.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    rest = [p for p in partial.rglob("*") if p.is_file() and p.parent != partial / "state"]
    names = sorted({str(p.relative_to(partial)) for p in rest} - set(sums))
    return sums | checksum.measure(partial, names)


def _check_dtypes(path: Path, have: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint with another optimizer.state: reading would convert it in silence."""
    for name in sorted(set(have) & set(tensors)):
        if have[name] != dtype_name(tensors[name]):
            raise CheckpointError(
                f"{path} does not fit this optimizer: {name} is {have[name]} there and {dtype_name(tensors[name])} "
                "here. Resume with the same optimizer.state, or start a new run from its hf/ with model.path"
            )


def _nothing() -> None:
    """What a rank does while another rank works."""


def _together(
    world: World, group: dist.ProcessGroup | None, target: Path, partial: Path, action: Callable[[], None]
) -> None:
    """Run `action`. If it fails on any rank, delete the partial folder and raise CheckpointError on every rank."""
    error: BaseException | None = None
    try:
        action()
    except (Exception, CheckpointException) as caught:
        error = caught
    failed = torch.tensor([float(error is not None)])  # in host memory: a thread must not wait for the device
    if world.size > 1:
        dist.all_reduce(failed, group=group)
    if not failed.item():
        return
    if world.is_main:
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
        content = jsonl.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in needed if name not in content]
        if not isinstance(content, dict) or missing:
            raise ValueError(f"expected an object with {missing or needed}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not the state of a run: {error}") from error
    return content


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
