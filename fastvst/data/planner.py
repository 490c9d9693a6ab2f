"""Planner: the stream of steps that every worker of every rank computes alike, and the state from which it goes on.

A step is `packs_per_step` packs (world size x accumulation), planned together. Everything follows from the mixture's
seed and from `processor.measure`, which looks at text and picture headers only; so the same steps come out wherever the
planner runs, and the place in the stream is the planner's alone: ranks, accumulation and workers do not enter into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastvst.batch import Cost, EncodedSample
from fastvst.data.ledger import SampleError
from fastvst.data.mixture import Mixture, Ref
from fastvst.data.packing import Packer, PackingConfig
from fastvst.data.sample import Sample

ALL_BAD_LIMIT = 1000  # rows looked at in vain, one after the other, before the data are declared unusable
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
    """A sample with its place in a pack: reference, sample, cost."""

    ref: Ref
    sample: Sample
    cost: Cost


class BadSample(NamedTuple):
    """An unusable sample and where it stands ("file[block][row]")."""

    error: SampleError
    where: str


@dataclass(frozen=True)
class Step:
    """One planned step.

    Attributes:
        packs: `packs_per_step` lists of samples; at the end of a stream some may be empty.
        loads: (packs_per_step, 3) float64 tokens, patches, FLOPs.
        bad: samples met on the way that cannot be used.
        seen: rows looked at on the way, good and bad.
        before: the planner's state before this step; replaying it gives this step again.
        samples: in all packs.
        hopeless: nothing usable comes any more. Without packs and not hopeless: the stream ends here with bad rows.
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
    """See the module's text.

    Attributes:
        mixture: where rows come from.
        processor: measures them.
        packing: budget and buffer.
        packs_per_step: may be changed between two steps.
        watch: called with "source/id" before a sample is looked at, so that a crash can be attributed.
    """

    mixture: Mixture
    processor: Encoder
    packing: PackingConfig
    packs_per_step: int
    watch: Callable[[str], None] | None = None
    _packer: Packer = field(init=False, repr=False)
    _usable: bool = field(default=False, repr=False)  # a usable sample has come up, ever

    def __post_init__(self) -> None:
        self._packer = Packer(self.packing, self.packs_per_step)

    def next_step(self) -> Step | None:
        """The next step; None at the end of the stream."""
        self._packer.packs_per_step = self.packs_per_step
        before = self.state_dict()
        bad: list[BadSample] = []
        seen = useless = 0
        while self._packer.hungry:
            drawn = next(self.mixture, None)
            if drawn is None:
                break
            seen += 1
            outcome = self._measure(drawn.ref, drawn.sample)
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
        return Step(packs, loads, bad, seen, before, sum(len(p) for p in packs))

    def _measure(self, ref: Ref, sample: Sample | SampleError) -> Planned | SampleError:
        if isinstance(sample, SampleError):
            return sample
        if self.watch is not None:
            self.watch(f"{sample.source}/{sample.id}")
        try:
            cost = self.processor.measure(sample)
        except SampleError as error:
            return error
        except Exception as error:
            name = f"{sample.source}/{sample.id} ({self.mixture.where(ref)})"
            raise RuntimeError(f"measuring {name} failed with {type(error).__name__}: {error}") from error
        budget = self.packing.tokens_per_pack
        if cost.tokens > budget:
            detail = (
                f"{cost.tokens} tokens ({cost.patches // 4} of pictures), but a pack holds {budget}; never truncated"
            )
            return SampleError("too_long", sample.source, sample.id, detail)
        return Planned(ref, sample, cost)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, some tens of KB: the mixture's state and the references of the buffered samples."""
        return {
            "mixture": self.mixture.state_dict(),
            "buffer": [list(item.ref) for item in self._packer.items],
            "packing": asdict(self.packing),
            "packs_per_step": self.packs_per_step,
            "usable": self._usable,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state: rows in the buffers are read and measured again.

        Raises:
            ValueError: the state belongs to another mixture or packing, or a buffered row is not usable any more.
        """
        self.check_state(state)
        self.mixture.load_state_dict(state["mixture"])
        self._usable = bool(state["usable"])
        self._packer = Packer(self.packing, self.packs_per_step)
        for drawn in self.mixture.read([Ref(*ref) for ref in state["buffer"]]):
            planned = self._measure(drawn.ref, drawn.sample)
            if isinstance(planned, SampleError):
                raise ValueError(f"a sample was usable when the state was saved and is not now: {planned}")
            self._packer.add(planned, planned.cost)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state belongs to another mixture or packing. Reads nothing."""
        if state["packing"] != asdict(self.packing):
            raise ValueError(
                f"the saved data state was made with {state['packing']}, now it is {asdict(self.packing)}; resume with "
                "the same packing, or start the data anew"
            )
        self.mixture.check_state(state["mixture"])
