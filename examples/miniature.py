"""VST in miniature: every stage on rendered rooms, and one table of all nineteen tasks.

    python examples/miniature.py                    # an hour or two on 2 CPU cores; a stopped run continues

Renders rows of all tasks, then runs the other scripts one after another: examples/sft.py from the tiny preset's first
weights, examples/cold_start.py and examples/rl.py from the model of the first. The table compares all four on rooms
that no stage has seen, with both baselines and 95 % intervals by room: <out>/table/results.md and index.html. A stage
whose model exists is not run again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastvst.config import render
from fastvst.data import Processor
from fastvst.model import Qwen25VL
from fastvst.train.run import read_config, run_script

HERE = Path(__file__).parent
SETTINGS = {  # the settings of the rooms, which the scripts have when they make the rows themselves
    "processor.max_pixels": 168 * 126,
    "processor.max_seq_len": 1024,
    "processor.fov_base_width": 200,
    "loader.tokens_per_pack": 1024,
    "optimizer.lr": 5e-4,
    "optimizer.vision_lr": 1e-4,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": "[0.9, 0.95]",
    "schedule.warmup": 0.05,
}


@dataclass(frozen=True)
class Config:
    """The whole story on a small CPU.

    Attributes:
        out: folder of all runs and of the table.
        samples: rows to train on, of all nineteen tasks.
        heldout: rows of the table, about other rooms.
        sft_steps: optimizer steps of supervised fine-tuning.
        cold_start_steps: optimizer steps on reasoning traces.
        cold_start_samples: rows with reasoning traces.
        rl_steps: rounds of sampling and updating.
        folder: where rows are cached; none = the user's cache folder.
        workers: rendering processes.
    """

    out: str = "runs/miniature"
    samples: int = 8000
    heldout: int = 1900
    sft_steps: int = 2500
    cold_start_steps: int = 1000
    cold_start_samples: int = 2000
    rl_steps: int = 120
    folder: str | None = None
    workers: int = 2


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    config = read_config(Config, arguments, __doc__)
    if config is None:
        return
    print(render(config), flush=True)
    out = Path(config.out)
    train = rows(config, "train", config.samples)
    heldout = rows(config, "heldout", config.heldout)
    models = {"base": out / "base", "SFT": out / "sft/hf", "cold start": out / "cold_start/hf", "RL": out / "rl/hf"}
    if not done(models["base"]):
        write_base(models["base"])
    sources = {"data.sources": f'[{{path = "{train}", name = "rooms"}}]'}
    start = {"model.path": models["base"], "out": out / "sft", "steps": config.sft_steps, "checkpoint.every": 0}
    stage(models["SFT"], "sft.py", start | sources | SETTINGS)
    place = {"workers": config.workers} | ({"folder": config.folder} if config.folder else {})
    thoughts = {"steps": config.cold_start_steps, "samples": config.cold_start_samples}
    thoughts |= {"model": models["SFT"], "out": out / "cold_start"}
    stage(models["cold start"], "cold_start.py", thoughts | place)
    rounds = {"model.path": models["SFT"], "out": out / "rl", "steps": config.rl_steps}
    stage(models["RL"], "rl.py", rounds | ({"rooms.folder": config.folder} if config.folder else {}))
    compared = [f"{name}={path}" for name, path in models.items()]
    table = ["--data", heldout, "--train-data", train, "--out", str(out / "table")]
    subprocess.run([sys.executable, "-m", "fastvst", "evaluate", "rooms", "--model", *compared, *table], check=True)


def rows(config: Config, split: str, samples: int) -> str:
    """The folder of rows of all nineteen tasks, rendered once and cached."""
    from fastvst.generate.presets import ALL_TASKS
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    return make_rooms_in_subprocess(config.folder, samples, 0, config.workers, ALL_TASKS, split=split)


def done(model: Path) -> bool:
    return (model / "config.json").is_file()


def write_base(folder: Path) -> None:
    """The weights from which the first stage starts, as a checkpoint."""
    torch.manual_seed(0)
    Qwen25VL.fresh("tiny", start="aligned").save_pretrained(
        folder, processor=Processor.preset("tiny", max_pixels=168 * 126, max_seq_len=1024, fov_base_width=200)
    )


def stage(model: Path, script: str, options: Mapping[str, object]) -> None:
    """Run a script unless its model exists; its output is shown as it comes."""
    if done(model):
        print(f"{model}: exists, {script} is not run again", flush=True)
        return
    words = [f"{name}={value}" for name, value in options.items()]
    print(f"running {script}", flush=True)
    subprocess.run([sys.executable, str(HERE / script), *words], check=True)


if __name__ == "__main__":
    run_script(main)
