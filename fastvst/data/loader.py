"""make_loader: packed batches from worker processes, in an order and with a state that do not depend on the workers.

One planner process (planner_process.py) reads all rows once, measures them by their text and image headers, and plans
the steps; the ranks of a machine can share it. Workers (worker.py) read the samples of their own packs once more and
encode them. Pack j of a step belongs to rank j % world_size as its micro-step j // world_size; the n-th pack of a rank
is made by worker n % num_workers. So two ranks with accumulation 1 train on the same packs as one rank with
accumulation 2, and no rank sends samples to another.

Each pack carries the planner's state before its step. The loader's state is that of the last pack handed out, together
with the number of packs used in the step: exact in the middle of a step, the same on every rank, and valid for any
number of workers.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from fastvst.batch import PackedBatch
from fastvst.config import check_at_least, not_an_option
from fastvst.data.isolated import isolate
from fastvst.data.ledger import Ledger, TooManyBadSamples
from fastvst.data.mixture import Mixture, MixtureConfig, open_mixture
from fastvst.data.notes import Casualties, Note, Notes, forget_workers, make_notes, read_notes
from fastvst.data.packing import PackingConfig, PackingReport
from fastvst.data.planner import Encoder, Planned, Planner, Step
from fastvst.data.planner_process import LocalPlans, Node, RemotePlans, start_planner
from fastvst.data.processor import Processor
from fastvst.data.sources.files import ParquetTable
from fastvst.data.sources.source import with_ranges
from fastvst.data.spool import BLOCK
from fastvst.data.worker import Delivery, PackMaker, start_worker
from fastvst.processes import STOPPED_S, is_stopped

Plans = LocalPlans | RemotePlans
# The most that one token takes on its way: 4 patches of 1,176 uint8 pixels and 128 bytes of positions, ids, labels.
BYTES_A_TOKEN = 4 * 1176 + 128
MOST_RESTARTS = 6  # without a pack between them, before the run ends; a sample is rejected after two of them
POLL_S = 5.0  # seconds between checks that the workers are alive


@dataclass(frozen=True)
class LoaderConfig:
    """How packs are made and delivered.

    Attributes:
        tokens_per_pack: most LLM tokens in one pack; longer samples are rejected ("too_long"), never truncated.
        accumulation: packs of each rank in one optimizer step.
        num_workers: processes of each rank that decode and encode samples; 0 = the training process encodes, and
            waits for a process that decodes.
        prefetch: packs that every worker prepares in advance.
        pin_memory: deliver batches in page-locked memory, for asynchronous copies to the GPU.
        timeout_s: seconds to wait for one pack before the workers are replaced; the sample at which a second worker
            hangs is rejected. 0 = no limit.
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
    """The planner of a run. With it, dry runs and reports see the steps without encoding anything.

    Raises:
        ValueError: the processor's tokenizer lacks tokens of robot actions (see `with_action_tokens`).
    """
    if isinstance(processor, Processor):
        for name in {name for source in mixture.sources if source.actions for name in source.actions.codec.token_names}:
            processor.token_id(name)
    packing = PackingConfig(config.tokens_per_pack, config.buffer_samples, config.buffer_steps)
    # Measuring decodes the first frame of a video; of an image it reads the header.
    return Planner(mixture, isolate(processor, ("video",)), packing, world_size * config.accumulation)


class Loader:
    """Iterable of PackedBatches, one for each micro-step. A second iteration continues after the last batch handed out.

    Attributes:
        ledger: unusable samples. Every rank counts each once, but broken pixels only on the rank that decoded them.
        report: fill, vision share and balance of the steps delivered so far.
        notes: lines about each opened source: what is read, and what is not; and what the loader needs of memory and
            disk.
        casualties: samples that workers did not survive.
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
        node: Node | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"need 0 <= rank < world_size; got rank {rank} of {world_size}")
        self.mixture = mixture
        # Pixels travel as bytes; the model normalises them on its device.
        self.processor = processor.with_uint8_patches() if isinstance(processor, Processor) else processor
        if not config.num_workers:  # else a worker dies of a decoder, and is replaced
            self.processor = isolate(self.processor)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.node = node
        self.ledger = ledger if ledger is not None else Ledger()
        self.report = PackingReport()
        self.notes = [line for source in mixture.sources for line in source.first_lines()]
        self.notes += needs(mixture, config)
        self._state: dict[str, Any] = {"planner": None, "used": 0}
        self.casualties = Casualties()
        self._runs = 0  # how often a planner was started

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; JSON-able, some tens of KB. Only the ledger's count of broken
        pixels differs between ranks."""
        return {**self._state, "lost": self.casualties.state_dict(), "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; takes effect when iteration begins.

        Raises:
            ValueError: the state belongs to another mixture or packing.
        """
        if state["planner"] is not None:
            make_planner(self.mixture, self.processor, self.config, self.world_size).check_state(state["planner"])
        self._state = {"planner": state["planner"], "used": state["used"]}
        self.casualties.load_state_dict(state.get("lost", []))
        self.ledger.load_state_dict(state["ledger"])

    def __iter__(self) -> Iterator[PackedBatch]:
        if self._state["planner"] is None:
            for source in self.mixture.sources:
                for problem in source.problems:
                    self.ledger.record(problem, where=problem.id, write=self.rank == 0)
        notes = make_notes(max(self.config.num_workers, 1) + 1)  # the last one is the planner's
        with contextlib.closing(self._plans(notes)) as plans:
            orders = Orders(plans, self.rank, self.world_size)
            maker = PackMaker(self.mixture, self.processor, self.rank, notes, self.casualties)
            deliveries = _start(maker, orders, self.config)
            restarts = 0
            try:
                while True:
                    failure: Exception | None = None
                    try:
                        delivery = _wait(deliveries, self.config.timeout_s, notes)
                        if delivery is None and orders.failure is not None:
                            failure = orders.failure
                    except RuntimeError as error:
                        failure = error
                    if failure is not None:
                        restarts = self._after(failure, orders, notes, restarts)
                        _kill(notes)
                        deliveries = iter(())  # ends torch's bookkeeping of the workers before others start
                        forget_workers(notes)
                        deliveries = _start(maker, orders, self.config)
                        continue
                    restarts = 0
                    if delivery is None:
                        return
                    self._account(delivery, orders)
                    if not isinstance(delivery.batch, PackedBatch):
                        return
                    yield delivery.batch
            finally:
                _kill(notes)  # torch would wait 5 s for a busy worker, the interpreter TERM_GRACE_S after its SIGTERM
                del deliveries  # ends torch's bookkeeping of the workers before an error is handled

    def _plans(self, notes: Notes) -> Plans:
        """Start the planner, or join the one of this machine."""
        planner = make_planner(self.mixture, self.processor, self.config, self.world_size)
        shared = self.node is not None and self.node.local_size > 1
        if not self.config.num_workers and not shared:
            return LocalPlans(planner, self._state, self.world_size)
        self._runs += 1
        return start_planner(
            planner,
            self._state,
            self.world_size,
            notes=notes,
            timeout_s=self.config.timeout_s,
            start_method=self.config.start_method,
            node=self.node if shared else None,
            run=self._runs,
        )

    def _account(self, delivery: Delivery, orders: Orders) -> None:
        """Update ledger, report and state for the pack that is about to be handed out."""
        step, micro, samples = orders.sent.popleft()
        orders.plans.free([one.place for one in samples or [] if one.place is not None])
        self._state = {"planner": step.before, "used": (micro + 1) * self.world_size}
        if micro == 0:
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

    def _after(self, failure: Exception, orders: Orders, notes: Notes, restarts: int) -> int:
        """What follows a failure: a warning and the number of restarts of the workers, or the error that ends the run.

        Args:
            restarts: in sequence so far.

        Raises:
            Exception: a mistake in the code; the planner died; no worker is to blame; too many restarts.
        """
        text = str(failure)
        hung = "no pack came" in text
        if not isinstance(failure, RuntimeError) or not (
            hung or "exited unexpectedly" in text or "killed by signal" in text
        ):
            raise failure
        known = [(f"loader worker {worker}", note) for worker, note in enumerate(read_notes(notes))]
        known[-1] = ("planner", known[-1][1])
        guilty = [(name, note) for name, note in known if _is_guilty(note, hung, self.config.timeout_s)]
        doing = "; ".join(f"{name} ({note})" for name, note in guilty or known)
        error = RuntimeError(f"rank {self.rank}: {text}\nlast known: {doing}")
        planner = failure is orders.failure or any(name == "planner" for name, _ in guilty)
        if planner or not guilty or restarts == MOST_RESTARTS:
            raise error
        lost = self.casualties.blame([note for _, note in guilty], "worker_hung" if hung else "worker_died")
        what = f"{', '.join(note.name for note in lost)} is rejected" if lost else "no sample is rejected"
        warnings.warn(f"{error}\nThe workers are replaced; {what}.", RuntimeWarning, stacklevel=3)
        return restarts + 1


def _is_guilty(note: Note, hung: bool, timeout_s: float) -> bool:
    """Whether a process may be the reason: it is dead, or stopped, or does the same for half of the timeout."""
    if hung:
        return is_stopped(note.pid) or bool(note.doing) and time.monotonic() - note.since > timeout_s / 2
    return note.pid > 0 and note.pid not in {child.pid for child in multiprocessing.active_children()}


def needs(mixture: Mixture, config: LoaderConfig) -> list[str]:
    """What a rank's loader takes at most: memory for packs, and the planner's file for rows of Parquet."""
    lines = []
    if config.num_workers:
        packs = config.num_workers * config.prefetch + config.accumulation
        size = config.tokens_per_pack * BYTES_A_TOKEN
        lines.append(
            f"loader: {config.num_workers} workers; at most {packs} packs of {size / 1e6:.0f} MB wait, "
            f"{packs * size / 1e9:.2g} GB of memory for this rank (none of it in /dev/shm)"
        )
    tables = [t for source in mixture.sources for t in with_ranges(source).tables if isinstance(t, ParquetTable)]
    if tables:
        sizes = [sum(t.block_rows) * BLOCK if t.has_ranges else t.path.stat().st_size for t in tables]
        mean = sum(sizes) / max(1, sum(sum(table.block_rows) for table in tables))
        rows = mixture.config.shuffle_buffer + config.buffer_samples
        folder = tempfile.gettempdir()
        wanted = rows * mean / 1e9
        free = shutil.disk_usage(folder).free / 1e9
        lines.append(
            f"loader: {rows} rows of Parquet wait in a file of about {wanted:.2g} GB in {folder} ({free:.0f} free)"
        )
        if wanted > 0.9 * free:
            lines.append("WARNING: set TMPDIR to a folder on a larger local disk, or lower data.shuffle_buffer")
    return lines


class Orders:
    """The packs of one rank, as the samples that they will have, from the steps of a planner; None is the end.

    Attributes:
        plans: the steps.
        sent: (step without its samples, micro-step, samples) of every order that is not delivered yet. New workers
            begin with these.
        failure: what ended the plans. It is raised when the packs that were ordered before have been handed out.
    """

    def __init__(self, plans: Plans, rank: int, world_size: int) -> None:
        self.plans = plans
        self.rank = rank
        self.world_size = world_size
        self.sent: deque[tuple[Step, int, list[Planned] | None]] = deque()
        self.failure: Exception | None = None
        self._others = self._from_plans()

    def __iter__(self) -> Iterator[list[Planned] | None]:
        return itertools.chain([samples for _, _, samples in self.sent], self._others)

    def _from_plans(self) -> Iterator[list[Planned] | None]:
        try:
            for step, first in self.plans:
                light = replace(step, packs=[])
                for micro in range(first, len(step.packs) // self.world_size):
                    samples = step.packs[micro * self.world_size + self.rank]
                    self.sent.append((light, micro, samples))
                    yield samples
                if not step.packs:
                    self.sent.append((light, 0, None))
                    yield None
                    return
        except Exception as error:
            self.failure = error


def _start(data: PackMaker, orders: Orders, config: LoaderConfig) -> Iterator[Delivery]:
    """Start the workers. Raises RuntimeError if /dev/shm has no room for their semaphores.

    torch installs a SIGCHLD handler that raises at an arbitrary line of the training loop when a worker dies. It is
    removed again: `_wait` finds the death when it asks for the next batch, where it can be explained.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    workers = config.num_workers
    steady = threading.current_thread() is threading.main_thread()
    loader: DataLoader = DataLoader(
        data,
        sampler=orders,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=config.prefetch if workers else None,
        pin_memory=config.pin_memory,
        timeout=min(POLL_S, config.timeout_s or POLL_S) if workers else 0,
        multiprocessing_context=config.start_method if workers else None,
        worker_init_fn=partial(start_worker, by_kernel=steady),
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
    if workers and steady:
        signal.signal(signal.SIGCHLD, handler)
    return deliveries


def _wait(deliveries: Iterator[Delivery], timeout_s: float, notes: Notes) -> Delivery | None:
    """The next delivery; None at the end. Every POLL_S seconds it checks that the workers are alive."""
    begun = time.monotonic()
    moved = begun
    while True:
        try:
            return next(deliveries, None)
        except RuntimeError as error:
            waited = time.monotonic() - begun
            if "DataLoader timed out" not in str(error):
                raise
            if not any(is_stopped(note.pid) for note in read_notes(notes)[:-1] if note.pid):
                moved = time.monotonic()
            elif time.monotonic() - moved > STOPPED_S:
                raise RuntimeError(f"no pack came within {waited:.0f} s: a signal has stopped a worker") from error
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
    node: Node | None = None,
) -> Loader:
    """Packed batches of one rank.

    Args:
        mixture: the sources (opened here once, before workers start), or an opened Mixture at its beginning.
        processor: a `Processor`.
        config: token budget, accumulation, workers.
        rank, world_size: this process among the data-parallel ones.
        state: from `Loader.state_dict()`. The number of workers may differ; at the end of a step, also that of ranks.
        ledger: records unusable samples; every rank needs a path of its own.
        node: the ranks of this machine, to share one planner, which reads every row once. They iterate together.
            None: this rank has a planner of its own.

    Raises:
        FileNotFoundError, ValueError: from `open_source`, or a state of other data. Iterating raises TooManyBadSamples,
            SampleError (strict ledger), and RuntimeError with rank, process and sample when a process dies.
    """
    opened = mixture if isinstance(mixture, Mixture) else open_mixture(mixture)
    loader = Loader(opened, processor, config, rank=rank, world_size=world_size, ledger=ledger, node=node)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def open_again(mixture: Mixture) -> Mixture:
    """The same mixture at its beginning. The opened files are shared; they hold offsets only."""
    return Mixture(mixture.sources, mixture.config)


def _kill(notes: Notes) -> None:
    """Kill the workers that wrote notes; a hanging one does not react to gentler signals."""
    pids = {note.pid for note in read_notes(notes)[:-1]}
    for child in multiprocessing.active_children():
        if child.pid in pids:
            child.kill()
