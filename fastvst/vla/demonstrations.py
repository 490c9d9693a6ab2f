"""Demonstrations of a simulator's scripted expert, as HDF5 files in the layout of LIBERO's published ones.

A file has one task: data/demo_N/{actions, states, robot_states, rewards, dones, obs/{agentview_rgb, ...}}, and the
instruction in the attribute problem_info of data. As in LIBERO's files, images are stored turned by 180 degrees, and
observation t is what was seen before action t. `robot_states` is the proprioception of the simulator.

Every finished episode is a file of its own in OUT/.parts, so that a killed run continues. The seeds are consecutive; an
episode in which the expert fails is left out, and a further seed takes its place. Which seeds a file has does not
depend on the number of simulators.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvst import atomic, jsonl
from fastvst.vla.replies import Observation, SimulatorError
from fastvst.vla.simulators import Simulator, SimulatorConfig, wait_any

FIRST_EVALUATION_SEED = 1_000_000  # demonstrations have the seeds below, evaluations those from here on
ATTEMPTS = 3  # of an episode whose simulator fails
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")  # LIBERO's names of the first and the second camera
MOST_FAILED = 0.5  # share of the episodes without success that stops the command, after MIN_EPISODES
MIN_EPISODES = 10
GZIP = 1  # level; a Meta-World image takes 21 kB instead of 49


@dataclass
class _Task:
    """A task whose demonstrations are collected.

    Attributes:
        path: the finished file.
        parts: folder of the finished episodes.
        settings: what must be equal for episodes of one file, as JSON.
        good: seed -> file of the demonstration.
        failed: seed -> why there is none.
        versions: of the simulator, as JSON; "" before it has started.
    """

    name: str
    path: Path
    parts: Path
    settings: str
    good: dict[int, Path] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    versions: str = ""

    def load(self) -> None:
        """Find what an earlier run has left.

        Raises:
            ValueError: it was made with other settings, or by another version of the simulator.
        """
        if self.path.exists():
            with _h5py().File(self.path, "r") as stored:
                data = stored["data"]
                self._take(self.path, data.attrs)
                self.good.update({int(demo.attrs["seed"]): self.path for demo in data.values()})
                self.failed.update({int(seed): why for seed, why in json.loads(data.attrs["failed"]).items()})
        for path in sorted(self.parts.glob("*.hdf5")):
            with _h5py().File(path, "r") as stored:
                self._take(path, stored["data"].attrs)
            self.good[int(path.stem)] = path
        if (self.parts / "failed.jsonl").exists():
            self.failed.update({row["seed"]: row["why"] for row in jsonl.read(self.parts / "failed.jsonl")})

    def _take(self, path: Path, attributes: Any) -> None:
        found = attributes["settings"]
        if found != self.settings:
            raise ValueError(f"{path} was made with {found}, not {self.settings}; choose another folder, or delete it")
        self.check_versions(attributes["versions"])

    def check_versions(self, found: str) -> None:
        if self.versions and found != self.versions:
            raise ValueError(f"{self.path}: the simulator is {found}; earlier demonstrations are of {self.versions}")
        self.versions = found

    def fail(self, seed: int, why: str) -> None:
        """Note an episode without success.

        Raises:
            ValueError: there are too many.
        """
        self.failed[seed] = why
        jsonl.append(self.parts / "failed.jsonl", [{"seed": seed, "why": why}])
        ended = len(self.failed) + len(self.good)
        if ended >= MIN_EPISODES and len(self.failed) > MOST_FAILED * ended:
            raise ValueError(f"{self.name}: {len(self.failed)} of {ended} episodes failed; the last one: {why}")


@dataclass
class _Episode:
    """An episode that a simulator plays.

    Attributes:
        seen: observations so far; the first one is of the reset.
    """

    seed: int
    attempt: int = 1
    seen: list[Observation] = field(default_factory=list)


@dataclass(frozen=True)
class _Rules:
    """Arguments of `collect` that hold for every episode."""

    max_steps: int
    noise: float
    first_seed: int

    def noise_of(self, episode: _Episode, dims: int) -> np.ndarray:
        """(dims,) for the next step of an episode."""
        drawn = self.noise * np.random.default_rng([episode.seed, len(episode.seen)]).standard_normal(dims)
        drawn[-1] = 0.0
        return drawn


def collect(
    tasks: Mapping[str, SimulatorConfig],
    out: Path,
    episodes: int,
    *,
    simulators: int = 1,
    max_steps: int = 200,
    noise: float = 0.0,
    first_seed: int = 0,
    log: Callable[[str], object] = print,
) -> list[Path]:
    """Make `episodes` demonstrations of every task; what exists is kept.

    Args:
        tasks: name -> simulator, whose expert makes the demonstrations. The name is that of the file.
        simulators: processes that play at a time.
        max_steps: an episode without success in so many steps has failed.
        noise: standard deviation of what is added to all values of an action but the last (the gripper's) when it is
            taken; the action without noise is recorded. So the demonstrations show how to correct errors (DART, arXiv
            1703.09327). It follows from the seed of the episode and the step.
        first_seed: the first of the seeds; held-out demonstrations have others than those of training.
        log: called with lines about the progress.

    Returns:
        The files, one for each task.

    Raises:
        ImportError: h5py is missing.
        ValueError: `out` has demonstrations of other settings, or too many episodes fail.
        SimulatorError: a simulator cannot start.
    """
    if not 1 <= episodes <= FIRST_EVALUATION_SEED // 2:
        raise ValueError(f"{episodes} episodes; expected 1 to {FIRST_EVALUATION_SEED // 2}")
    if not 0 <= first_seed <= FIRST_EVALUATION_SEED // 2:
        raise ValueError(f"first_seed is {first_seed}; expected 0 to {FIRST_EVALUATION_SEED // 2}")
    if simulators < 1 or max_steps < 1:
        raise ValueError(f"{simulators} simulators and {max_steps} steps; expected at least 1")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}; expected a standard deviation from 0")
    _h5py()
    paths = []
    for name, config in tasks.items():
        settings = {"program": config.program, **config.environment, "max_steps": max_steps}
        settings |= {"noise": noise} if noise else {}
        settings |= {"first_seed": first_seed} if first_seed else {}
        path = out / f"{name}_demo.hdf5"
        task = _Task(name, path, out / ".parts" / name, json.dumps(settings, sort_keys=True, default=list))
        task.load()
        if len(task.good) < episodes or task.parts.exists():
            _play(task, config, episodes, min(simulators, episodes), _Rules(max_steps, noise, first_seed), log)
            _merge(task)
        shutil.rmtree(task.parts, ignore_errors=True)
        with contextlib.suppress(OSError):  # parts of other tasks
            task.parts.parent.rmdir()
        log(f"{path}: {len(task.good)} demonstrations, {len(task.failed)} failed episodes left out")
        paths.append(path)
    return paths


def _play(
    task: _Task, config: SimulatorConfig, episodes: int, count: int, rules: _Rules, log: Callable[[str], object]
) -> None:
    """Play until there are enough demonstrations."""
    seeds = _free_seeds(task, rules.first_seed)
    playing: dict[Simulator, _Episode] = {}
    idle = [Simulator(config) for _ in range(count)]
    everyone = list(idle)
    began = time.monotonic()
    steps = 0
    try:
        while len(task.good) < episodes or playing:
            while idle and len(task.good) + len(playing) < episodes:
                simulator = idle.pop()
                playing[simulator] = _Episode(next(seeds))
                simulator.begin_reset(playing[simulator].seed)
            for simulator in wait_any(list(playing)):
                episode = playing[simulator]
                if _advance(task, simulator, episode, rules):
                    del playing[simulator]
                    idle.append(simulator)
                    steps += len(episode.seen)
                    spent = (time.monotonic() - began) / max(1, steps) * 1000
                    log(
                        f"{task.name}: {len(task.good)} of {episodes}, {len(task.failed)} failed, {spent:.0f} ms a step"
                    )
    finally:
        for simulator in everyone:
            simulator.close()


def _free_seeds(task: _Task, first: int) -> Iterator[int]:
    return (seed for seed in range(first, FIRST_EVALUATION_SEED) if seed not in task.good and seed not in task.failed)


def _advance(task: _Task, simulator: Simulator, episode: _Episode, rules: _Rules) -> bool:
    """Take the reply of a simulator, if it is there, and ask for the next step; True if the episode has ended."""
    try:
        seen = simulator.poll()
        if seen is None:
            return False
        task.check_versions(json.dumps(dict(simulator.description.versions), sort_keys=True))
        episode.seen.append(seen)
        if not seen.success and len(episode.seen) <= rules.max_steps:
            simulator.begin_expert(rules.noise_of(episode, simulator.description.action_dims))
            return False
    except SimulatorError as error:
        if error.code == "start":
            raise
        episode.seen.clear()
        episode.attempt += 1
        if episode.attempt > ATTEMPTS:
            task.fail(episode.seed, f"{ATTEMPTS} times: {error}")
            return True
        simulator.begin_reset(episode.seed)
        return False
    if seen.success:
        path = task.parts / f"{episode.seed}.hdf5"
        _write(path, task, episode, simulator)
        task.good[episode.seed] = path
    else:
        task.fail(episode.seed, f"no success in {rules.max_steps} steps")
    return True


def _write(path: Path, task: _Task, episode: _Episode, simulator: Simulator) -> None:
    """Write one demonstration: every action, and the observation before it."""
    before = episode.seen[:-1]
    actions = np.stack([seen.action for seen in episode.seen[1:] if seen.action is not None])
    last = np.arange(len(actions)) == len(actions) - 1
    with atomic.file(path) as partial, _h5py().File(partial, "w") as stored:
        data = stored.create_group("data")
        data.attrs["settings"] = task.settings
        data.attrs["versions"] = task.versions
        demo = data.create_group("demo_0")
        demo.attrs["seed"] = episode.seed
        demo.attrs["num_samples"] = len(actions)
        demo.attrs["instruction"] = before[0].instruction
        demo["actions"] = actions
        demo["states"] = np.stack([seen.state for seen in before])
        demo["robot_states"] = np.stack([seen.proprioception for seen in before])
        demo["rewards"] = last.astype(np.uint8)
        demo["dones"] = last.astype(np.uint8)
        at = 0
        for name, width in simulator.description.proprioception.items():
            demo[f"obs/{name}"] = demo["robot_states"][:, at : at + width]
            at += width
        for camera, name in zip(before[0].images, CAMERAS):
            images = np.stack([seen.images[camera][::-1, ::-1] for seen in before])
            demo.create_dataset(
                f"obs/{name}", data=images, chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=GZIP
            )


def _merge(task: _Task) -> None:
    """Write the file of a task from its parts and from its earlier file, in the order of the seeds."""
    h5py = _h5py()
    with atomic.file(task.path) as partial, h5py.File(partial, "w") as stored:
        data = stored.create_group("data")
        total = 0
        instruction = ""
        for number, (seed, path) in enumerate(sorted(task.good.items())):
            with h5py.File(path, "r") as part:
                (found,) = (demo for demo in part["data"].values() if demo.attrs["seed"] == seed)
                part.copy(found, data, f"demo_{number}")
                total += int(found.attrs["num_samples"])
                instruction = found.attrs["instruction"]
        problem = {"problem_name": task.name, "domain_name": "robosuite", "language_instruction": instruction}
        data.attrs["problem_info"] = json.dumps(problem)
        data.attrs["env_name"] = task.name
        data.attrs["num_demos"] = len(task.good)
        data.attrs["total"] = total
        data.attrs["settings"] = task.settings
        data.attrs["versions"] = task.versions
        data.attrs["failed"] = json.dumps({str(seed): why for seed, why in sorted(task.failed.items())})


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("demonstrations need h5py: pip install 'fastvst[vla]'") from error
    return h5py
