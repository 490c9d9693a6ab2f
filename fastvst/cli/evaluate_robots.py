"""`fastvst evaluate libero --model DIR --suite object --out DIR` and `fastvst evaluate metaworld --tasks reach ...`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from fastvst.config import from_dict
from fastvst.data.sources.action_rows import ActionRows
from fastvst.train import lock

if TYPE_CHECKING:
    from fastvst.evaluate.episodes import EpisodeReport, EpisodeTask

ROBOTS = ("libero", "metaworld")
METAWORLD = ("reach", "button-press-topdown", "drawer-open")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that only the robots' benchmarks have."""
    parser.add_argument("--suite", help="libero: spatial, object, goal, long, 90, or one of LIBERO-PRO")
    parser.add_argument("--robot-tasks", nargs="+", help="libero: numbers of tasks; metaworld: names of tasks")
    parser.add_argument("--trials", type=int, default=50, help="libero, metaworld: episodes of each task (default: 50)")
    parser.add_argument("--simulators", type=int, default=2, help="libero, metaworld: simulators at a time")
    parser.add_argument("--python", default=sys.executable, help="libero, metaworld: Python that has the simulator")
    parser.add_argument(
        "--actions",
        help="libero, metaworld: the `actions` of the training source, e.g. '{kind = \"text\", bins = 999}' (default: "
        "those of config.json next to the model's folder)",
    )
    parser.add_argument(
        "--gripper",
        choices=["libero", "openvla"],
        default="libero",
        help="libero: meaning of the last value: -1 opens, as in LIBERO's HDF5, or 1 opens and 0 closes (VST, OpenVLA)",
    )
    parser.add_argument("--blind", action="store_true", help="libero, metaworld: show grey images to the model")
    parser.add_argument("--image-size", type=int, help="libero, metaworld: pixels of the images (default: 256; 128)")


def actions_of(arguments: argparse.Namespace) -> ActionRows:
    """The options of the actions, from --actions or from the configuration of the run that wrote the model.

    Raises:
        ValueError: there are none, or they are no options of actions.
    """
    from fastvst.evaluate.action_policy import recorded_actions

    if arguments.actions:
        try:
            table = tomllib.loads(f"actions = {arguments.actions}")["actions"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"--actions is {arguments.actions!r}; expected a TOML table: {error}") from error
        return from_dict(ActionRows, table)
    try:
        return recorded_actions(arguments.model[0])
    except ValueError as error:
        raise ValueError(f"pass --actions: {error}") from error


def tasks_of(name: str, arguments: argparse.Namespace, cameras: int) -> list[EpisodeTask]:
    """The tasks that are asked for.

    Raises:
        ValueError: no suite, or a task that it does not have.
    """
    from fastvst.evaluate.episodes import libero_tasks, metaworld_tasks

    if arguments.trials < 1 or arguments.simulators < 1:
        raise ValueError(f"--trials is {arguments.trials} and --simulators {arguments.simulators}; expected at least 1")
    wanted = arguments.robot_tasks
    if name == "metaworld":
        views = {"size": arguments.image_size or 128}
        return metaworld_tasks(wanted or METAWORLD, arguments.trials, python=arguments.python, environment=views)
    if arguments.suite is None:
        raise ValueError("libero needs --suite: spatial, object, goal, long, 90, or one of LIBERO-PRO")
    names = ["agentview", "robot0_eye_in_hand"][:cameras]
    views = {"size": arguments.image_size or 256, "cameras": names, "gripper": arguments.gripper}
    tasks = libero_tasks(arguments.suite, arguments.trials, python=arguments.python, environment=views)
    if wanted is None:
        return tasks
    known = {str(number): task for number, task in enumerate(tasks)}
    missing = [number for number in wanted if number not in known]
    if missing:
        raise ValueError(
            f"--robot-tasks names {missing}; the suite {arguments.suite} has the tasks 0 to {len(tasks) - 1}"
        )
    return [known[number] for number in wanted]


def run(arguments: argparse.Namespace) -> EpisodeReport:
    """Play the episodes and print the table; a stopped run resumes in --out.

    Raises:
        ValueError, FileNotFoundError: wrong arguments, a missing checkpoint, a simulator that cannot start.
        FolderInUse: another process writes the folder of --out.
    """
    from fastvst.evaluate import fingerprint
    from fastvst.evaluate.action_policy import ActionPolicy
    from fastvst.evaluate.episodes import Episodes
    from fastvst.rollout import Engine
    from fastvst.rollout.load import load
    from fastvst.vla.replies import SimulatorError

    name = arguments.benchmark[0].lower()
    if not arguments.model or len(arguments.model) > 1 or not arguments.out:
        raise ValueError(f"evaluate {name} needs one --model DIR, and --out DIR")
    actions = actions_of(arguments)
    tasks = tasks_of(name, arguments, max(1, len(actions.cameras)))
    model, processor = load(arguments.model[0], device=arguments.devices[0])
    policy = ActionPolicy(Engine(model, processor), actions, blind=arguments.blind)
    settings = {
        "model": fingerprint.of_directory(arguments.model[0]),
        "actions": {**dataclasses.asdict(actions), "augment": 0.0},
        "blind": arguments.blind,
    }
    try:
        lock.acquire(Path(arguments.out))
        episodes = Episodes(tasks, arguments.out, json.loads(json.dumps(settings)))
        report = episodes.play(policy, simulators=arguments.simulators, log=_say)
    except SimulatorError as error:  # of the installation, not of the program
        raise ValueError(str(error)) from error
    finally:
        lock.release()
    print(report.text(), flush=True)
    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
