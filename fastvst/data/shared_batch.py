"""SharedBatch: a pack on its way from a worker to the trainer, in one anonymous file of memory.

torch's own way is a file in /dev/shm for every tensor. Containers give that folder 64 MB by default, and a pack of
16,384 vision tokens has 77 MB of pixels. An anonymous file (memfd_create(2)) is counted as memory of the process, has
no name, and is gone when both sides have closed it, also after SIGKILL.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor

from fastvst.batch import PackedBatch

ALIGNED = 64  # bytes; every tensor begins at a cache line
Place = tuple[int, torch.dtype, tuple[int, ...]]  # first byte, dtype and shape of a tensor


class SharedBatch:
    """A PackedBatch that can be pickled from a process to another one; `open` gives it back without a copy."""

    def __init__(self, batch: PackedBatch) -> None:
        """Copy the tensors of `batch` into shared memory; raises OSError if there is none left."""
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        self.places: dict[str, Place] = {}
        at = 0
        for name, value in tensors.items():
            self.places[name] = (at, value.dtype, tuple(value.shape))
            at += -(-value.nbytes // ALIGNED) * ALIGNED
        self.rest = {name: value for name, value in vars(batch).items() if name not in tensors}
        self.size = max(at, 1)
        self.file = _anonymous_file(self.size)
        memory = mmap.mmap(self.file.fileno(), self.size)
        for name, value in tensors.items():
            if value.numel():
                _view(memory, self.places[name]).copy_(value)

    def __reduce__(self) -> tuple[Any, ...]:
        descriptor = reduction.DupFd(self.file.fileno())
        return _open, (descriptor, self.size, self.places, self.rest)


def _open(descriptor: Any, size: int, places: dict[str, Place], rest: dict[str, Any]) -> PackedBatch:
    """The batch in the process that received it. Its tensors are the shared memory, which lives as long as they do."""
    number = descriptor.detach()
    try:
        memory = mmap.mmap(number, size)
    finally:
        os.close(number)
    tensors: dict[str, Any] = {name: _view(memory, place) for name, place in places.items()}
    return PackedBatch(**rest, **tensors)


def _view(memory: mmap.mmap, place: Place) -> Tensor:
    at, dtype, shape = place
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=at).view(shape)


def _anonymous_file(size: int) -> Any:
    """An open file without a name, with room for `size` bytes."""
    if sys.platform == "linux":
        file = os.fdopen(os.memfd_create("fastvst-pack"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the SharedBatch
    os.truncate(file.fileno(), size)
    return file
