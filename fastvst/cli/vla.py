"""`fastvst vla demos --env metaworld --tasks reach push --episodes 40 --out DIR`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fastvst.vla.demonstrations import collect
from fastvst.vla.replies import SimulatorError
from fastvst.vla.simulators import SimulatorConfig

TASKS = ("reach", "button-press-topdown", "drawer-open", "push")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst vla`."""
    parser.add_argument("action", choices=("demos",), help="demos: demonstrations of the simulator's scripted experts")
    parser.add_argument("--env", choices=("metaworld",), default="metaworld", help="simulator (default: metaworld)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"names (default: {' '.join(TASKS)})")
    parser.add_argument("--episodes", type=int, default=40, help="demonstrations of each task (default: 40)")
    parser.add_argument("--out", required=True, help="folder of the HDF5 files; a stopped run resumes")
    parser.add_argument("--simulators", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images (default: 128)")
    parser.add_argument("--camera", default="corner4", help="camera of Meta-World (default: corner4)")
    parser.add_argument("--max-steps", type=int, default=200, help="steps after which the expert has failed")
    parser.add_argument("--python", default=sys.executable, help="Python that has the simulator (default: this one)")


def run(arguments: argparse.Namespace) -> int:
    """Make the demonstrations; returns the exit status."""
    shared = {"size": arguments.size, "cameras": [arguments.camera]}
    tasks = {
        name: SimulatorConfig(arguments.env, {"task": name, **shared}, arguments.python) for name in arguments.tasks
    }

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        collect(
            tasks,
            Path(arguments.out),
            arguments.episodes,
            simulators=arguments.simulators,
            max_steps=arguments.max_steps,
            log=log,
        )
    except (SimulatorError, ImportError) as error:  # of the installation, not of the program
        raise ValueError(str(error)) from error
    return 0
