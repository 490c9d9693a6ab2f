"""Reinforcement learning of a robot policy on its own success in the simulator: a training script.

Starts from the policy that examples/vla.py wrote. One step: the policy plays groups of episodes of Meta-World, each
group from one initial state, with sampled actions; every episode has the reward 1 if it reaches the goal, else 0;
groups in which all succeed or all fail are dropped and replaced; the rest trains the policy with the update of
examples/rl.py. Then it plays episodes from initial states that no training has, with the policies before and after, and
writes runs/vla_rl/report/index.html. Nothing but the success tells the policy what is right.

    torchrun examples/vla.py                                         # the policy to start from
    torchrun examples/vla_rl.py                                      # one task, "reach"
    torchrun examples/vla_rl.py --model runs/vla/hf --tasks reach,drawer-open --python /envs/metaworld/bin/python

The same seed gives the same episodes on a CPU. `--resume auto` continues a stopped run; SIGTERM and Ctrl-C save a
checkpoint. See docs/vla.md.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rl
import torch
import vla

from fastvst import jsonl
from fastvst.config import ConfigError, render, to_dict
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate import fingerprint
from fastvst.evaluate.action_policy import ActionPolicy, recorded_actions
from fastvst.evaluate.episode_report import EpisodeReport
from fastvst.evaluate.episodes import Episodes
from fastvst.evaluate.playing import EpisodeTask
from fastvst.evaluate.policy_page import success_lines
from fastvst.rl.episodes import EpisodeSampler, EpisodeSamplingConfig, episode_text
from fastvst.rl.filtering import FilterState, NoUpdate
from fastvst.rl.page import write_success_page
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.rollouts import RankEngine, SamplingConfig
from fastvst.rollout import Engine
from fastvst.rollout.load import load
from fastvst.train import guard
from fastvst.train.checkpoint import CheckpointConfig
from fastvst.train.distributed import World
from fastvst.train.metrics import Metrics, memory_gib
from fastvst.train.optimizer import OptimizerConfig, make_optimizer
from fastvst.train.run import Saver, build_processor, joined, open_run_folder, read_config, run_script
from fastvst.train.stop_signal import StopRequest
from fastvst.vla.replies import SimulatorError

# -------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """A robot policy that learns from its own success, on a small CPU.

    Attributes:
        out: run folder.
        model: model directory of examples/vla.py, or of an earlier run of this script.
        tasks: tasks of Meta-World that the policy is trained and evaluated in.
        steps: rounds of episodes and updates.
        lr: learning rate; the vision tower is not trained.
        minibatches: optimizer steps in a round, each on its share of all decisions.
        trials: episodes of each task that the policies before and after are evaluated in.
        seed: random seed of the sampled actions.
        python: Python that has Meta-World; none = this one.
        resume: "auto" = continue a stopped run in `out`; none = a new one, and an earlier run in `out` is renamed.
        sampling: the episodes of a round.
    """

    out: str = "runs/vla_rl"
    model: str = "runs/vla/hf"
    tasks: tuple[str, ...] = ("reach",)
    steps: int = 12
    lr: float = 1e-4
    minibatches: int = 2
    trials: int = 60
    seed: int = 0
    python: str | None = None
    resume: str = ""
    sampling: EpisodeSamplingConfig = EpisodeSamplingConfig()


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, EpisodeReport] | None:
    config = read_config(Config, arguments, __doc__)
    if config is None:
        return None
    if not (Path(config.model) / "config.json").is_file():
        raise ConfigError(f"model: {config.model} is no model directory; torchrun examples/vla.py makes one")
    try:
        actions = recorded_actions(config.model)
    except ValueError as error:
        raise ConfigError(f"model: {error}; expected the folder of a run of examples/vla.py") from error
    begin = time.monotonic()
    tasks = vla.trial_tasks(config.tasks, config.trials, config.python)
    try:
        tokens = len(actions.codec.allowed(build_processor(vla.PROCESSOR, config.model).tokenizer))
        settings = training_settings(config, tokens)
        with joined(settings.parallel, environment) as (world, stop):
            if world.size > 1:
                raise ConfigError(f"{world.size} processes; this script has one")
            world.say(render(config), world.describe())
            finished = train(config, settings, actions, tasks, world, stop)
        if not finished:
            return None  # a signal stopped the training
        vla.say(begin, "the training is over")
        reports = {
            "after": play(config, Path(config.out) / "hf", actions, tasks, config.steps),
            "before": play(config, Path(config.model), actions, tasks, 0),
        }
    except SimulatorError as error:  # of the installation
        raise ConfigError(f"{error}. Meta-World: pip install 'fastvst[vla]', or --python PATH") from error
    page = write_success_page(config.out, reports, episodes_folder(config, config.steps), to_dict(config))
    print(success_lines(reports), flush=True)
    vla.say(begin, f"report: {page}")
    return reports


# ------------------------------------------------------------------------------------------------------------- training


def training_settings(config: Config, tokens: int) -> rl.Config:
    """The run of examples/rl.py whose update this script uses; a decision has `tokens` tokens."""
    old = "sampler" if config.sampling.temperature == 1 else "recompute"  # see fastvst.rl.episodes.answer_of
    return rl.Config(
        out=config.out,
        steps=config.steps,
        seed=config.seed,
        resume=config.resume,
        model=rl.ModelOptions(path=config.model, recompute="none"),
        processor=vla.PROCESSOR,
        sampling=SamplingConfig(
            prompts=config.sampling.simulators,
            answers=config.sampling.episodes,
            temperature=config.sampling.temperature,
            max_tokens=tokens,
        ),
        update=UpdateConfig(objective="dapo", minibatches=config.minibatches, old_logprobs=old),
        optimizer=OptimizerConfig(lr=config.lr, vision_lr=0.0, freeze=("vision", "merger")),
        checkpoint=CheckpointConfig(every=4, keep=1, hf=False),
    )


def train(
    config: Config,
    settings: rl.Config,
    actions: ActionRows,
    tasks: Sequence[EpisodeTask],
    world: World,
    stop: StopRequest,
) -> bool:
    """Rounds of episodes and updates; writes `out/hf`. False if a signal stopped it."""
    out = Path(config.out)
    recorded = {**to_dict(settings), "actions": to_dict(actions), "episodes": to_dict(config.sampling)}
    resume_from = open_run_folder(out, config.resume, world)
    processor = build_processor(settings.processor, config.model).with_uint8_patches()
    model = rl.load_model(settings, world, torch.float32)
    optimizer = make_optimizer(model, settings.optimizer)
    saver = Saver(out, settings.checkpoint, recorded, model, optimizer, processor, world)
    first, recent, filtered = restored(saver, resume_from)
    engine = RankEngine(model, processor, settings.sampling, settings.processor.max_seq_len, world)
    metrics = Metrics(out, settings.log, config.steps, done=first, is_main=True, settings=recorded, line=episode_text)
    jsonl.drop_from_step(out / "rollouts.jsonl", first + 1)
    step = first
    sampling = dataclasses.replace(config.sampling, seed=config.seed)
    with metrics, saver, EpisodeSampler(tasks, sampling, settings.update.advantages) as sampler:
        while step < config.steps and not stop.requested:
            begin = time.perf_counter()
            found = sampler.collect(ActionPolicy(engine.open(), actions), filtered)
            engine.release()
            filtered = found.filtered
            jsonl.append(out / "rollouts.jsonl", [{"step": step + 1, **row} for row in found.rows])
            updated, sharing, recent = rl.improve(settings, model, None, optimizer, found.groups, recent, step, world)
            step += 1
            row: dict[str, Any] = {"step": step, "lr": config.lr, **found.figures, **updated}
            row |= {
                "seconds": round(time.perf_counter() - begin, 3),
                "tokens": sharing.shared,
                "images": len(found.groups),
            }
            row |= {"fill": sharing.shared / max(1, sharing.packs * settings.update.tokens_per_pack)}
            metrics.log({**row, "memory_gib": memory_gib(world.device)})
            if stop.requested or step == config.steps or saver.due(step, config.steps, False):
                saver.save(step, state={"guard": recent.to_json(), "filter": filtered.to_json()}, rank_state={})
    if step < config.steps:
        world.say(f"stopped by a signal after step {step}; continue with --resume auto")
        return False
    if not filtered.kept_share:
        raise NoUpdate(
            f"of {filtered.drawn} groups {filtered.too_hard} only failed and {filtered.too_easy} only succeeded: "
            "nothing was learned. Take a policy or a task whose success is between 20 and 80 %, or more "
            "sampling.episodes, or another sampling.temperature"
        )
    saver.save_model(
        "reinforcement learning", f"Episodes of {', '.join(config.tasks)} in Meta-World; see rollouts.jsonl."
    )
    return True


def restored(saver: Saver, checkpoint: Path | None) -> tuple[int, guard.Recent, FilterState]:
    """(steps done, the guard's state, groups so far) of a checkpoint; without one those of a new run."""
    if checkpoint is None:
        return 0, guard.Recent(), FilterState()
    state, _ = saver.load(checkpoint)
    return state["step"], guard.Recent.from_json(state["guard"]), FilterState(**state["filter"])


# ----------------------------------------------------------------------------------------------------------- evaluation


def play(config: Config, model: Path, actions: ActionRows, tasks: Sequence[EpisodeTask], step: int) -> EpisodeReport:
    """Success of a model with the most likely actions, from initial states that no training has."""
    settings = {"model": fingerprint.of_directory(model), "actions": to_dict(actions)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = ActionPolicy(Engine(*load(model, device=device)), actions)
    episodes = Episodes(tasks, episodes_folder(config, step), json.loads(json.dumps(settings)))
    return episodes.play(policy, simulators=config.sampling.simulators, log=vla.every(20))


def episodes_folder(config: Config, step: int) -> Path:
    return Path(config.out) / "episodes" / f"step-{step}"


if __name__ == "__main__":
    run_script(main, NoUpdate)
