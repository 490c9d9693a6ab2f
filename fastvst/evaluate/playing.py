"""Episodes in simulators that run at the same time: whose turn it is, what follows a fault, which episode comes next.

The evaluation (episodes.py) and reinforcement learning (fastvst/rl/episodes.py) play with it. Observations that are
ready form the next batch of a policy; simulators compute the other episodes in the meantime. A chunk of actions is
executed without looking (open loop) until the goal is reached or the steps are over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from fastvst.vla.actions import ActionError
from fastvst.vla.demonstrations import FIRST_EVALUATION_SEED
from fastvst.vla.replies import Observation, SimulatorError
from fastvst.vla.simulators import Simulator, SimulatorConfig, wait_any

ATTEMPTS = 3  # of an episode whose simulator fails

E = TypeVar("E", bound="Episode")
Waiting = dict[str, list[int]]  # task -> trials that are not played yet


@dataclass(frozen=True)
class EpisodeTask:
    """A task and its trials.

    Attributes:
        name: unique name.
        simulator: its environment.
        trials: episodes.
        max_steps: steps after which an episode has failed.
        stored_states: trial k starts from the stored initial state k with seed 0; else from a seed of its own.
        first_seed: the seed of trial 0.
        group: so many consecutive trials start from the same initial state.
    """

    name: str
    simulator: SimulatorConfig
    trials: int
    max_steps: int
    stored_states: bool = False
    first_seed: int = FIRST_EVALUATION_SEED
    group: int = 1

    def start(self, trial: int) -> tuple[int, int]:
        """(seed, initial state) of a trial."""
        number = trial // self.group
        return (0, number) if self.stored_states else (self.first_seed + number, 0)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for episodes of one evaluation."""
        environment = {"program": self.simulator.program, **self.simulator.environment}
        return {**environment, "max_steps": self.max_steps, "stored_states": self.stored_states}


@dataclass(eq=False)
class Episode:
    """An episode that is played.

    Attributes:
        steps: steps taken since the reset.
        faults: of its simulator, after each of which it began again.
        began: time.monotonic() of the reset.
    """

    task: EpisodeTask
    trial: int
    simulator: Simulator
    steps: int = 0
    faults: list[str] = field(default_factory=list)
    began: float = 0.0

    def __str__(self) -> str:
        return f"{self.task.name}, trial {self.trial}"

    def begin(self) -> None:
        """Ask the simulator for the initial state."""
        self.steps = 0
        self.began = time.monotonic()
        self.simulator.begin_reset(*self.task.start(self.trial))

    def saw(self, observation: Observation) -> None:
        """Take an observation."""
        self.steps += observation.steps


@dataclass(frozen=True)
class Rules(Generic[E]):
    """What a player asks and tells.

    Attributes:
        make: the class of the episodes.
        act: chunks (steps, dims) of actions for the observations of some episodes, in the units of the simulator, or an
            ActionError, which ends the episode without success.
        saw: called after every observation.
        ended: called with an episode that is over, its success, and why it could not be finished; "" if it ran to its
            end.
        log: called with lines about faults.
    """

    make: Callable[[EpisodeTask, int, Simulator], E]
    act: Callable[[Sequence[E], Sequence[Observation]], Sequence[np.ndarray | ActionError]]
    saw: Callable[[E], object]
    ended: Callable[[E, bool, str], object]
    log: Callable[[str], object]


class Player(Generic[E]):
    """Plays episodes of tasks; each simulator plays one after another.

    `play` may be called again: with `keep` the simulators stay until `close`.
    """

    def __init__(
        self, tasks: dict[str, EpisodeTask], rules: Rules[E], *, together: bool = False, keep: bool = False
    ) -> None:
        """
        Args:
            tasks: by their names.
            together: ask `act` only when every simulator has replied, in the order of tasks and trials. Then its
                batches depend on nothing but the episodes, not on how fast the simulators are.
        """
        self.tasks = tasks
        self.rules = rules
        self.together = together
        self.keep = keep
        self._idle: list[Simulator] = []
        self._ready: list[tuple[E, Observation]] = []

    def __enter__(self) -> Player[E]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the simulators that no episode uses."""
        while self._idle:
            self._idle.pop().close()

    def play(self, waiting: Waiting, simulators: int) -> None:
        """Play the episodes of `waiting`, which is empty afterwards.

        Args:
            simulators: processes that play at a time.

        Raises:
            SimulatorError: a simulator cannot start, or ends or hangs ATTEMPTS times while it starts.
            ValueError: actions of another shape, or not finite.
        """
        if simulators < 1:
            raise ValueError(f"{simulators} simulators; expected at least 1")
        playing: list[E] = []
        self._ready.clear()
        try:
            for _ in range(min(simulators, sum(map(len, waiting.values())))):
                playing.append(self._next(waiting, simulators))
            while playing:
                self._turn(playing, waiting, simulators)
        finally:
            for episode in playing:
                episode.simulator.close()

    def _turn(self, playing: list[E], waiting: Waiting, simulators: int) -> None:
        """Take the replies that are there, ask for actions where an episode continues, replace those that ended."""
        ended: list[E] = []
        at = {id(episode.simulator): episode for episode in playing if episode.simulator.busy}
        for episode in (at[id(simulator)] for simulator in wait_any([one.simulator for one in at.values()])):
            try:
                observation = episode.simulator.poll()
            except SimulatorError as error:
                if self._repeat(episode, error):
                    ended.append(episode)
                continue
            if observation is None:
                continue
            episode.saw(observation)
            self.rules.saw(episode)
            if observation.success or episode.steps >= episode.task.max_steps:
                self.rules.ended(episode, observation.success, "")
                ended.append(episode)
            else:
                self._ready.append((episode, observation))
        self._replace(ended, playing, waiting, simulators)
        if self._ready and not (self.together and any(episode.simulator.busy for episode in playing)):
            self._replace(self._act(), playing, waiting, simulators)

    def _act(self) -> list[E]:
        """Begin the steps that are answered to the observations that are ready; returns the episodes that end here."""
        ready = self._ready
        self._ready = []
        if self.together:
            ready.sort(key=lambda pair: (pair[0].task.name, pair[0].trial))
        chunks = self.rules.act([episode for episode, _ in ready], [observation for _, observation in ready])
        if len(chunks) != len(ready):
            raise ValueError(f"the policy has {len(chunks)} answers to {len(ready)} observations")
        ended = []
        for (episode, _), chunk in zip(ready, chunks, strict=True):
            if isinstance(chunk, ActionError):
                self.rules.ended(episode, False, f"action: {chunk}")
                ended.append(episode)
                continue
            try:
                episode.simulator.begin_step(np.asarray(chunk)[: episode.task.max_steps - episode.steps])
            except ValueError as error:
                raise ValueError(f"{episode}: {error}") from error
        return ended

    def _repeat(self, episode: E, error: SimulatorError) -> bool:
        """Begin an episode again after a fault of its simulator; True if that is over."""
        if error.code == "start":
            raise error
        episode.faults.append(str(error).partition("\n")[0])
        self.rules.log(f"{episode}: {episode.faults[-1]}; fault {len(episode.faults)} of {ATTEMPTS}")
        if len(episode.faults) >= ATTEMPTS:
            if not episode.simulator.versions:  # no simulator of the task has ever answered: all episodes would fail
                raise error
            self.rules.ended(episode, False, f"simulator: {episode.faults[-1]}")
            return True
        episode.begin()
        return False

    def _replace(self, ended: Sequence[E], playing: list[E], waiting: Waiting, simulators: int) -> None:
        """Begin another episode in the place of each one that ended, as long as any is waiting."""
        for episode in ended:
            place = playing.index(episode)
            self._idle.append(episode.simulator)
            if any(waiting.values()):
                playing[place] = self._next(waiting, simulators, episode.task.name)
            else:
                playing.pop(place)
            if not self.keep:
                self.close()

    def _next(self, waiting: Waiting, simulators: int, before: str = "") -> E:
        """Begin the next episode: of the task `before`, whose simulator runs, else of the task with the most episodes.

        A simulator of another task ends, if so many processes are there.
        """
        name = before if waiting.get(before) else max(waiting, key=lambda one: len(waiting[one]))
        task = self.tasks[name]
        found = next((one for one in self._idle if one.config == task.simulator), None)
        if found is None:
            found = Simulator(task.simulator)
            while len(self._idle) >= simulators:
                self._idle.pop(0).close()
        else:
            self._idle.remove(found)
        episode = self.rules.make(task, waiting[name].pop(0), found)
        episode.begin()
        return episode
