"""What runs in a loader worker: it reads and encodes the samples of packs, and notes its current one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from fastvst.batch import EncodedSample, PackedBatch, empty_sample, pack
from fastvst.data import spool
from fastvst.data.augment import augment_some
from fastvst.data.file_range import with_bytes
from fastvst.data.ledger import SampleError
from fastvst.data.mixture import Mixture
from fastvst.data.notes import Casualties, Notes, write_note
from fastvst.data.planner import BadSample, Encoder, Planned
from fastvst.data.shared_batch import SharedBatch
from fastvst.processes import end_with_parent

TERM_GRACE_S = 120  # seconds that a worker lives after SIGTERM, while the trainer saves


@dataclass(frozen=True)
class Delivery:
    """One pack from a worker.

    Attributes:
        batch: the pack, a SharedBatch on its way between processes; None if the stream ends with unusable rows only.
        bad_pixels: samples of this pack that were measured, but could not be encoded.
    """

    batch: PackedBatch | SharedBatch | None
    bad_pixels: Sequence[BadSample] = ()

    def pin_memory(self) -> Delivery:
        """The same delivery in page-locked memory; torch's DataLoader calls it."""
        return replace(self, batch=self.batch.pin_memory() if isinstance(self.batch, PackedBatch) else None)


class PackMaker(Dataset):
    """Makes the packs of one rank from their planned samples. Every sample is read by itself, and once.

    Args:
        mixture: the sources; only rows of these packs are read.
        processor: encodes the samples.
        rank: for messages.
        notes: from `make_notes`, one for each worker.
        casualties: samples that are not tried again.
    """

    def __init__(self, mixture: Mixture, processor: Encoder, rank: int, notes: Notes, casualties: Casualties) -> None:
        self.mixture = mixture
        self.processor = processor
        self.rank = rank
        self.notes = notes
        self.casualties = casualties

    def __getitem__(self, planned: list[Planned] | None) -> Delivery:
        """The pack of these samples; samples whose pixels are broken are left out. None: the end of the stream."""
        if planned is None:
            return Delivery(None)
        info = get_worker_info()
        worker = info.id if info is not None else 0
        encoded: list[EncodedSample] = []
        bad: list[BadSample] = []
        for one in planned:
            try:
                encoded.append(self._encode(one, worker))
            except SampleError as error:
                bad.append(BadSample(error, self.mixture.where(one.ref)))
        batch = pack(encoded or [empty_sample()])
        write_note(self.notes, worker, "", "")
        return Delivery(batch if info is None else SharedBatch(batch), bad)

    def _encode(self, planned: Planned, worker: int) -> EncodedSample:
        where = self.mixture.where(planned.ref)
        self.casualties.check(planned.ref, self.mixture.sources[planned.ref.source].name, where)
        write_note(self.notes, worker, "reading", where, planned.ref)
        found = self.mixture.read([planned.ref])[0].sample if planned.place is None else spool.read(planned.place)
        if isinstance(found, SampleError):
            raise found
        try:
            found = with_bytes(found)
        except OSError as error:
            raise SampleError("unreadable_file", found.source, found.id, str(error)) from error
        actions = self.mixture.sources[planned.ref.source].actions
        if actions is not None and actions.augment:
            found = augment_some(found, actions.augment, (*planned.ref, planned.read))
        name = f"{found.source}/{found.id}"
        write_note(self.notes, worker, "encoding", name, planned.ref)
        try:
            encoded = self.processor.encode(found)
        except SampleError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"rank {self.rank}, loader worker {worker}: encoding {name} ({where}) failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        if (encoded.cost.tokens, encoded.cost.patches) != (planned.cost.tokens, planned.cost.patches):
            detail = (
                f"measured {planned.cost}, encoded {encoded.cost}; the file changed during training, or measure() and "
                "encode() disagree"
            )
            raise SampleError("cost_changed", found.source, found.id, detail)
        return replace(encoded, origin=planned.ref.source)


def start_worker(worker: int, by_kernel: bool = True) -> None:
    """Settings of a worker process.

    Ctrl-C is handled by the trainer. SIGTERM reaches all processes of a job at the same time; a worker that died of it
    would end the trainer before it has saved, so workers live on for TERM_GRACE_S (they end with the trainer). Workers
    have a lower priority than the trainer: packs wait in a queue, but a matrix product of the trainer waits for the
    slowest of its threads.

    Args:
        by_kernel: see `end_with_parent`.
    """
    end_with_parent(by_kernel=by_kernel)
    torch.set_num_threads(1)
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(signum: int, frame: Any) -> None:
    timer = threading.Timer(TERM_GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
