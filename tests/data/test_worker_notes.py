"""Notes of loader workers in shared memory, and the samples that are not tried again."""

from __future__ import annotations

import json
import os
import time

from fastvst.data.worker_notes import ENCODING, PLANNING, Casualties, Note, make_slots, read_notes, write_note


def test_notes_are_read_as_they_were_written() -> None:
    slots = make_slots(3)
    begin = time.monotonic()
    write_note(slots, 0, ENCODING, "set with blanks/é " + "x" * 1000, (1, 2, 10**9))
    write_note(slots, 2, "", "", (0, 0, 0))
    first, second, third = read_notes(slots)
    assert first[:2] == (os.getpid(), ENCODING) and first.place == (1, 2, 10**9)
    assert first.name.startswith("set with blanks/é xxx") and begin <= first.since <= time.monotonic()
    assert second == Note() and str(second) == "not started"
    assert third.doing == "" and str(third) == f"pid {os.getpid()}: between two packs"
    write_note(slots, 0, PLANNING, "\ud83d", (0, 0, 1))  # shorter than before, and half of a surrogate pair
    assert read_notes(slots)[0].name == "\\ud83d" and str(read_notes(slots)[0]).endswith("planning \\ud83d")


def test_a_sample_is_lost_at_its_second_worker() -> None:
    found = Casualties()
    guilty = Note(7, ENCODING, "a/1", (0, 0, 1), 0.0)
    idle = Note(8, "", "", (0, 0, 0), 0.0)
    assert found.blame([guilty, idle], "worker_died") == [] and not found.lost
    assert found.blame([guilty], "worker_hung") == [guilty]
    error = found.error((0, 0, 1), ENCODING, "a", "1")
    assert error is not None and error.reason == "worker_hung" and error.id == "1"
    assert found.error((0, 0, 1), PLANNING, "a", "1") is None
    again = Casualties()
    again.load_state_dict(json.loads(json.dumps(found.state_dict())))
    assert again.lost == found.lost
