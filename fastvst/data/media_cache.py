"""Keys of images and videos, and the bounded caches of a process that use them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastvst.data.file_range import FileRange, VideoFrame

Value = TypeVar("Value")


def media_key(source: Any) -> Hashable | None:
    """A key that changes with the content: path, size and time of a file or of a range in it, or a hash of bytes; None
    for an image object and for a range of a file without a name, whose space is used again.

    A list of files has the key of all its files.
    """
    if isinstance(source, (str, Path)):
        try:
            state = Path(source).stat()
        except OSError:
            return None
        return (str(source), state.st_size, state.st_mtime_ns)
    if isinstance(source, VideoFrame):
        of_file = media_key(source.path)
        return None if of_file is None else (of_file, source.seconds)
    if isinstance(source, FileRange):
        of_file = media_key(source.path) if not source.path.startswith("/proc/") else None
        return None if of_file is None else (of_file, source.offset, source.size)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return (len(source), hashlib.blake2b(source, digest_size=16).digest())
    if isinstance(source, (list, tuple)):
        keys = tuple(media_key(one) for one in source)
        return keys if all(key is not None for key in keys) else None
    return None


class Cache(Generic[Value]):
    """The most recently used values, at most `limit` of summed size. Safe for several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._locks: dict[int, threading.Lock] = {}  # of this process; a fork may copy one that another thread holds

    def _lock(self) -> threading.Lock:
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def get(self, key: Hashable | None) -> Value | None:
        with self._lock():
            found = self._values.get(key) if key is not None else None
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Hashable | None, value: Value, size: int = 1) -> None:
        """Keep `value` of `size`; the least recently used values go. A value over the limit is not kept."""
        if key is None or size > self.limit:
            return
        with self._lock():
            old = self._values.pop(key, None)
            self.size += size - (old[1] if old else 0)
            self._values[key] = (value, size)
            while self.size > self.limit:
                self.size -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock():
            self._values.clear()
            self.size = 0
