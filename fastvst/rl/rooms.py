"""What examples/rl.py trains on without data: a model of the first command, and prompts about rendered rooms."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fastvst.config import not_an_option
from fastvst.train.distributed import World

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
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    def make(split: str, samples: int, seed: int) -> str:
        return world.once_per_node(
            f"rooms {split}",
            lambda: make_rooms_in_subprocess(
                options.folder, samples, seed, options.workers, RoomsConfig(rows=dict(ROWS)), split=split
            ),
        )

    return make("train", options.samples, options.seed), make("heldout", questions, 0)


def supervised_model(script: Path, folder: Path = Path("runs/sft")) -> str:
    """The directory that `script` (examples/sft.py) writes; if it is missing, the script runs in its own process."""
    if not (folder / "hf" / "config.json").exists():
        print(f"{folder / 'hf'} does not exist: running examples/sft.py first", flush=True)
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_"))}
        plain = {k: v for k, v in plain.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        subprocess.run([sys.executable, str(script), "--out", str(folder)], env=plain, check=True)
    return str(folder / "hf")
