"""What every helper process of the loader is doing, where it can be read after the process has died."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from typing import Any

SLOT = 256  # bytes of shared memory in which a process notes its current sample
Notes = Any  # an array of multiprocessing.sharedctypes


def make_notes(processes: int) -> Notes:
    """Shared memory for the notes of this many processes, SLOT bytes each."""
    return multiprocessing.RawArray(ctypes.c_char, processes * SLOT)


def write_note(notes: Notes, process: int, work: str, name: str) -> None:
    """Note that this process, the `process`-th one, does `work` on the sample `name`."""
    at = process % (len(notes) // SLOT) * SLOT
    notes[at : at + SLOT] = f"pid {os.getpid()}: {work} {name}".encode()[:SLOT].ljust(SLOT, b"\0")


def read_notes(notes: Notes) -> list[str]:
    """The last note of every process, "pid 17: encoding rooms/5"; empty for one that has not started to work."""
    found = [notes[at : at + SLOT] for at in range(0, len(notes), SLOT)]
    return [note.rstrip(b"\0").decode("utf-8", "replace") for note in found]
