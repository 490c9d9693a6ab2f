"""A robot policy, from demonstrations to success in the simulator: a training script, from configuration to report.

Without arguments it records demonstrations of Meta-World's scripted experts (once; they are cached), trains the tiny
vision-language model to answer "What action should the robot take to open the drawer?" from one camera image and the
state of the hand, lets it act in initial states that no demonstration has, and writes runs/vla/report/index.html with
animations. It takes eleven minutes on two CPU cores.

    pip install 'fastvst[vla]'                                       # Meta-World, or an environment of its own for it:
    torchrun examples/vla.py
    torchrun examples/vla.py --python /envs/metaworld/bin/python
    torchrun examples/vla.py --model runs/sft/hf                     # from the spatially tuned model of examples/sft.py

The policy has two baselines: the same network that sees a grey image, and the mean action of each task. A run that was
stopped continues with --resume auto: no demonstration is made twice, no episode played twice. Published models and
other demonstrations (LIBERO, LeRobot) train with examples/sft.py, see docs/vla.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import sft
import torch

from fastvst.config import ConfigError, to_dict
from fastvst.data import LoaderConfig, MixtureConfig, ProcessorConfig, SourceConfig
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate import fingerprint
from fastvst.evaluate.action_policy import ActionPolicy
from fastvst.evaluate.episode_report import EpisodeReport
from fastvst.evaluate.episodes import Episodes, Policy, metaworld_tasks
from fastvst.evaluate.in_training import EvaluationConfig
from fastvst.evaluate.playing import EpisodeTask
from fastvst.evaluate.policy_page import success_lines, write_policy_page
from fastvst.generate.rooms import cache_root
from fastvst.model import ModelConfig
from fastvst.rollout import Engine
from fastvst.rollout.load import load
from fastvst.train import lock
from fastvst.train.checkpoint import CheckpointConfig
from fastvst.train.optimizer import OptimizerConfig
from fastvst.train.recipes import size_of
from fastvst.train.run import joined, read_config, run_script
from fastvst.vla.demonstrations import collect
from fastvst.vla.replies import Observation, SimulatorError
from fastvst.vla.simulators import SimulatorConfig

# -------------------------------------------------------------------------------------------------------- configuration

SIDE = 112  # pixels of the image: 16 tokens
REPEAT = 4  # Meta-World's steps of 12.5 ms that an action is held; the experts take 36 to 93 steps
MAX_ACTIONS = 50  # of an episode, 200 of Meta-World's steps
CAMERA = {"size": SIDE, "fov": 45, "repeat": REPEAT}  # of Meta-World's "corner4", a little nearer
HELD_OUT_SEED = 400_000  # the first seed of the held-out demonstrations; those of training count from 0
HELD_OUT = 10  # demonstrations of each task
SHUFFLE = 20_000  # steps of demonstrations among which the next one is drawn: nearly all of them
# Each of the four values of an action is one digit. Steps of 2/9 of the fastest move are fine enough, because the next
# image shows the rest of the way; with two digits most of the loss is about millimetres.
ACTIONS = ActionRows(kind="text", bins=9, dims=4, state=True, side=SIDE, metres=0.01 * REPEAT)
PROCESSOR = ProcessorConfig(min_pixels=SIDE**2, max_pixels=SIDE**2, max_seq_len=256, enable_fov=False)


@dataclass(frozen=True)
class Config:
    """A robot policy on a small CPU.

    Attributes:
        out: run folder.
        model: directory of the tiny model's checkpoint to start from, e.g. runs/sft/hf of examples/sft.py; none = a
            decoder with random weights and the pretrained vision tower.
        tasks: tasks of Meta-World whose experts have demonstrations.
        demonstrations: episodes of each task to train on.
        noise: standard deviation of the noise on the expert's moves while it demonstrates, relative to the fastest.
        steps: optimizer steps.
        lr: peak learning rate; a third of it for the vision tower.
        trials: episodes of each task that the policy is evaluated in.
        simulators: processes that play at a time.
        seed: random seed of the weights and of the order of the data.
        python: Python that has Meta-World; none = this one.
        folder: where the demonstrations are cached; none = the user's cache folder.
        resume: "auto" = continue a stopped run in `out`; none = a new one, and an earlier run in `out` is renamed.
    """

    out: str = "runs/vla"
    model: str | None = None
    tasks: tuple[str, ...] = ("reach", "button-press-topdown", "drawer-open")
    demonstrations: int = 300
    noise: float = 0.5
    steps: int = 1000
    lr: float = 1e-3
    trials: int = 20
    simulators: int = 12
    seed: int = 0
    python: str | None = None
    folder: str | None = None
    resume: str = ""


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, EpisodeReport] | None:
    config = read_config(Config, arguments, __doc__)
    if config is None:
        return None
    if config.model is not None and size_of(ModelConfig.from_pretrained(config.model)) is not None:
        raise ConfigError(
            f"model: {config.model} is not the tiny model, for which this script has its pixels and learning rate; "
            "train a published checkpoint with examples/sft.py and examples/libero.toml"
        )
    begin = time.monotonic()
    try:
        training = demonstrations(config, config.demonstrations, first_seed=0)
        held_out = demonstrations(config, HELD_OUT, first_seed=HELD_OUT_SEED)
        say(begin, "demonstrations are there")
        settings = training_settings(config, training, held_out)
        with joined(settings.parallel, environment) as (world, stop):
            if world.size > 1:
                raise ConfigError(f"{world.size} processes; this script has one. examples/sft.py trains with many")
            sft.run(settings, world, stop)
        if not (Path(config.out) / "hf").is_dir():
            return None  # a signal stopped the training
        say(begin, "the policy is trained")
        reports = roll_out(config, training)
    except (SimulatorError, ImportError) as error:  # of the installation
        raise ConfigError(f"{error}. Meta-World: pip install 'fastvst[vla]', or --python PATH") from error
    films = episodes_folder(config, next(iter(reports)))
    metrics = Path(config.out) / "metrics.jsonl"
    page = write_policy_page(Path(config.out) / "report", reports, films, metrics, to_dict(config))
    print(success_lines(reports), flush=True)
    say(begin, f"report: {page}")
    return reports


def say(begin: float, what: str) -> None:
    print(f"{what}, {time.monotonic() - begin:.0f} s after the start", flush=True)


# ------------------------------------------------------------------------------------------------------- demonstrations


def demonstrations(config: Config, count: int, *, first_seed: int) -> list[Path]:
    """One HDF5 file for each task, of `count` episodes in which its expert reaches the goal.

    The expert's moves are disturbed, and what it wanted to do is recorded: so the policy learns the way back from its
    own errors, which undisturbed demonstrations never show (DART, arXiv 1703.09327).
    """
    python = config.python or sys.executable
    tasks = {name: SimulatorConfig("metaworld", {"task": name, **CAMERA}, python) for name in config.tasks}
    made_with = fingerprint.of([CAMERA, count, config.noise, first_seed])[:12]
    folder = (Path(config.folder) if config.folder else cache_root()) / f"metaworld-{made_with}"
    lock.acquire(folder)
    cores = os.cpu_count() or 1
    try:
        return collect(
            tasks,
            folder,
            count,
            simulators=cores,
            max_steps=MAX_ACTIONS,
            noise=config.noise,
            first_seed=first_seed,
            log=every(50),
        )
    finally:
        lock.release(folder)


def every(count: int) -> Callable[[str], None]:
    """A log that prints each `count`-th line."""
    seen = 0

    def log(line: str) -> None:
        nonlocal seen
        seen += 1
        if seen % count == 0:
            print(line, flush=True)

    return log


# ------------------------------------------------------------------------------------------------------------- training


def training_settings(config: Config, training: Sequence[Path], held_out: Sequence[Path]) -> sft.Config:
    """The run of examples/sft.py: a step of a demonstration is a question with an image, and its answer an action."""
    sources, unseen = (
        tuple(SourceConfig(str(p), name=p.name.removesuffix("_demo.hdf5"), weight=1.0, actions=ACTIONS) for p in paths)
        for paths in (training, held_out)
    )
    return sft.Config(
        out=config.out,
        steps=config.steps,
        seed=config.seed,
        resume=config.resume,
        model=sft.ModelOptions(path=config.model, recompute="none"),
        data=MixtureConfig(sources=sources, seed=config.seed, shuffle_buffer=SHUFFLE),
        processor=PROCESSOR,
        loader=LoaderConfig(tokens_per_pack=2048, num_workers=1, buffer_samples=64),
        optimizer=OptimizerConfig(lr=config.lr, vision_lr=config.lr / 3, weight_decay=0.05, betas=(0.9, 0.95)),
        checkpoint=CheckpointConfig(every=500, keep=1),
        evaluation=EvaluationConfig(every=max(1, config.steps // 3), path=unseen, rows=100),
    )


# ------------------------------------------------------------------------------------------------------------- episodes


def roll_out(config: Config, training: Sequence[Path]) -> dict[str, EpisodeReport]:
    """Success of the policy and of its baselines in the same episodes, whose seeds no demonstration has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load(Path(config.out) / "hf", device=device)
    engine = Engine(model, processor)
    policies: dict[str, Policy] = {
        "trained policy": ActionPolicy(engine, ACTIONS),
        "grey image": ActionPolicy(engine, ACTIONS, blind=True),
        "mean action": mean_action(training),
    }
    tasks = trial_tasks(config.tasks, config.trials, config.python)
    settings = {"model": fingerprint.of_directory(Path(config.out) / "hf"), "actions": to_dict(ACTIONS)}
    reports = {}
    for name, policy in policies.items():
        episodes = Episodes(tasks, episodes_folder(config, name), json.loads(json.dumps({**settings, "policy": name})))
        reports[name] = episodes.play(policy, simulators=config.simulators, log=every(20))
        print(f"{name}: mean success {reports[name].mean} %", flush=True)
    return reports


def trial_tasks(names: Sequence[str], trials: int, python: str | None) -> list[EpisodeTask]:
    """Tasks of Meta-World with the camera and the length of episodes that the policies of this script have."""
    tasks = metaworld_tasks(names, trials, python=python or sys.executable, environment=CAMERA)
    return [dataclasses.replace(task, max_steps=MAX_ACTIONS) for task in tasks]


def episodes_folder(config: Config, policy: str) -> Path:
    return Path(config.out) / "episodes" / policy.replace(" ", "-")


def mean_action(training: Sequence[Path]) -> Policy:
    """A policy that always takes the mean action of a task's demonstrations."""
    means: dict[str, np.ndarray] = {}
    for path in training:
        with h5py.File(path, "r") as stored:
            task = json.loads(stored["data"].attrs["problem_info"])["language_instruction"]
            means[task] = np.concatenate([demo["actions"][:] for demo in stored["data"].values()]).mean(0)

    def policy(observations: Sequence[Observation]) -> list[np.ndarray]:
        return [means[one.instruction][None] for one in observations]

    return policy


if __name__ == "__main__":
    run_script(main)
