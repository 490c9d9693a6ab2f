"""`fastvst vla demos --env metaworld --tasks reach push --episodes 40 --out DIR`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from fastvst.vla.demonstrations import collect
from fastvst.vla.replies import SimulatorError
from fastvst.vla.simulators import SimulatorConfig

METAWORLD = ("reach", "button-press-topdown", "drawer-open", "push")
LIBERO = tuple(str(number) for number in range(10))
SUITES = ("object", "spatial", "goal")  # those with tasks that the script of libero_environment.py can do
SIZES = {"metaworld": 128, "libero": 256}
STEPS = {"metaworld": 200, "libero": 300}
PLANNING_SECONDS = 3600.0  # LIBERO's expert tries up to 40 ways to grasp before its first step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst vla`."""
    parser.add_argument("action", choices=("demos",), help="demos: demonstrations of the simulator's scripted experts")
    parser.add_argument("--env", choices=tuple(SIZES), default="metaworld", help="simulator (default: metaworld)")
    parser.add_argument("--suite", choices=SUITES, default="object", help="suite of libero (default: object)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        help=f"names (default: {' '.join(METAWORLD)}), or numbers in the suite of libero (default: all ten)",
    )
    parser.add_argument("--episodes", type=int, default=40, help="demonstrations of each task (default: 40)")
    parser.add_argument("--out", required=True, help="folder of the HDF5 files; a stopped run resumes")
    parser.add_argument("--simulators", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--size", type=int, help="height and width of the images (default: 128; libero: 256)")
    parser.add_argument("--camera", help="camera (default: corner4; libero: agentview)")
    parser.add_argument("--max-steps", type=int, help="steps for the expert to succeed (default: 200; libero: 300)")
    parser.add_argument("--python", default=sys.executable, help="Python that has the simulator (default: this one)")


def tasks_of(arguments: argparse.Namespace) -> dict[str, SimulatorConfig]:
    """Name of the file -> simulator, for every task.

    Raises:
        ValueError: a task of libero that is no number.
    """
    shared: dict[str, Any] = {"size": arguments.size or SIZES[arguments.env]}
    if arguments.camera:
        shared["cameras"] = [arguments.camera]
    if arguments.env == "metaworld":
        names = arguments.tasks or METAWORLD
        return {name: SimulatorConfig("metaworld", {"task": name, **shared}, arguments.python) for name in names}
    wrong = [word for word in arguments.tasks or LIBERO if not word.isdecimal()]
    if wrong:
        raise ValueError(f"--tasks {' '.join(wrong)}: tasks of libero are numbers from 0")
    found = {}
    for number in map(int, arguments.tasks or LIBERO):
        environment = {"suite": arguments.suite, "task": number, "placement": "seed", **shared}
        config = SimulatorConfig("libero", environment, arguments.python, step_seconds=PLANNING_SECONDS)
        found[f"libero_{arguments.suite}_{number}"] = config
    return found


def run(arguments: argparse.Namespace) -> int:
    """Make the demonstrations; returns the exit status."""

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        collect(
            tasks_of(arguments),
            Path(arguments.out),
            arguments.episodes,
            simulators=arguments.simulators,
            max_steps=arguments.max_steps or STEPS[arguments.env],
            log=log,
        )
    except (SimulatorError, ImportError) as error:  # of the installation, not of the program
        raise ValueError(str(error)) from error
    return 0
