"""Writes checkpoints in a thread while training continues, one at a time.

`save` copies this rank's share to host memory (see snapshot.py) and starts the thread; training waits for that copy
alone. The threads of the ranks agree over a process group of their own, so their messages never mix with those of the
steps. A checkpoint counts when it is renamed; until then the older ones are untouched, whatever ends the process.
"""

from __future__ import annotations

import datetime
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fastvst.train import checkpoint
from fastvst.train.checkpoint import CheckpointError
from fastvst.train.distributed import World
from fastvst.train.snapshot import Contents, HFDirectory, Snapshot, make_stager, take, tensors_of

SLOWEST = datetime.timedelta(hours=2)  # that a rank's writer waits for the slowest one before it gives up
WORTH_SAYING = 1.0  # seconds that training waits for the last checkpoint before it is said
MARGIN = 0.8  # share of the free host memory that the copies of a node may take
GIB = 2**30


class CheckpointWriter:
    """The checkpoints of one run. Every rank has one, and calls `save` and `join` at the same steps.

    Args:
        folder: of the checkpoints.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self.world = world
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST) if world.size > 1 else None
        self._stager = make_stager(world.device)
        self._in_background: bool | None = None  # decided at the first checkpoint
        self._thread: threading.Thread | None = None
        self._name = ""
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, contents: Contents) -> None:
        """Copy the state of this moment and start to write it.

        If the last checkpoint is still being written, this waits for it first.
        """
        began = time.perf_counter()
        waits = self.busy
        if self._thread is not None:
            self._thread.join()
        self.report()
        waited = time.perf_counter() - began
        if waits and waited > WORTH_SAYING:
            self.world.say(
                f"step {step} waited {waited:.0f} s for the disk: the last checkpoint was still being written; "
                "checkpoint.every or checkpoint.every_minutes is too small for this disk"
            )
        if checkpoint.is_written(self.folder, step, self.world, contents.lineage):
            return
        if self._in_background is None:
            self._in_background = self._fits(model, optimizer, contents.hf)
        stager = self._stager if self._in_background else None
        snapshot = take(step, model, optimizer, self.world, contents, stager)
        self._name = checkpoint.path_of(self.folder, step).name
        # A daemon: a run that ends with an error does not wait for the disk.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._in_background:
            self._thread.join()

    def report(self) -> None:
        """Say how the last write went, if it has ended; a failure does not end the run. Never waits."""
        if self._thread is None or self._thread.is_alive():
            return
        try:
            self.join()
        except CheckpointError as error:
            if self.world.is_main or error.__cause__ is not None:  # the ranks whose own error it is
                print(f"{error}. Training continues; the next checkpoint is tried again", file=sys.stderr, flush=True)

    def join(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: the last write failed, and `report` has not said so yet; on every rank.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error
        self.world.say(f"saved {self.folder / self._name}")

    def leave(self, seconds: float) -> None:
        """Wait at most so long for the write in progress, because the run ends with an error; say if it is lost."""
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.world.say(
                f"{self._name} was still being written and is given up; complete checkpoints: "
                f"{', '.join(path.name for path in checkpoint.complete(self.folder)) or 'none'}"
            )
        else:
            self.report()

    def _write(self, snapshot: Snapshot) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a new thread starts with GPU 0, and DCP asks for its stream
        try:
            checkpoint.write(self.folder, snapshot, self.world, self._group)
        except BaseException as error:
            self._error = error

    def _fits(self, model: nn.Module, optimizer: torch.optim.Optimizer, hf: HFDirectory | None) -> bool:
        """True if the copies of all ranks of every node fit its free host memory; said once. Every rank calls it."""
        own = 0
        for tensor in tensors_of(model, optimizer)[0].values():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            own += local.untyped_storage().nbytes()
        if hf is not None:
            own += sum(t.numel() for t in model.state_dict().values()) * hf.dtype.itemsize // self.world.size
        free = free_host_memory()
        lacks = free is not None and own * self.world.local_size > MARGIN * free
        need = f"{own / GIB:.2f} GiB of host memory on each rank"
        if self.world.sum(torch.tensor(float(lacks), device=self.world.device)).item():
            self.world.say(f"checkpoints: copies would need {need}, which is not free; training waits for each one")
            return False
        self.world.say(f"checkpoints: written while training continues, from copies of {need}")
        return True


def free_host_memory() -> int | None:
    """Bytes that processes can still allocate on this machine, or in this container; None if it is not known."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(int((group / "memory.max").read_text()) - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no limit ("max"), or no cgroup
        pass
    return min(found, default=None)
