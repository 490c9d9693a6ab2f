"""One stream of prompts for a step of RL: which prompt starts when and on which rank, and which groups the update uses.

Here is only logic: no model, no clock, no communication. Every rank holds the same `GroupStream` and tells it the same
figures of all ranks at every tick, so all ranks decide alike. A simulation drives it as the trainer does.

**Which groups.** The update uses the first `target` kept groups in the order of the data, not the first ones that end.
The first ones that end are those with short completions, and a policy that never learns from its long ones becomes
short. The order also makes the choice independent of time: the same seed gives the same groups, however slow a reward
is and however many ranks there are.

**How many run.** A prompt starts as long as the groups that are kept so far, and the expected share of those that run,
do not fill the update. So when the last group of the update is decided, few others run. These are cancelled and asked
again in the next step, or parked: then prompts start wherever there is room, and the next step continues them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

RUNNING = 0  # not decided: it waits, runs or is being scored
KEPT = 1
DROPPED = 2


@dataclass
class GroupStream:
    """The groups of one step, numbered 0, 1, ... in the order of the data.

    Attributes:
        target: groups of an update.
        most: groups that may start in the step; 1 x target replaces no dropped group.
        answers: completions of a group.
        slots: completions that a rank may have unfinished.
        ranks: number of ranks.
        park: fill all slots, because what is left over continues in the next step.
        prior: expected share of kept groups, with the weight of `prior_groups` decided ones.
        verdicts: RUNNING, KEPT or DROPPED for each started group.
        places: the rank of each started group.
        unfinished: completions of each rank that have not ended.
        load: expected tokens that each rank still has to compute.
    """

    target: int
    most: int
    answers: int
    slots: int
    ranks: int = 1
    park: bool = False
    prior: float = 1.0
    prior_groups: int = 0
    verdicts: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unfinished = self.unfinished or [0] * self.ranks
        self.load = self.load or [0.0] * self.ranks

    @property
    def share(self) -> float:
        """Expected share of kept groups: that of this step, and the prior."""
        decided = len(self.verdicts) - self.verdicts.count(RUNNING) + self.prior_groups
        return (self.verdicts.count(KEPT) + self.prior * self.prior_groups) / decided if decided else 1.0

    def wants(self) -> bool:
        """Whether the next prompt of the data starts now."""
        if len(self.verdicts) >= self.most or min(self.unfinished) + self.answers > self.slots:
            return False
        expected = self.verdicts.count(KEPT) + self.share * self.verdicts.count(RUNNING)
        return self.park or expected < self.target

    def start(self, tokens: float) -> int:
        """Start the next prompt on the rank with the least load among those with a free slot; returns the rank.

        Args:
            tokens: expected tokens of the prompt and all of its completions.
        """
        free = [r for r in range(self.ranks) if self.unfinished[r] + self.answers <= self.slots]
        rank = min(free, key=lambda r: (self.load[r], r))
        self.place(rank, tokens)
        return rank

    def place(self, rank: int, tokens: float) -> None:
        """Start the next prompt on a rank that is given, as a parked one on the rank that has its tokens."""
        self.verdicts.append(RUNNING)
        self.places.append(rank)
        self.unfinished[rank] += self.answers
        self.load[rank] += tokens

    def tick(self, verdicts: Sequence[int], unfinished: Sequence[int], load: Sequence[float]) -> None:
        """Take over what has happened since the last tick, summed over all ranks.

        Args:
            verdicts: KEPT or DROPPED for each started group that was decided since, else RUNNING.
            unfinished, load: of every rank.
        """
        self.verdicts = [old or new for old, new in zip(self.verdicts, verdicts, strict=True)]
        self.unfinished = list(unfinished)
        self.load = list(load)

    def end_data(self) -> None:
        """There is no further prompt."""
        self.most = len(self.verdicts)

    @property
    def used(self) -> int | None:
        """Number of groups, from the first one on, that the step uses up; None while that is not decided.

        It ends with the group that fills the update, or with the last group that may start.
        """
        kept = 0
        for number, verdict in enumerate(self.verdicts):
            if verdict == RUNNING:
                return None
            kept += verdict == KEPT
            if kept == self.target:
                return number + 1
        return self.most if len(self.verdicts) == self.most else None
