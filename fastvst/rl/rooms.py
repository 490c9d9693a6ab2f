"""What examples/rl.py trains on: prompts of rows; without any, rendered rooms and the model of the first command."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvst.config import ConfigError, not_an_option
from fastvst.data import Ledger, MixtureConfig, Processor, SourceConfig
from fastvst.data.mixture import Mixture
from fastvst.data.sources.source import with_ranges
from fastvst.data.spool import Spool
from fastvst.rl.heldout import EvaluationConfig
from fastvst.rl.prompts import PromptStream
from fastvst.train import rooms as shared_rooms
from fastvst.train.distributed import World
from fastvst.train.run import open_data

ROWS = {"depth_comparison": 1.0, "distance": 1.0, "measurement": 1.0, "detection_3d": 0.25}


@dataclass(frozen=True)
class RoomsOptions:
    """The rendered rooms (depth, distance, measurement, 3D boxes), which are used when data.sources is empty.

    Attributes:
        samples: rows to train on, about other rooms than those of examples/sft.py.
        folder: where the rows are cached; none = the user's cache folder.
    """

    samples: int = 1200
    seed: int = not_an_option(1)
    workers: int = not_an_option(2)
    folder: str | None = None


def make_rooms(options: RoomsOptions, questions: int, world: World) -> tuple[str, str]:
    """The folders of the training rows and of `questions` held-out rows."""
    from fastvst.generate.rooms import RoomsConfig

    rows = RoomsConfig(rows=dict(ROWS))
    train = shared_rooms.make_rooms(world, options, "train", options.samples, rows, seed=options.seed)
    return train, shared_rooms.make_rooms(world, options, "heldout", questions, rows, seed=0)


def find_data(
    data: MixtureConfig, rooms: RoomsOptions, evaluation: EvaluationConfig, world: World
) -> tuple[MixtureConfig, str | None]:
    """The mixture of the prompts, and the rows of the evaluation."""
    if data.sources:
        return data, evaluation.path
    train, test = make_rooms(rooms, evaluation.questions, world)
    return dataclasses.replace(data, sources=(SourceConfig(path=train, name="rooms"),)), evaluation.path or test


def open_prompts(
    config: Any, mixture: MixtureConfig, processor: Processor, ledger: Ledger, **place: int
) -> PromptStream:
    """The stream of prompts; `place`: rank, size and completion tokens of PromptStream.

    Prompts are drawn on every rank, and each is asked on one: encoded images and videos stay in their files, or wait in
    one without a name, until somebody reads them.
    """
    opened = open_data(mixture, whole_rows=True)
    data = Mixture([with_ranges(source) for source in opened.sources], opened.config, Spool().lighten)
    system = config.sampling.system
    return PromptStream(data, processor, ledger, system=system, needs_answer=config.reward.needs_answer, **place)


def supervised_model(script: Path, folder: Path = Path("runs/sft")) -> str:
    """The directory that `script` (examples/sft.py) writes; if it is missing, the script runs in its own process."""
    if not (folder / "hf" / "config.json").exists():
        print(f"{folder / 'hf'} does not exist: running examples/sft.py first", flush=True)
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_"))}
        plain = {k: v for k, v in plain.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        status = subprocess.run([sys.executable, str(script), "--out", str(folder)], env=plain).returncode
        if status or not (folder / "hf" / "config.json").exists():
            raise ConfigError(f"{script} ended with status {status} and without a model; pass --model.path DIR")
    return str(folder / "hf")
