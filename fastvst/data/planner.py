"""Planner: the stream of training steps, the same for every rank that computes it, and its saved state.

A step is `packs_per_step` packs (world size x accumulation), planned together. The steps depend on the mixture's seed
and on `processor.measure`, which reads only text and image headers. They are therefore the same wherever the planner
runs, and the position in the stream does not depend on ranks, accumulation or workers. A row is measured when it is
read; the shuffle buffer and the packer keep its reference and its cost, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastvst.batch import Cost, EncodedSample
from fastvst.data.ledger import SampleError
from fastvst.data.mixture import Mixture, Ref
from fastvst.data.packing import Packer, PackingConfig
from fastvst.data.sample import Sample
from fastvst.data.sources.source import with_ranges
from fastvst.data.spool import Place, Spool

ALL_BAD_LIMIT = 1000  # unusable rows in sequence that end the run; or all rows once, after a usable one was found
NO_LOADS = np.zeros((0, 3))


class Encoder(Protocol):
    """The two methods of `Processor` that the data stream needs."""

    def measure(self, sample: Sample) -> Cost:
        """Cost of a sample without decoding pixels; raises SampleError."""
        ...

    def encode(self, sample: Sample) -> EncodedSample:
        """The sample as tensors, with exactly that cost; raises SampleError."""
        ...


class Planned(NamedTuple):
    """A sample of a pack.

    Attributes:
        ref: its reference.
        cost: its cost.
        place: where it waits if it cannot be read alone.
        read: rows that the stream had read when its step was planned; with `ref` it tells repetitions of a row apart.
    """

    ref: Ref
    cost: Cost
    place: Place | None = None
    read: int = 0


class BadSample(NamedTuple):
    """An unusable sample and its location ("file[block][row]")."""

    error: SampleError
    where: str


@dataclass(frozen=True)
class Step:
    """One planned step.

    Attributes:
        packs: `packs_per_step` lists of samples; at the end of a stream some may be empty.
        loads: (packs_per_step, 3) float64 tokens, patches, FLOPs.
        bad: unusable samples read while planning this step.
        seen: rows read while planning this step, good and bad.
        before: the planner's state before this step; a planner that loads it makes this step again.
        samples: number of samples in all packs.
        hopeless: True if no usable sample is left to expect. A step without packs that is not hopeless ends the stream.
    """

    packs: list[list[Planned]]
    loads: np.ndarray
    bad: list[BadSample]
    seen: int
    before: dict[str, Any]
    samples: int = 0
    hopeless: bool = False


@dataclass
class Planner:
    """Reads rows, measures them and plans steps.

    Attributes:
        mixture: the source of the rows; the planner makes its own from it, at its beginning.
        processor: measures the rows.
        packing: token budget and buffer size.
        packs_per_step: may be changed between two steps.
        watch: called with "source/id" before a sample is measured, so that a crash can be attributed to it.
        spool: keeps samples that cannot be read alone; None: they are read again with their neighbours.
    """

    mixture: Mixture
    processor: Encoder
    packing: PackingConfig
    packs_per_step: int
    watch: Callable[[str], None] | None = None
    spool: Spool | None = None
    _packer: Packer = field(init=False, repr=False)
    _usable: bool = field(default=False, repr=False)  # at least one usable sample was found

    def __post_init__(self) -> None:
        self._packer = Packer(self.packing, self.packs_per_step)
        sources = [with_ranges(source) for source in self.mixture.sources]
        self.mixture = Mixture(sources, self.mixture.config, self._measure)

    def next_step(self) -> Step | None:
        """The next step; None at the end of the stream."""
        self._packer.packs_per_step = self.packs_per_step
        before = self.state_dict()
        bad: list[BadSample] = []
        seen = useless = 0
        while self._packer.needs_samples:
            drawn = next(self.mixture, None)
            if drawn is None:
                break
            seen += 1
            outcome = drawn.sample
            if isinstance(outcome, SampleError):
                bad.append(BadSample(outcome, self.mixture.where(drawn.ref)))
                useless += 1
                if useless >= (max(ALL_BAD_LIMIT, len(self.mixture)) if self._usable else ALL_BAD_LIMIT):
                    return Step([], NO_LOADS, bad, seen, before, hopeless=True)
                continue
            useless = 0
            self._usable = True
            self._packer.add(outcome, outcome.cost)
        if not len(self._packer):
            return Step([], NO_LOADS, bad, seen, before, hopeless=not self._usable) if bad else None
        packs, loads = self._packer.plan()
        packs = [[planned._replace(read=self.mixture.rows_read) for planned in one] for one in packs]
        return Step(packs, loads, bad, seen, before, sum(len(p) for p in packs))

    def _measure(self, ref: Ref, sample: Sample | SampleError) -> Planned | SampleError:
        if isinstance(sample, SampleError):
            return sample
        if self.watch is not None:
            self.watch(f"{sample.source}/{sample.id}")
        try:
            cost = self.examine(sample)
        except SampleError as error:
            return error
        except Exception as error:
            name = f"{sample.source}/{sample.id} ({self.mixture.where(ref)})"
            raise RuntimeError(f"measuring {name} failed with {type(error).__name__}: {error}") from error
        if self.spool is None or self.mixture.sources[ref.source].has_single_rows:
            return Planned(ref, cost)
        return Planned(ref, cost, self.spool.put(sample))

    def examine(self, sample: Sample) -> Cost:
        """The cost of a sample that fits into a pack. Raises SampleError for one that cannot be used."""
        cost = self.processor.measure(sample)
        budget = self.packing.tokens_per_pack
        if cost.tokens > budget:
            detail = f"{cost.tokens} tokens ({cost.patches // 4} of images), but a pack holds {budget}; never truncated"
            raise SampleError("too_long", sample.source, sample.id, detail)
        return cost

    def state_dict(self) -> dict[str, Any]:
        """The mixture's state and the references of the buffered samples; JSON-able, some tens of KB."""
        return {
            "mixture": self.mixture.state_dict(),
            "buffer": [list(item.ref) for item in self._packer.items],
            "packing": asdict(self.packing),
            "packs_per_step": self.packs_per_step,
            "usable": self._usable,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the buffered rows are read and measured again.

        Raises:
            ValueError: the state belongs to another mixture or packing, or a buffered row is no longer usable.
        """
        self.check_state(state)
        buffered = self.mixture.load_state_dict(state["mixture"], [Ref(*ref) for ref in state["buffer"]])
        self._usable = bool(state["usable"])
        self._packer = Packer(self.packing, self.packs_per_step)
        for _, planned in buffered:
            if isinstance(planned, SampleError):
                raise ValueError(f"a sample that was usable when the state was saved is unusable now: {planned}")
            self._packer.add(planned, planned.cost)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state belongs to another mixture or packing. No row is read."""
        if state["packing"] != asdict(self.packing):
            raise ValueError(
                f"the saved data state was made with {state['packing']}, now it is {asdict(self.packing)}; resume with "
                "the same packing, or start the data anew"
            )
        self.mixture.check_state(state["mixture"])


def steps_from(planner: Planner, state: dict[str, Any] | None, world_size: int) -> Iterator[tuple[Step, int]]:
    """Steps after a loader's state (None: from the beginning), each with its first micro-step that was not used yet.

    Raises:
        ValueError: the state is in the middle of a step that cannot be divided among this number of ranks.
    """
    now = planner.packs_per_step
    if state is not None and state["planner"] is not None:
        saved = state["planner"]["packs_per_step"]
        used = state["used"]
        if used < saved and (saved != now or used % world_size):
            raise ValueError(
                f"the data state was saved after {used} of a step's {saved} packs and cannot be resumed with "
                f"{world_size} ranks and {now} packs a step: keep world size x accumulation, or resume from the end "
                "of a step"
            )
        planner.packs_per_step = saved
        planner.load_state_dict(state["planner"])
        step = planner.next_step()
        if step is None:
            raise ValueError("the data state names a step that the data no longer have")
        planner.packs_per_step = now
        if used < saved:
            yield step, used // world_size
    while (step := planner.next_step()) is not None:
        yield step, 0
