"""Success of a policy in simulators: the protocol of the published LIBERO evaluations, and Meta-World's tasks.

A policy is a function of observations that returns a chunk of actions for each of them; playing.py calls it. Every
finished episode is a line of OUT/episodes.jsonl, so that a killed run continues and no episode is played twice.

LIBERO (arXiv 2306.03310), as OpenVLA (arXiv 2406.09246) evaluates it: 50 trials of each task from the stored initial
states 0 to 49, the simulator's seed 0, at most 220 / 280 / 300 / 520 steps, and the mean of the tasks' success rates.
Meta-World (arXiv 1910.10897) draws the initial state from a seed; evaluations have other seeds than demonstrations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst import atomic, jsonl
from fastvst.evaluate.episode_report import EpisodeReport, EpisodeResult
from fastvst.evaluate.episodes_page import film_of, write_page
from fastvst.evaluate.playing import Episode, EpisodeTask, Player, Rules
from fastvst.evaluate.statistics import wilson
from fastvst.vla.actions import ActionError
from fastvst.vla.replies import Observation
from fastvst.vla.simulators import SimulatorConfig, mujoco_note

Policy = Callable[[Sequence[Observation]], Sequence[np.ndarray | ActionError]]
LIBERO_STEPS = {"spatial": 220, "object": 280, "goal": 300, "long": 520, "10": 520, "90": 400}
LIBERO_TASKS = {"90": 90}  # the other suites have 10
METAWORLD_STEPS = 200  # the experts take 40 to 110
TRIALS = 50
FILMS = 3  # failed episodes of a task, and as many successful ones, that are saved as animations
FRAMES = 100  # of an animation
FILM_SIZE = 128  # pixels
FILM_MS = 80  # of a frame


def libero_tasks(suite: str, trials: int = TRIALS, **simulator: Any) -> list[EpisodeTask]:
    """The tasks of a suite of LIBERO with the published step limits.

    Args:
        suite: "spatial", "object", "goal", "long", "90", or one of LIBERO-PRO such as "libero_goal_swap", whose limit
            is that of the suite it varies.
        simulator: fields of SimulatorConfig; `environment` is added to suite and task.
    """
    base = suite.removeprefix("libero_").partition("_")[0]
    if base not in LIBERO_STEPS:
        raise ValueError(f"there is no step limit for the suite {suite!r}; expected one of {', '.join(LIBERO_STEPS)}")
    more = dict(simulator.pop("environment", {}))
    return [
        EpisodeTask(
            f"{suite}-{number}",
            SimulatorConfig("libero", {"suite": suite, "task": number, **more}, **simulator),
            trials,
            LIBERO_STEPS[base],
            stored_states=True,
        )
        for number in range(LIBERO_TASKS.get(base, 10))
    ]


def metaworld_tasks(names: Iterable[str], trials: int = TRIALS, **simulator: Any) -> list[EpisodeTask]:
    """Tasks of Meta-World; `simulator` as for `libero_tasks`."""
    more = dict(simulator.pop("environment", {}))
    return [
        EpisodeTask(name, SimulatorConfig("metaworld", {"task": name, **more}, **simulator), trials, METAWORLD_STEPS)
        for name in names
    ]


@dataclass(eq=False)
class _FilmedEpisode(Episode):
    """An episode of an evaluation.

    Attributes:
        frames: what the first camera saw, every `stride`-th observation.
    """

    frames: list[np.ndarray] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def begin(self) -> None:
        self.frames = []
        self.stride = 1
        self.seen = 0
        super().begin()

    def saw(self, observation: Observation) -> None:
        """Keep the image, or every second one once there are FRAMES of them."""
        super().saw(observation)
        if self.seen % self.stride == 0:
            self.frames.append(next(iter(observation.images.values())))
        if len(self.frames) >= FRAMES:
            self.frames = self.frames[::2]
            self.stride *= 2
        self.seen += 1


class Episodes:
    """Plays the episodes of an evaluation that are not finished.

    Attributes:
        results: (task, trial) -> result.
    """

    def __init__(self, tasks: Sequence[EpisodeTask], out: str | Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
            tasks: with unique names.
            out: folder of episodes.jsonl, results.json, report.html and the animations.
            settings: what the policy's answers depend on (checkpoint, codec, seed), as JSON can hold it.

        Raises:
            ValueError: `out` has episodes of other settings.
        """
        self.tasks = {task.name: task for task in tasks}
        if not tasks or len(self.tasks) != len(tasks) or min(task.trials for task in tasks) < 1:
            raise ValueError(f"expected tasks with unique names and at least one trial, got {[t.name for t in tasks]}")
        self.out = Path(out)
        self.file = self.out / "episodes.jsonl"
        self.settings = settings
        self.results: dict[tuple[str, int], EpisodeResult] = {}
        for row in jsonl.read(self.file) if self.file.exists() else []:
            task = self.tasks.get(row["task"])
            if task is None or row["trial"] >= task.trials:
                continue
            asked = self._settings(task)
            if row["settings"] != asked:
                raise ValueError(
                    f"{self.file} has episodes of {json.dumps(row['settings'])}, not {json.dumps(asked)}; "
                    "choose another folder, or delete it"
                )
            fields = {name: value for name, value in row.items() if name != "settings"}
            self.results[row["task"], row["trial"]] = EpisodeResult(**{**fields, "faults": tuple(row["faults"])})

    def play(self, policy: Policy, *, simulators: int = 1, log: Callable[[str], object] = print) -> EpisodeReport:
        """Play what is not finished, and report all.

        Args:
            policy: called with the observations that are ready, returns for each of them actions (steps, dims) in the
                units of the simulator, or an ActionError, which ends the episode without success.
            simulators: processes that play at a time.

        Raises:
            SimulatorError: a simulator cannot start, or ends or hangs ATTEMPTS times while it starts.
            ValueError: actions of another shape, or not finite; another version of the simulator.
        """
        waiting = {
            name: [trial for trial in range(task.trials) if (name, trial) not in self.results]
            for name, task in self.tasks.items()
        }
        log(f"{len(self.results)} episodes are finished, {sum(map(len, waiting.values()))} are not")

        def ended(episode: _FilmedEpisode, success: bool, failure: str) -> None:
            self._finish(episode, success=success, failure=failure)
            log(self._line(episode))

        rules = Rules(_FilmedEpisode, lambda _, seen: policy(seen), self._check_simulator, ended, log)
        with Player(self.tasks, rules) as player:
            player.play(waiting, simulators)
        report = self.report()
        atomic.write_text(self.out / "results.json", json.dumps(report.summary(), indent=1) + "\n")
        log(f"report: {write_page(self.out, report, self.settings)}")
        if report.note:
            log(f"warning: {report.note}")
        return report

    def report(self) -> EpisodeReport:
        """The rates of the tasks that have finished episodes."""
        results = [self.results[key] for key in sorted(self.results)]
        rates = {}
        for name in self.tasks:
            ended = [result.success for result in results if result.task == name]
            if ended:
                rates[name] = wilson(sum(ended) / len(ended), len(ended))
        if not rates:
            raise ValueError("no episode is finished")
        mean = wilson(sum(rate.mean for rate in rates.values()) / len(rates), len(results))
        notes = {mujoco_note(result.versions) for result in results} - {""}
        return EpisodeReport(rates, mean, results, "; ".join(sorted(notes)))

    def _finish(self, episode: _FilmedEpisode, *, success: bool, failure: str = "") -> None:
        name = episode.task.name
        films = len([one for one in self.results.values() if one.task == name and one.success == success])
        if episode.frames and films < FILMS:
            save_film(episode.frames, self.out / film_of(name, episode.trial, success=success))
        known = episode.simulator.versions
        spent = round(time.monotonic() - episode.began, 3)
        faults = tuple(episode.faults)
        result = EpisodeResult(name, episode.trial, success, episode.steps, failure, faults, known, spent)
        self.results[name, episode.trial] = result
        jsonl.append(self.file, [{**asdict(result), "settings": self._settings(episode.task)}])

    def _check_simulator(self, episode: _FilmedEpisode) -> None:
        """Raise ValueError if earlier episodes are of another version, or the task has too few initial states."""
        stored = episode.simulator.description.initial_states
        if episode.task.stored_states and stored is not None and episode.task.trials > stored:
            raise ValueError(f"{episode.task.trials} trials of {episode.task.name}, which has {stored} initial states")
        known = episode.simulator.versions
        for result in self.results.values():
            if result.task == episode.task.name and result.versions and dict(result.versions) != known:
                raise ValueError(f"{self.file} has episodes of {dict(result.versions)}; the simulator is {known} now")

    def _settings(self, task: EpisodeTask) -> dict[str, Any]:
        return json.loads(json.dumps({**self.settings, "task": task.settings}, default=list))

    def _line(self, episode: _FilmedEpisode) -> str:
        ended = [one for one in self.results.values() if one.task == episode.task.name]
        good = sum(one.success for one in ended)
        result = self.results[episode.task.name, episode.trial]
        how = "success" if result.success else result.failure or "no success"
        return f"{episode}: {how} after {result.steps} steps; {good} of {len(ended)} so far"


def save_film(frames: Sequence[np.ndarray], path: Path) -> None:
    """Save images (height, width, 3) uint8 as an animation of at most FILM_SIZE pixels."""
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    for image in images:
        image.thumbnail((FILM_SIZE, FILM_SIZE))
    with atomic.file(path) as partial:
        images[0].save(partial, "WEBP", save_all=True, append_images=images[1:], duration=FILM_MS, loop=0)
