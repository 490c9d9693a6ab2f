"""What runs in a loader worker: it encodes packs, and notes its current sample so that a crash can be explained."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastvst.batch import EncodedSample, PackedBatch, empty_sample, pack
from fastvst.data.ledger import SampleError
from fastvst.data.planner import BadSample, Planned, Planner, Step, steps_from
from fastvst.data.shared_batch import SharedBatch
from fastvst.processes import end_with_parent

Notes = Any  # an array of multiprocessing.sharedctypes
SLOT = 256  # bytes of shared memory in which a worker notes its current sample
TERM_GRACE_S = 120  # seconds that a worker lives after SIGTERM, while the trainer saves


@dataclass(frozen=True)
class Delivery:
    """One pack from a worker.

    Attributes:
        batch: the pack, a SharedBatch on its way between processes; None if the stream ends with unusable rows only.
        step: its step, without the samples.
        micro: its micro-step within the step.
        bad_pixels: samples of this pack that were measured, but could not be encoded.
    """

    batch: PackedBatch | SharedBatch | None
    step: Step
    micro: int
    bad_pixels: list[BadSample]

    def pin_memory(self) -> Delivery:
        """The same delivery in page-locked memory; torch's DataLoader calls it."""
        return replace(self, batch=self.batch.pin_memory() if isinstance(self.batch, PackedBatch) else None)


class PackStream(IterableDataset):
    """The packs of one rank; in a worker process, those of that worker.

    Args:
        planner: a planner at its beginning.
        rank, world_size: this rank among the data-parallel ones.
        state: from `Loader.state_dict()`, or None.
        slots: from `make_slots`.
    """

    def __init__(
        self, planner: Planner, rank: int, world_size: int, state: dict[str, Any] | None, slots: Notes
    ) -> None:
        self.planner = planner
        self.rank = rank
        self.world_size = world_size
        self.state = state
        self.slots = slots

    def __iter__(self) -> Iterator[Delivery]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        note = partial(_note, self.slots, worker)
        self.planner.watch = lambda name: note(f"planning {name}")
        number = 0  # of this rank's packs
        for step, first in steps_from(self.planner, self.state, self.world_size):
            light = replace(step, packs=[])  # the samples are not sent to the trainer
            if not step.packs:
                yield Delivery(None, light, 0, [])
                return
            for micro in range(first, len(step.packs) // self.world_size):
                if number % workers == worker:
                    samples = step.packs[micro * self.world_size + self.rank]
                    encoded, bad = self._encode(samples, worker, note)
                    batch = pack(encoded or [empty_sample()])
                    yield Delivery(batch if info is None else SharedBatch(batch), light, micro, bad)
                number += 1

    def _encode(
        self, samples: list[Planned], worker: int, note: Callable[[str], None]
    ) -> tuple[list[EncodedSample], list[BadSample]]:
        """Encode one pack; samples whose pixels are broken are left out."""
        encoded: list[EncodedSample] = []
        bad: list[BadSample] = []
        for ref, sample, cost in samples:
            name = f"{sample.source}/{sample.id}"
            note(f"encoding {name}")
            where = self.planner.mixture.where(ref)
            try:
                one = self.planner.processor.encode(sample)
            except SampleError as error:
                bad.append(BadSample(error, where))
                continue
            except Exception as error:
                raise RuntimeError(
                    f"rank {self.rank}, loader worker {worker}: encoding {name} ({where}) failed with "
                    f"{type(error).__name__}: {error}"
                ) from error
            if one.cost.tokens != cost.tokens or one.cost.patches != cost.patches:
                raise RuntimeError(
                    f"{name} ({where}): measured {cost}, encoded {one.cost}; the file changed during training, or "
                    "measure() and encode() disagree"
                )
            encoded.append(replace(one, origin=ref.source))
        return encoded, bad


def make_slots(workers: int) -> Notes:
    """Shared memory for the notes of `workers` processes, SLOT bytes each."""
    return multiprocessing.RawArray(ctypes.c_char, workers * SLOT)


def _note(slots: Notes, worker: int, text: str) -> None:
    """Write the current work into this worker's slot, where it can be read after the worker's death."""
    line = f"pid {os.getpid()}: {text}".encode()[:SLOT]
    slots[worker * SLOT : (worker + 1) * SLOT] = line.ljust(SLOT, b"\0")


def read_notes(slots: Notes) -> list[str]:
    """The last note of every worker, "pid 17: encoding rooms/5"; empty for a worker that never started."""
    notes = [slots[at : at + SLOT] for at in range(0, len(slots), SLOT)]
    return [note.rstrip(b"\0").decode("utf-8", "replace") for note in notes]


def start_worker(worker: int) -> None:
    """Settings of a worker process.

    Ctrl-C is handled by the trainer. SIGTERM reaches all processes of a job at the same time; a worker that died of it
    would end the trainer before it has saved, so workers live on for TERM_GRACE_S (they end with the trainer). Workers
    have a lower priority than the trainer: packs wait in a queue, but a matrix product of the trainer waits for the
    slowest of its threads.
    """
    end_with_parent()
    torch.set_num_threads(1)
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(signum: int, frame: Any) -> None:
    timer = threading.Timer(TERM_GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
