"""Counts the bytes of live tensors while code runs, also on tensors without memory (fake and meta tensors).

torch's own counters need a device with memory. This one watches the operators: the storage of every tensor that an
operator takes or returns counts from then on until it is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOLERANCE = 1.001  # a new peak is looked at only if it is this much higher, because a look visits every storage


class _Entry:
    """One storage: a weak reference, and its bytes when it was last seen."""

    __slots__ = ("bytes", "reference")

    def __init__(self, storage: torch.UntypedStorage, gone: Callable[[Any], None]) -> None:
        self.reference = weakref.ref(storage, gone)
        self.bytes = 0


class LiveBytes(TorchDispatchMode):
    """A context in which the live bytes are counted.

    Of a DTensor the local shard counts. A storage that FSDP2 frees by resizing it counts until it is seen again or
    until a new peak is looked at, so the peak is exact and `now` is an upper bound.

    Attributes:
        now: bytes that are live.
        peak: the largest number of live bytes since the start, or since `reset`.
        where: the operator at the peak.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        """
        Args:
            device: count only tensors on this type of device; None = all.
        """
        super().__init__()
        self.device = None if device is None else torch.device(device).type
        self.now = 0
        self.peak = 0
        self.where = ""
        self._entries: dict[int, _Entry] = {}

    def see(self, *tensors: Tensor) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._see(tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def reset(self) -> int:
        """Start a new peak from the bytes that are live, and return them."""
        self._look()
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operator on the local shards comes next
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self.now > TOLERANCE * self.peak:
            self._look()
            if self.now > self.peak:
                self.peak = self.now
                self.where = str(func)
        return result

    def _see(self, tensor: Tensor) -> None:
        if self.device is not None and tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None or entry.reference() is not storage:
            self._drop(key, entry)
            entry = self._entries[key] = _Entry(storage, lambda _: self._drop(key, entry))
        self.now += storage.nbytes() - entry.bytes
        entry.bytes = storage.nbytes()

    def _drop(self, key: int, entry: _Entry | None) -> None:
        if entry is not None and self._entries.get(key) is entry:
            del self._entries[key]
            self.now -= entry.bytes

    def _look(self) -> None:
        """Read the size of every storage again."""
        for entry in self._entries.values():
            storage = entry.reference()
            entry.bytes = 0 if storage is None else storage.nbytes()
        self.now = sum(entry.bytes for entry in self._entries.values())
