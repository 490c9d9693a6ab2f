"""Notes of the loader's processes in shared memory, and the samples that are not tried again."""

from __future__ import annotations

import json
import os
import time

import pytest

from fastvst.data.ledger import SampleError
from fastvst.data.notes import Casualties, Note, forget_workers, make_notes, read_notes, write_note


def test_notes_are_read_as_they_were_written() -> None:
    notes = make_notes(3)
    begin = time.monotonic()
    write_note(notes, 0, "encoding", "set with blanks/é " + "x" * 1000, (1, 2, 10**9))
    write_note(notes, -1, "planning", "a/1")
    first, second, third = read_notes(notes)
    assert first[:2] == (os.getpid(), "encoding") and first.place == (1, 2, 10**9)
    assert first.name.startswith("set with blanks/é xxx") and begin <= first.since <= time.monotonic()
    assert second == Note() and str(second) == "not started" and str(third) == f"pid {os.getpid()}: planning a/1"
    write_note(notes, 0, "", "\ud83d")  # shorter than before, and half of a surrogate pair
    assert str(read_notes(notes)[0]) == f"pid {os.getpid()}: between two packs"
    forget_workers(notes)
    assert read_notes(notes) == [Note(), Note(), third]


def test_a_sample_is_lost_at_its_second_worker() -> None:
    found = Casualties()
    guilty = Note(7, "encoding", "a/1", (0, 0, 1), 0.0)
    idle = Note(8, "", "", (0, 0, 0), 0.0)
    assert found.blame([guilty, idle], "worker_died") == [] and not found.lost
    found.check((0, 0, 1), "a", "1")
    assert found.blame([guilty], "worker_hung") == [guilty]
    again = Casualties()
    again.load_state_dict(json.loads(json.dumps(found.state_dict())))
    for one in (found, again):
        one.check((0, 0, 0), "a", "0")
        with pytest.raises(SampleError, match="a/1: worker_hung: two workers ended while encoding it"):
            one.check((0, 0, 1), "a", "1")
