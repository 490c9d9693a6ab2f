"""The results of an evaluation in simulators (see episodes.py): every episode, and the rates of the tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastvst.evaluate.statistics import Interval


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode has ended.

    Attributes:
        success: the goal was reached.
        steps: steps taken.
        failure: why the episode could not be finished: the policy wrote no action, or the simulator failed ATTEMPTS
            times. "" if the episode ran to its end.
        faults: failures of the simulator, after each of which the episode was repeated from its initial state.
        versions: of the simulator.
        seconds: by the clock, from the reset to the end, with the policy's answers.
    """

    task: str
    trial: int
    success: bool
    steps: int
    failure: str = ""
    faults: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class EpisodeReport:
    """The results of an evaluation.

    Attributes:
        tasks: task -> success rate with Wilson's 95 % interval. An episode that could not be finished is no success.
        mean: the mean over the tasks; the interval takes all episodes as trials of one rate.
        results: all episodes.
        note: a warning about the version of the simulator, or "".
    """

    tasks: Mapping[str, Interval]
    mean: Interval
    results: Sequence[EpisodeResult]
    note: str

    @property
    def seconds_per_step(self) -> float:
        """By the clock, of one simulator, with resets and the policy's answers; several simulators run at a time."""
        timed = [one for one in self.results if one.seconds]
        return sum(one.seconds for one in timed) / max(1, sum(one.steps for one in timed))

    def summary(self) -> dict[str, Any]:
        """The content of results.json."""
        versions: dict[str, set[str]] = {}
        for name, version in ((n, v) for result in self.results for n, v in result.versions.items()):
            versions.setdefault(name, set()).add(version)
        return {
            "mean": asdict(self.mean),
            "tasks": {name: asdict(rate) for name, rate in self.tasks.items()},
            "episodes": len(self.results),
            "steps": sum(result.steps for result in self.results),
            "seconds_per_step": self.seconds_per_step,
            "unfinished": {f"{r.task} {r.trial}": r.failure for r in self.results if r.failure},
            "simulator_faults": dict(Counter(why.partition(":")[0] for r in self.results for why in r.faults)),
            "versions": {name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
            "note": self.note,
        }

    def text(self) -> str:
        """A table for the terminal."""
        lines = [f"{name:32} {rate_text(rate):>22}" for name, rate in self.tasks.items()]
        lines.append(f"{'mean over tasks':32} {rate_text(self.mean):>22}  {len(self.results)} episodes")
        lines.append(f"{self.seconds_per_step:.3g} s a step of one simulator, with resets and the policy's answers")
        lines += [f"{r.task} {r.trial} could not be finished: {r.failure}" for r in self.results if r.failure]
        return "\n".join([*lines, *([f"warning: {self.note}"] if self.note else [])])


def rate_text(rate: Interval) -> str:
    """A rate with its interval in percent."""
    return f"{100 * rate.mean:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
