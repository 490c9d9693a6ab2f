"""make_loader: packed batches from worker processes, in an order and with a state that do not depend on the workers.

Every worker of every rank plans the same stream of steps (planner.py; it reads only text and image headers), but
decodes and encodes only its own packs (worker.py). Pack j of a step belongs to rank j % world_size as its micro-step
j // world_size; the n-th pack of a rank is made by worker n % num_workers. So two ranks with accumulation 1 train on
the same packs as one rank with accumulation 2, and no rank sends samples to another.

Each pack carries the planner's state before its step. The loader's state is that of the last pack handed out, together
with the number of packs used in the step: exact in the middle of a step, the same on every rank, and valid for any
number of workers.
"""

from __future__ import annotations

import errno
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from fastvst.batch import PackedBatch
from fastvst.config import check_at_least, not_an_option
from fastvst.data.ledger import Ledger, TooManyBadSamples
from fastvst.data.mixture import Mixture, MixtureConfig, open_mixture
from fastvst.data.packing import PackingConfig, PackingReport
from fastvst.data.planner import Encoder, Planner
from fastvst.data.processor import Processor
from fastvst.data.worker import Delivery, Notes, PackStream, make_slots, read_notes, start_worker

POLL_S = 5.0  # seconds between checks that the workers are alive


@dataclass(frozen=True)
class LoaderConfig:
    """How packs are made and delivered.

    Attributes:
        tokens_per_pack: most LLM tokens in one pack; longer samples are rejected ("too_long"), never truncated.
        accumulation: packs of each rank in one optimizer step.
        num_workers: processes of each rank that decode and encode samples; 0 = in the training process.
        prefetch: packs that every worker prepares in advance.
        pin_memory: deliver batches in page-locked memory, for asynchronous copies to the GPU.
        timeout_s: seconds to wait for one pack before the run stops and names the sample; 0 = no limit.
        start_method: how worker processes start: "fork", "spawn" or "forkserver"; none = Python's default.
        buffer_samples: least number of samples from which a step is chosen.
        buffer_steps: least number of steps' tokens from which a step is chosen.
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

    def __post_init__(self) -> None:
        check_at_least(
            1,
            tokens_per_pack=self.tokens_per_pack,
            accumulation=self.accumulation,
            prefetch=self.prefetch,
            buffer_samples=self.buffer_samples,
            buffer_steps=self.buffer_steps,
        )
        check_at_least(0, num_workers=self.num_workers, timeout_s=self.timeout_s)
        methods = (None, "fork", "spawn", "forkserver")
        if self.start_method not in methods:
            raise ValueError(f"start_method is {self.start_method!r}; expected one of {methods}")


def make_planner(mixture: Mixture, processor: Encoder, config: LoaderConfig, world_size: int) -> Planner:
    """The planner of a run. With it, dry runs and reports see the steps without encoding anything."""
    packing = PackingConfig(config.tokens_per_pack, config.buffer_samples, config.buffer_steps)
    return Planner(mixture, processor, packing, world_size * config.accumulation)


class Loader:
    """Iterable of PackedBatches, one for each micro-step. A second iteration continues after the last batch handed out.

    Attributes:
        ledger: unusable samples. Every rank counts each once, but broken pixels only on the rank that decoded them.
        report: fill, vision share and balance of the steps delivered so far.
        notes: lines about each opened source: what is read, and what is not.
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
        if not 0 <= rank < world_size:
            raise ValueError(f"need 0 <= rank < world_size; got rank {rank} of {world_size}")
        self.mixture = mixture
        # Pixels travel as bytes; the model normalises them on its device.
        self.processor = processor.with_uint8_patches() if isinstance(processor, Processor) else processor
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.ledger = ledger if ledger is not None else Ledger()
        self.report = PackingReport()
        self.notes = [line for source in mixture.sources for line in source.first_lines()]
        self._state: dict[str, Any] = {"planner": None, "used": 0}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; JSON-able, some tens of KB. Only the ledger's count of broken
        pixels differs between ranks."""
        return {**self._state, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; takes effect when iteration begins.

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
        slots = make_slots(max(self.config.num_workers, 1))
        planner = make_planner(open_again(self.mixture), self.processor, self.config, self.world_size)
        data = PackStream(planner, self.rank, self.world_size, self._state, slots)
        deliveries = _start(data, self.config)
        try:
            while True:
                failure = None
                try:
                    delivery = _wait(deliveries, self.config.timeout_s)
                except RuntimeError as error:
                    failure = self._explain(error, slots)
                if failure is not None:
                    raise failure
                if delivery is None:
                    return
                self._account(delivery)
                if not isinstance(delivery.batch, PackedBatch):
                    return
                yield delivery.batch
        finally:
            _kill(slots)  # torch would wait 5 s for a busy worker, and the interpreter TERM_GRACE_S after its SIGTERM
            del deliveries  # ends torch's bookkeeping of the workers before an error is handled

    def _account(self, delivery: Delivery) -> None:
        """Update ledger, report and state for the pack that is about to be handed out."""
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
                f"no usable sample among the {step.seen} rows read from {names}.\n{self.ledger.summary()}"
            )

    def _explain(self, error: RuntimeError, slots: Notes) -> RuntimeError:
        """The error of a worker that died or does not answer, with the sample that it worked on."""
        text = str(error)
        if not any(sign in text for sign in ("exited unexpectedly", "killed by signal", "no pack came")):
            return error
        notes = read_notes(slots)
        alive = {f"pid {child.pid}" for child in multiprocessing.active_children()}
        dead = [(w, note) for w, note in enumerate(notes) if note and note.partition(":")[0] not in alive]
        doing = "; ".join(f"loader worker {w} ({note or 'not started'})" for w, note in dead or enumerate(notes))
        return RuntimeError(f"rank {self.rank}: {text}\nlast known: {doing}")


def _start(data: PackStream, config: LoaderConfig) -> Iterator[Delivery]:
    """Start the workers. Raises RuntimeError if /dev/shm has no room for their semaphores.

    torch installs a SIGCHLD handler that raises at an arbitrary line of the training loop when a worker dies. It is
    removed again: `_wait` finds the death when it asks for the next batch, where it can be explained.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    workers = config.num_workers
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=config.prefetch if workers else None,
        pin_memory=config.pin_memory,
        timeout=min(POLL_S, config.timeout_s or POLL_S) if workers else 0,
        multiprocessing_context=config.start_method if workers else None,
        worker_init_fn=start_worker,
    )
    try:
        deliveries = iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RuntimeError(
            f"the loader's {workers} workers cannot start, because /dev/shm is full: their semaphores take about "
            f"{64 * workers} KB there. Give the container a larger one (docker run --shm-size=64m), or pass "
            "--loader.num_workers 0"
        ) from error
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return deliveries


def _wait(deliveries: Iterator[Delivery], timeout_s: float) -> Delivery | None:
    """The next delivery; None at the end. Every POLL_S seconds it checks that the workers are alive."""
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
        except (ConnectionError, EOFError) as error:  # the worker died while it sent tensors
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
        mixture: the sources (opened here once, before workers start), or an opened Mixture at its beginning.
        processor: a `Processor`.
        config: token budget, accumulation, workers.
        rank, world_size: this process among the data-parallel ones.
        state: from `Loader.state_dict()`. The number of workers may differ; at the end of a step, also that of ranks.
        ledger: records unusable samples; every rank needs a path of its own.

    Raises:
        FileNotFoundError, ValueError: from `open_source`, or a state of other data. Iterating raises TooManyBadSamples,
            SampleError (strict ledger), and RuntimeError with rank, worker and sample when a worker dies.
    """
    opened = mixture if isinstance(mixture, Mixture) else open_mixture(mixture)
    loader = Loader(opened, processor, config, rank=rank, world_size=world_size, ledger=ledger)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def open_again(mixture: Mixture) -> Mixture:
    """The same mixture at its beginning. The opened files are shared; they hold offsets only."""
    return Mixture(mixture.sources, mixture.config)


def _kill(slots: Notes) -> None:
    """Kill the workers that wrote into the slots; a hanging worker does not react to gentler signals."""
    pids = {note.partition(":")[0] for note in read_notes(slots)}
    for child in multiprocessing.active_children():
        if f"pid {child.pid}" in pids:
            child.kill()
