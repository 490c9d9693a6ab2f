"""make_loader: packed batches from worker processes, in an order and with a state that do not depend on the workers.

Every worker of every rank plans the same stream of steps (planner.py: text and picture headers only) and decodes and
encodes only its own packs. Pack j of step s belongs to rank j % world_size, as its micro-step j // world_size; the
n-th pack of a rank is made by worker n % num_workers. So 2 ranks with accumulation 1 train on the packs of 1 rank with
accumulation 2, and nobody sends samples to anybody.

Each pack brings along the planner's state before its step. The loader keeps that of the pack handed out last: this
and the number of packs used in the step *is* the state, exact in the middle of a step, the same on every rank, and
good for any number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastvst.batch import IGNORE, Cost, EncodedSample, PackedBatch, pack
from fastvst.config import not_an_option
from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples
from fastvst.data.mixture import Mixture, MixtureConfig, open_mixture
from fastvst.data.packing import PackingConfig, PackingReport
from fastvst.data.planner import BadSample, Encoder, Planned, Planner, Step

SLOT = 256  # bytes in which a worker notes what it is working on
POLL_S = 5.0  # seconds between looks at whether the workers live
TERM_GRACE_S = 120  # seconds a worker lives on after SIGTERM, while the trainer saves


@dataclass(frozen=True)
class LoaderConfig:
    """How packs are made and delivered.

    Attributes:
        tokens_per_pack, buffer_samples, buffer_steps: see PackingConfig.
        accumulation: packs of each rank in one optimizer step.
        num_workers: processes of each rank that decode and encode; 0: in the training process.
        prefetch: packs that every worker makes in advance.
        pin_memory: hand out batches in page-locked memory; for CUDA.
        timeout_s: seconds to wait for one pack before the run stops and names the sample; 0: for ever.
        start_method: "fork", "spawn" or "forkserver"; None: Python's default.
    """

    tokens_per_pack: int = 16384
    accumulation: int = 1
    num_workers: int = 2
    prefetch: int = not_an_option(2)
    pin_memory: bool = not_an_option(False)
    timeout_s: float = 600.0
    start_method: str | None = not_an_option(None)
    buffer_samples: int = 512
    buffer_steps: float = not_an_option(3.0)


@dataclass(frozen=True)
class _Delivery:
    """One pack on its way from a worker. `batch` is None if no usable sample came at all."""

    batch: PackedBatch | None
    step: Step
    micro: int
    bad_pixels: list[BadSample]

    def pin_memory(self) -> _Delivery:
        batch = self.batch.pin_memory() if self.batch is not None else None
        return _Delivery(batch, self.step, self.micro, self.bad_pixels)


class _Packs(IterableDataset):
    """The packs of one rank, or of one of its workers."""

    def __init__(
        self,
        mixture: Mixture,
        processor: Encoder,
        config: LoaderConfig,
        rank: int,
        world_size: int,
        state: dict[str, Any] | None,
        slots: Tensor,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.state = state
        self.slots = slots

    def __iter__(self) -> Iterator[_Delivery]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        note = partial(_note, self.slots[worker].numpy())
        planner = make_planner(self.mixture, self.processor, self.config, self.world_size)
        planner.watch = lambda name: note(f"planning {name}")
        count = 0  # packs of this rank since here
        for step, first in steps(planner, self.state, self.world_size):
            light = replace(step, packs=[])  # the samples stay here
            if not step.packs:
                yield _Delivery(None, light, 0, [])
                return
            for micro in range(first, len(step.packs) // self.world_size):
                if count % workers == worker:
                    samples = step.packs[micro * self.world_size + self.rank]
                    encoded, bad = self._encode(samples, worker, note)
                    yield _Delivery(pack(encoded or [empty_sample()]), light, micro, bad)
                count += 1

    def _encode(self, samples: list[Planned], worker: int, note: Any) -> tuple[list[EncodedSample], list[BadSample]]:
        """Encode one pack; a sample whose pixels turn out to be broken is left out of it."""
        encoded: list[EncodedSample] = []
        bad: list[BadSample] = []
        for ref, sample, cost in samples:
            note(f"encoding {sample.source}/{sample.id}")
            where = self.mixture.where(ref)
            try:
                one = self.processor.encode(sample)
            except SampleError as error:
                bad.append(BadSample(error, where))
                continue
            except Exception as error:
                raise RuntimeError(
                    f"rank {self.rank}, loader worker {worker}: encoding {sample.source}/{sample.id} ({where}) failed "
                    f"with {type(error).__name__}: {error}"
                ) from error
            if one.cost.tokens != cost.tokens or one.cost.patches != cost.patches:
                raise RuntimeError(
                    f"{sample.source}/{sample.id} ({where}): measured {cost}, encoded {one.cost}; the file has changed "
                    "while training, or measure() and encode() disagree"
                )
            encoded.append(one)
        return encoded, bad


def make_planner(mixture: Mixture, processor: Encoder, config: LoaderConfig, world_size: int) -> Planner:
    """The planner of a run; for dry runs and reports that want to see steps without encoding anything."""
    packing = PackingConfig(config.tokens_per_pack, config.buffer_samples, config.buffer_steps)
    return Planner(mixture, processor, packing, world_size * config.accumulation)


def steps(planner: Planner, state: dict[str, Any] | None, world_size: int) -> Iterator[tuple[Step, int]]:
    """Steps from a loader state on, each with the first micro-step that has not been used yet.

    Raises:
        ValueError: the state lies in the middle of a step and cannot be shared out among this number of ranks.
    """
    now = planner.packs_per_step
    if state is not None and state["planner"] is not None:
        saved = state["planner"]["packs_per_step"]
        used = state["used"]
        if used < saved and (saved != now or used % world_size):
            raise ValueError(
                f"the data state was saved after {used} of a step's {saved} packs and cannot go on with {world_size} "
                f"ranks and {now} packs a step: keep world size x accumulation, or resume from the end of a step"
            )
        planner.packs_per_step = saved
        planner.load_state_dict(state["planner"])
        step = planner.next_step()
        if step is None:
            raise ValueError("the data state names a step that the data do not have any more")
        planner.packs_per_step = now
        if used < saved:
            yield step, used // world_size
    while (step := planner.next_step()) is not None:
        yield step, 0


def empty_sample() -> EncodedSample:
    """One unsupervised token: stands in a pack none of whose samples can be used, so that all ranks stay in step."""
    none = torch.zeros(0, dtype=torch.int32)
    return EncodedSample(
        tokens=torch.zeros(1, dtype=torch.int32),
        labels=torch.full((1,), IGNORE, dtype=torch.int32),
        positions=torch.zeros((3, 1), dtype=torch.int32),
        patches=torch.zeros((0, 1176)),
        grid=torch.zeros((0, 3), dtype=torch.int32),
        vision_slots=none,
        window_order=none,
        window_lengths=none,
        image_lengths=none,
        vision_positions=torch.zeros((0, 2), dtype=torch.int32),
        cost=Cost(1, 0, 0.0),
        source="fastvst",
        id="empty",
    )


class Loader:
    """Iterate for PackedBatches, one for each micro-step. Iterating again goes on after the last batch handed out.

    Attributes:
        ledger: unusable samples, each counted once, on every rank; broken pixels only on the rank that met them.
        report: fill, vision share and balance of the steps delivered so far.
        notes: what opening the sources found, one line each.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Encoder,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        ledger: Ledger | None = None,
    ) -> None:
        if not 0 <= rank < world_size or config.accumulation < 1:
            raise ValueError(f"rank {rank} of {world_size} with accumulation {config.accumulation} is impossible")
        self.mixture = mixture
        self.processor = processor
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.ledger = ledger if ledger is not None else Ledger()
        self.report = PackingReport()
        self.notes = [source.describe() for source in mixture.sources]
        self._state: dict[str, Any] = {"planner": None, "used": 0}

    def state_dict(self) -> dict[str, Any]:
        """The place after the batch handed out last; JSON-able, some tens of KB, the same on all ranks but for the
        ledger's count of broken pixels."""
        return {**self._state, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; takes effect when iteration begins.

        Raises:
            ValueError: the state belongs to another mixture or packing.
        """
        if state["planner"] is not None:
            make_planner(self.mixture, self.processor, self.config, self.world_size).check_state(state["planner"])
        self._state = {"planner": state["planner"], "used": state["used"]}
        self.ledger.load_state_dict(state["ledger"])

    def __iter__(self) -> Iterator[PackedBatch]:
        if self._state["planner"] is None:
            for source in self.mixture.sources:
                for problem in source.problems:
                    self.ledger.record(problem, where=problem.id, write=self.rank == 0)
        workers = self.config.num_workers
        slots = torch.zeros((max(workers, 1), SLOT), dtype=torch.uint8).share_memory_()
        data = _Packs(
            open_again(self.mixture),
            self.processor,
            self.config,
            self.rank,
            self.world_size,
            self._state,
            slots,
        )
        deliveries = _start(data, self.config)
        while True:
            failure = None
            try:
                delivery = _wait(deliveries, self.config.timeout_s)
            except RuntimeError as error:
                failure = self._explain(error, slots)
            if failure is not None:
                _kill(slots)
                del deliveries  # torch's bookkeeping of the workers ends before anybody handles the error
                raise failure
            if delivery is None:
                return
            self._account(delivery)
            if delivery.batch is None:
                return
            yield delivery.batch

    def _account(self, delivery: _Delivery) -> None:
        """Ledger, report and state of one pack that is about to be handed out."""
        step = delivery.step
        self._state = {"planner": step.before, "used": (delivery.micro + 1) * self.world_size}
        if delivery.micro == 0:
            self.ledger.saw(step.seen)
            for error, where in step.bad:
                self.ledger.record(error, where=where, write=self.rank == 0)
            if len(step.loads):
                self.report.add(step.loads, step.samples, self.config.tokens_per_pack)
        for error, where in delivery.bad_pixels:
            self.ledger.record(error, where=where, weight=self.world_size)
        self.ledger.check()
        if step.hopeless:
            names = ", ".join(source.name for source in self.mixture.sources)
            raise TooManyBadSamples(
                f"no usable sample among the {step.seen} rows looked at in {names}.\n{self.ledger.summary()}"
            )

    def _explain(self, error: RuntimeError, slots: Tensor) -> RuntimeError:
        """Name the worker and what it was doing when a worker died or did not answer."""
        text = str(error)
        if not any(sign in text for sign in ("exited unexpectedly", "killed by signal", "no pack came")):
            return error
        notes = _notes(slots)
        alive = {f"pid {child.pid}" for child in multiprocessing.active_children()}
        dead = [(w, note) for w, note in enumerate(notes) if note and note.partition(":")[0] not in alive]
        doing = "; ".join(f"loader worker {w} ({note or 'not started'})" for w, note in dead or enumerate(notes))
        return RuntimeError(f"rank {self.rank}: {text}\nlast known: {doing}")


def _start(data: _Packs, config: LoaderConfig) -> Iterator[_Delivery]:
    """Start the workers.

    torch answers the death of a worker with an exception out of a signal handler, at any line of the training loop.
    Here it is found where the next batch is asked for, so that it can be explained: the old handler is put back.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    workers = config.num_workers
    deliveries = iter(
        DataLoader(
            data,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            pin_memory=config.pin_memory,
            timeout=min(POLL_S, config.timeout_s or POLL_S) if workers else 0,
            multiprocessing_context=config.start_method if workers else None,
            worker_init_fn=_start_worker,
        )
    )
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return deliveries


def _wait(deliveries: Iterator[_Delivery], timeout_s: float) -> _Delivery | None:
    """The next delivery, None at the end. Looks every POLL_S seconds whether the workers live."""
    begun = time.monotonic()
    while True:
        try:
            return next(deliveries, None)
        except RuntimeError as error:
            waited = time.monotonic() - begun
            if "DataLoader timed out" not in str(error):
                raise
            if timeout_s and waited > timeout_s:
                raise RuntimeError(f"no pack came within {waited:.0f} s (timeout_s={timeout_s})") from error
        except (ConnectionError, EOFError) as error:  # it died while its tensors were on their way
            time.sleep(0.2)
            raise RuntimeError(f"a loader worker exited unexpectedly ({type(error).__name__}: {error})") from error


def make_loader(
    mixture: MixtureConfig | Mixture,
    processor: Encoder,
    config: LoaderConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
    ledger: Ledger | None = None,
) -> Loader:
    """Packed batches of one rank.

    Args:
        mixture: what to read (opened here, once, before workers start), or an opened Mixture at its beginning.
        processor: a `Processor`.
        config: budget, accumulation, workers.
        rank, world_size: this process among the data-parallel ones.
        state: from `Loader.state_dict()`; number of workers may differ, and at the end of a step the ranks as well.
        ledger: where unusable samples go; every rank needs a path of its own.

    Raises:
        FileNotFoundError, ValueError: what `open_source` and the state say; while iterating TooManyBadSamples,
            SampleError (strict ledger), and RuntimeError naming rank, worker and sample when a worker dies.
    """
    opened = mixture if isinstance(mixture, Mixture) else open_mixture(mixture)
    loader = Loader(opened, processor, config, rank=rank, world_size=world_size, ledger=ledger)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def open_again(mixture: Mixture) -> Mixture:
    """The same mixture at its beginning (the opened files are shared: they are offsets only)."""
    return Mixture(mixture.sources, mixture.config)


def _note(slot: np.ndarray, text: str) -> None:
    """Write what this worker does into its shared slot, so that it can be read after its death."""
    line = f"pid {os.getpid()}: {text}".encode()[:SLOT]
    slot[: len(line)] = np.frombuffer(line, dtype=np.uint8)
    slot[len(line) :] = 0


def _notes(slots: Tensor) -> list[str]:
    return [bytes(slot.tolist()).rstrip(b"\0").decode("utf-8", "replace") for slot in slots]


def _kill(slots: Tensor) -> None:
    """End the workers that wrote into the slots at once; one that hangs would not answer anything gentler."""
    pids = {note.partition(":")[0] for note in _notes(slots)}
    for child in multiprocessing.active_children():
        if f"pid {child.pid}" in pids:
            child.kill()


def _start_worker(worker: int) -> None:
    """Settings of a worker process.

    Ctrl-C is the trainer's business. SIGTERM reaches all processes of a job at once; a worker that died of it would
    take the trainer down before it has saved, so workers live on for a while (the end of the trainer ends them).
    A worker yields to the trainer where both want a core: packs wait in the queue, but every product of the trainer
    waits for the slowest of its threads.
    """
    torch.set_num_threads(1)
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(signum: int, frame: Any) -> None:
    timer = threading.Timer(TERM_GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
