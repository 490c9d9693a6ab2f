"""What every helper process of the loader is doing, readable after its death, and the samples that workers died of.

A worker that dies or hangs is replaced, together with the others of its rank: the new ones make the packs that are not
handed out, so the order of the packs does not change. The sample that it worked on is tried once more, because the
kernel kills innocent processes too. A sample at which a second worker ends is rejected.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastvst.data.ledger import SampleError

SLOT = 512  # bytes of shared memory in which a worker notes its current sample
NAME = 300  # bytes of it for the name of the sample
Notes = Any  # an array of multiprocessing.sharedctypes
Place = tuple[int, int, int]  # source, block and row of a sample, see mixture.Ref


class Note(NamedTuple):
    """The last note of a worker.

    Attributes:
        pid: its process id; 0 if it never started.
        doing: "planning", "reading", "encoding", or "" between two packs.
        name: source and id of the sample.
        place: its place in the mixture.
        since: time.monotonic() when this began; the clock is the same in all processes.
    """

    pid: int = 0
    doing: str = ""
    name: str = ""
    place: Place = (0, 0, 0)
    since: float = 0.0

    def __str__(self) -> str:
        if not self.pid:
            return "not started"
        return f"pid {self.pid}: {self.doing} {self.name}" if self.doing else f"pid {self.pid}: between two packs"


def make_notes(processes: int) -> Notes:
    """Shared memory for the notes of this many processes, SLOT bytes each."""
    return multiprocessing.RawArray(ctypes.c_char, processes * SLOT)


def write_note(notes: Notes, process: int, doing: str, name: str, place: Place = (0, 0, 0)) -> None:
    """Note that this process, the `process`-th one, does this with the sample `name` at `place`."""
    head = f"{os.getpid()} {doing or '-'} {','.join(map(str, place))} {time.monotonic()} "
    line = head.encode() + name.encode("utf-8", "backslashreplace")[:NAME]
    at = process % (len(notes) // SLOT) * SLOT
    notes[at : at + SLOT] = line.ljust(SLOT, b"\0")


def read_notes(notes: Notes) -> list[Note]:
    """The last note of every process."""
    return [_read(bytes(notes[at : at + SLOT]).rstrip(b"\0")) for at in range(0, len(notes), SLOT)]


def forget_workers(notes: Notes) -> None:
    """Clear the notes of all processes but the last: others begin in their places."""
    notes[: len(notes) - SLOT] = bytes(len(notes) - SLOT)


def _read(line: bytes) -> Note:
    if not line:
        return Note()
    pid, doing, place, since, name = line.decode("utf-8", "replace").split(" ", 4)
    source, block, row = map(int, place.split(","))
    return Note(int(pid), "" if doing == "-" else doing, name, (source, block, row), float(since))


@dataclass
class Casualties:
    """Samples that workers did not survive.

    Attributes:
        lost: place -> (reason, detail) of the samples that are not tried again.
        tried: how many workers ended at a sample that is not lost yet.
    """

    lost: dict[Place, tuple[str, str]] = field(default_factory=dict)
    tried: Counter[Place] = field(default_factory=Counter)

    def blame(self, notes: Sequence[Note], reason: str) -> list[Note]:
        """Count the samples of these notes; returns those that are lost now.

        Args:
            reason: "worker_died" or "worker_hung".
        """
        found = []
        for note in notes:
            if not note.doing:
                continue
            self.tried[note.place] += 1
            if self.tried[note.place] > 1:
                self.lost[note.place] = (reason, f"two workers ended while {note.doing} it")
                found.append(note)
        return found

    def check(self, place: Place, source: str, id: str) -> None:
        """Raise the SampleError of a sample that is lost."""
        if place in self.lost:
            reason, detail = self.lost[place]
            raise SampleError(reason, source, id, detail)

    def state_dict(self) -> list[list[Any]]:
        """The lost samples; JSON-able."""
        return [[*place, *values] for place, values in sorted(self.lost.items())]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Return to saved lost samples."""
        self.lost = {(s, b, r): (str(why), str(text)) for s, b, r, why, text in state}
        self.tried.clear()
