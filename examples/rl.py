"""Reinforcement learning of Qwen2.5-VL with verifiable rewards, from configuration to report. Read it top to bottom.

Without arguments it takes the model that examples/sft.py left in runs/sft/hf (and runs that first if there is none),
asks it about furnished rooms, and trains on its own answers: GRPO with DAPO's clip. Then it writes
runs/rl/report/index.html with the reward on rooms that no training ever saw.

    torchrun examples/rl.py                                        # one process, GPU or CPU
    torchrun --nproc-per-node 8 examples/rl.py                     # one node, 8 GPUs: FSDP2

Your own rows and reward on a published checkpoint:

    torchrun --nproc-per-node 8 examples/rl.py --model.path DIR --data.sources '[{path = "rows.parquet"}]' \\
        --reward.function my_rewards.py:closeness --sampling.prompts 256 --optimizer.lr 1e-6

A step: the engine samples n answers to each prompt with the trainer's own weights; processes score them; prompts that
are always or never answered right are replaced; answers become advantages within their group; and the update runs on
packs in which a prompt, its pictures included, stands once for all of its answers. `--help` lists all options,
`--dry-run` says what a step would cost, `--resume auto` goes on from the newest complete checkpoint. SIGTERM and Ctrl-C
save a checkpoint and leave.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastvst.config import ConfigError, leaves, load_config, render, save_json, to_dict, usage
from fastvst.data import Ledger, MixtureConfig, Processor, ProcessorConfig, SourceConfig
from fastvst.data.ledger import TooManyBadSamples
from fastvst.data.mixture import open_mixture
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model import weights as hf
from fastvst.rl import dry_run as arithmetic
from fastvst.rl import policy_update as policy
from fastvst.rl.advantages import advantages, pooled_deviation, square_sum
from fastvst.rl.filtering import FilterConfig, FilterState, verdict
from fastvst.rl.heldout import HELD_OUT_COMPLETIONS, EvaluationConfig, evaluation_row, read_prompts, write_evaluation
from fastvst.rl.packing import Group, Sharing
from fastvst.rl.page import write_report
from fastvst.rl.prompts import NoPrompts, PromptStream
from fastvst.rl.records import GroupRecord, RolloutLog, progress_text, step_figures
from fastvst.rl.rewards.pool import RewardConfig, RewardError, RewardPool
from fastvst.rl.rollouts import RankEngine, SamplingConfig, ServerEngine, make_engine, sample_and_score
from fastvst.rollout import RolloutError
from fastvst.train import checkpoint, distributed, guard
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.metrics import LogConfig, Metrics, memory_gib
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, freeze, make_optimizer
from fastvst.train.schedule import ScheduleConfig, set_learning_rates
from fastvst.train.stop_signal import StopRequest
from fastvst.train.watchdog import Watchdog

# ------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelOptions:
    """Which model.

    Attributes:
        path: directory of a Qwen2.5-VL checkpoint; none = runs/sft/hf, made by examples/sft.py if it is not there.
        recompute: what backward computes again instead of keeping: "light" = norms, activations, rope; "full" = blocks.
    """

    path: str | None = None
    recompute: Literal["none", "light", "full"] = "none"


@dataclass(frozen=True)
class RoomsOptions:
    """The embedded questions, used when data.sources is empty: depth, distance, measurement and 3D boxes.

    Attributes:
        samples: training rows, about other rooms than those of the supervised run.
        seed: of the rooms.
        workers: rendering processes.
        folder: where they are kept; none = the per-user cache.
    """

    samples: int = 1200
    seed: int = 1
    workers: int = 2
    folder: str | None = None


@dataclass(frozen=True)
class Config:
    """A whole run. The defaults are the rooms run on a small CPU.

    Attributes:
        out: run folder; a finished run found there is set aside, never overwritten.
        steps: rounds of sampling and updating.
        seed: of sampling.
        resume: "auto", a checkpoint folder, or empty.
        dry_run: print what a step would cost, and end.
        bad_samples: stop when a larger share of the rows cannot be asked; <out>/ledger-*.jsonl lists all of them.
    """

    out: str = "runs/rl"
    steps: int = 120
    seed: int = 0
    resume: str = ""
    dry_run: bool = False
    bad_samples: float = 0.05
    model: ModelOptions = ModelOptions()
    data: MixtureConfig = MixtureConfig(sources=(), shuffle_buffer=200)
    processor: ProcessorConfig = ProcessorConfig(max_pixels=168 * 126, max_seq_len=1024, fov_base_width=200)
    rooms: RoomsOptions = RoomsOptions()
    sampling: SamplingConfig = SamplingConfig(prompts=48)
    reward: RewardConfig = RewardConfig()
    # The tiny model's boxes are never right, but their form can be learnt: groups without a right answer are kept.
    # What it knows, it knows vaguely: a penalty on entropy makes it say the likely answer more often.
    filter: FilterConfig = FilterConfig(low=-0.01, tries=1)
    update: policy.UpdateConfig = policy.UpdateConfig(
        objective="grpo", clip_high=0.28, entropy_coef=-0.1, minibatches=2
    )
    evaluation: EvaluationConfig = EvaluationConfig(every=30, questions=600)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, weight_decay=0.01, freeze=("vision", "merger"))
    schedule: ScheduleConfig = ScheduleConfig(kind="constant", warmup=0.0)
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: checkpoint.CheckpointConfig = checkpoint.CheckpointConfig(every=30, hf=False)
    guard: guard.GuardConfig = guard.GuardConfig(spike=50.0)
    log: LogConfig = LogConfig(every=1)


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nOptions:\n{usage(Config)}")
        return
    config = load_config(Config, arguments)
    arithmetic.check(config)
    world = distributed.start(config.parallel, environment=environment)
    with Watchdog(world), StopRequest() as stop:
        if config.model.path is None:
            path = world.once_per_node("start model", supervised_model)
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
        say(world, render(config), world.describe())
        if config.dry_run:
            dry_run(config, world)
        else:
            run(config, world, stop)
        distributed.stop(world)


# --------------------------------------------------------------------------------------------------- model and data


def supervised_model(folder: Path = Path("runs/sft")) -> str:
    """The directory that examples/sft.py writes; that script runs first, in a process of its own, if need be."""
    if not (folder / "hf" / "config.json").exists():
        print(f"{folder / 'hf'} is not there: running examples/sft.py first", flush=True)
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_"))}
        plain = {k: v for k, v in plain.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        script = Path(__file__).with_name("sft.py")
        subprocess.run([sys.executable, str(script), "--out", str(folder)], env=plain, check=True)
    return str(folder / "hf")


def build_model(config: Config, world: World) -> Qwen25VL:
    """Rank 0 reads the weights on the CPU; the others receive their shards."""
    source = None
    if world.is_main:
        source = Qwen25VL.from_pretrained(config.model.path, dtype=torch.float32)
    with torch.device("meta"):
        skeleton = Qwen25VL(ModelConfig.from_pretrained(config.model.path))
    freeze(skeleton, config.optimizer.freeze)
    model = distributed.place(source, skeleton, world, reshard=config.parallel.reshard)
    model.recompute = config.model.recompute
    return model


def build_processor(config: Config) -> Processor:
    options = dict(leaves(config.processor))
    return Processor.from_pretrained(config.model.path, **options)


def find_data(config: Config, world: World) -> tuple[MixtureConfig, str | None]:
    """The mixture to ask from, and the rows of the evaluation."""
    if config.data.sources:
        return config.data, config.evaluation.path
    from fastvst.generate.rooms import RoomsConfig
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    rooms = config.rooms
    kinds = RoomsConfig(rows={"depth_comparison": 1.0, "distance": 1.0, "measurement": 1.0, "detection_3d": 0.25})

    def make(split: str, samples: int, seed: int) -> str:
        return make_rooms_in_subprocess(rooms.folder, samples, seed, rooms.workers, kinds, split=split)

    train, test = (
        world.once_per_node(f"rooms {split}", lambda split=split, n=n, s=s: make(split, n, s))
        for split, n, s in (("train", rooms.samples, rooms.seed), ("heldout", config.evaluation.questions, 0))
    )
    source = SourceConfig(path=train, name="rooms")
    return dataclasses.replace(config.data, sources=(source,)), config.evaluation.path or test


# ---------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Rollouts:
    """One step's worth of answers on this rank: all that was asked, and the groups that the update sees."""

    asked: list[GroupRecord]
    groups: list[Group]
    seconds: dict[str, float]
    prompt_tokens: int
    filtered: FilterState


def collect(
    config: Config,
    step: int,
    engine: RankEngine | ServerEngine,
    stream: PromptStream,
    pool: RewardPool,
    state: FilterState,
    world: World,
) -> Rollouts:
    """Ask until enough groups are worth learning from, or the tries are used up. Every rank calls it."""
    asked: list[GroupRecord] = []
    kept: list[tuple[GroupRecord, Group]] = []
    seconds: dict[str, float] = {}
    prompt_tokens = 0
    missing = config.sampling.prompts
    for attempt in range(max(1, config.filter.tries)):
        params = config.sampling.params(config.sampling.answers, config.seed * 1_000_003 + step * 1_009 + attempt)
        encoded = stream.encode(stream.take(missing))
        found, spent = sample_and_score(encoded, params, engine, pool, overlong_buffer=config.reward.overlong_buffer)
        seconds = {name: seconds.get(name, 0.0) + spent[name] for name in spent}
        prompt_tokens += sum(len(group.prompt) for _, group in found)
        for one, group in found:
            one.verdict = verdict(one.accuracies, config.filter)
            if one.verdict == "keep":
                kept.append((one, group))
        asked += [one for one, _ in found]
        counts = [len(found), *(sum(o.verdict == v for o, _ in found) for v in ("too_easy", "too_hard", "keep"))]
        drawn, easy, hard, good = world.sum(torch.tensor(counts).to(world.device)).tolist()
        state = state.add(drawn, easy, hard)
        missing = missing - good
        if missing <= 0:
            break
    rewards = torch.tensor([one.totals for one, _ in kept], dtype=torch.float64).view(-1, config.sampling.answers)
    squares, count = world.sum(torch.tensor(square_sum(rewards), dtype=torch.float64).to(world.device)).tolist()
    values = advantages(rewards, config.update.advantages, deviation=pooled_deviation(squares, count)).tolist()
    groups = []
    for (one, group), row in zip(kept, values, strict=True):
        one.advantages = row
        chosen = [dataclasses.replace(a, advantage=v) for a, v in zip(group.answers, row, strict=True)]
        groups.append(Group(group.prompt, tuple(chosen)))
    return Rollouts(asked, groups, seconds, prompt_tokens, state)


# ------------------------------------------------------------------------------------------------------------ update


def improve(
    config: Config,
    model: Qwen25VL,
    reference: Qwen25VL | None,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    recent: guard.Recent,
    step: int,
    world: World,
) -> tuple[dict[str, Any], Sharing, guard.Recent]:
    """All optimizer steps on one batch of rollouts; the figures are means over them. Every rank calls it."""
    objective = policy.make_objective(config.update, config.sampling.max_tokens)
    batches, sharing = policy.make_minibatches(groups, config.update, objective, model.config, world)
    temperature = config.sampling.temperature
    frozen = {"vision", "merger"} <= set(config.optimizer.freeze)
    # Whatever needs the weights that sampled, or the frozen tower, is computed before the first of them changes.
    batches = [
        policy.complete(
            b, model, reference, config.update, temperature, world.device, keep_vision=frozen, first=index == 0
        )
        for index, b in enumerate(batches)
    ]
    rows: list[dict[str, Any]] = []
    for epoch in range(config.update.epochs):
        for index, batch in enumerate(batches):
            if not batch.packs:
                continue  # on all ranks alike: nobody has a group with an advantage
            first = epoch == 0 and index == 0
            losses = []
            stats = []
            for pack in batch.packs:
                loss, found = model(
                    pack.batch, head=policy.policy_head(pack, objective, temperature, first=first), vision=pack.vision
                )
                loss.backward()
                losses.append(loss.detach())
                stats.append(found)
            norm = clip_gradients(model.parameters(), config.optimizer.clip).to(world.device)
            row = policy.reduce_stats(stats, world, loss=world.sum(torch.stack(losses).sum()), grad_norm=norm)
            # The loss of a policy is near 0 whatever happens, so only its norm can show a spike.
            judged = row["loss"] if not math.isfinite(row["loss"]) else 0.0
            reason, recent = guard.check(config.guard, recent, judged, row["grad_norm"])
            if reason is None:
                optimizer.step()
            else:
                shares = [float(p.row_weights.sum()) for p in batch.packs]
                ids = [p.batch.sample_ids for p in batch.packs]
                note = guard.report(world.rank, step, reason, [loss.item() for loss in losses], shares, ids)
                row["skipped"] = reason
                guard.write_down(config.guard, recent, Path(config.out), note)
            optimizer.zero_grad()
            rows.append(row)
    return policy.merge_updates(rows), sharing, recent


# ----------------------------------------------------------------------------------------------------------- the run


def run(config: Config, world: World, stop: StopRequest) -> None:
    out = Path(config.out)
    settings = to_dict(config)
    resume_from = checkpoint.resolve(config.resume, out / "checkpoints")
    if world.is_main and not config.resume:
        checkpoint.set_aside(out)
    world.barrier()
    mixture, test_rows = find_data(config, world)
    processor = build_processor(config)
    model = build_model(config, world)
    reference = None if config.update.kl == "none" else policy.as_reference(build_model(config, world))
    optimizer = make_optimizer(model, config.optimizer)
    ledger = Ledger(out / f"ledger-{world.rank:05d}.jsonl", config.bad_samples, min_samples=200)
    completion_tokens = config.sampling.answers * config.sampling.max_tokens
    stream = PromptStream(
        open_mixture(mixture), processor, ledger, rank=world.rank, size=world.size, completion_tokens=completion_tokens
    )
    first = 0
    recent = guard.Recent()
    filtered = FilterState()
    if resume_from is not None:
        state, rank_state = checkpoint.load(resume_from, model, optimizer, world)
        first = state["step"]
        recent = guard.Recent.from_json(state["guard"])
        filtered = FilterState(**state["filter"])
        stream.load_state_dict(rank_state["stream"])
        say(world, f"resumed from {resume_from}")
    engine = make_engine(model, processor, config.sampling, config.processor.max_seq_len, world)
    questions = read_prompts(test_rows, config.evaluation.questions, ledger) if test_rows else []

    def write_hf(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        hf.save(path, model.config, tensors, processor=processor)

    def save(step: int) -> None:
        path = checkpoint.save(
            out / "checkpoints",
            step,
            model,
            optimizer,
            world,
            state={"guard": recent.to_json(), "filter": filtered.to_json()},
            rank_state={"stream": stream.state_dict()},
            config=settings,
            write_hf=write_hf if config.checkpoint.hf else None,
            hf_dtype=world.dtype,
            keep=config.checkpoint.keep,
        )
        say(world, f"saved {path}")

    def evaluate(step: int) -> None:
        every = config.evaluation.every
        if every and questions and (step % every == 0 or step == config.steps):
            mine = stream.encode(questions[world.rank :: world.size])
            found, _ = sample_and_score(mine, config.sampling.params(HELD_OUT_COMPLETIONS, 987_654_321), engine, pool)
            row = evaluation_row(step, questions, [one for one, _ in found], world)
            say(world, f"held out, step {step}: {write_evaluation(out, row, world)}")

    metrics = Metrics(
        out, config.log, config.steps, first_step=first, is_main=world.is_main, settings=settings, line=progress_text
    )
    log = RolloutLog(out, rank=world.rank, first_step=first)
    with metrics, RewardPool(config.reward) as pool:
        if world.is_main:
            save_json(config, out / "config.json")
        step = first
        stopped = False
        while step < config.steps and not stopped:
            evaluate(step)
            begin = time.perf_counter()
            set_learning_rates(optimizer, config.schedule, step, config.steps)
            try:
                rollouts = collect(config, step, engine, stream, pool, filtered, world)
            except NoPrompts as end:
                say(world, end)
                break
            filtered = rollouts.filtered
            log.write(step, rollouts.asked)
            started = time.perf_counter()
            with config.sampling.numerics_context():
                found, sharing, recent = improve(
                    config, model, reference, optimizer, rollouts.groups, recent, step, world
                )
            seconds = {**rollouts.seconds, "update": time.perf_counter() - started, "step": time.perf_counter() - begin}
            row = {"step": step, "lr": optimizer.param_groups[-1]["lr"], **step_figures(rollouts.asked, world), **found}
            row |= arithmetic.rates(row, sharing, seconds, rollouts, config, world)
            metrics.log(row | {"memory_gib": memory_gib(world.device), "kept_share": round(filtered.kept_share, 4)})
            stopped = bool(world.sum(torch.tensor(float(stop.requested), device=world.device)).item())
            step += 1
            if stopped or (config.checkpoint.every and step % config.checkpoint.every == 0 and step < config.steps):
                save(step)
        if stopped:
            say(world, f"stopped by a signal after step {step}; go on with --resume auto")
            return
        evaluate(config.steps)
        say(world, pool.summary(), ledger.summary())
    save(step)
    checkpoint.save_hf(out / "hf", model, world, write_hf, world.dtype)
    if world.is_main:
        print(f"model: {out / 'hf'}\nreport: {write_report(out, settings)}", flush=True)


def dry_run(config: Config, world: World) -> None:
    """Memory of weights, pages and activations, and the tokens of a step from the first 100 questions; nothing runs."""
    mixture, _ = find_data(config, world)
    if world.is_main:
        stream = PromptStream(open_mixture(mixture), build_processor(config), Ledger())
        print(arithmetic.describe(config, stream, world), flush=True)


def say(world: World, *words: object) -> None:
    if world.is_main:
        print(*words, sep="\n", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (
        ConfigError,
        distributed.ParallelError,
        checkpoint.CheckpointError,
        guard.GuardError,
        TooManyBadSamples,
        RewardError,
        RolloutError,
    ) as error:
        sys.exit(f"rl.py: {type(error).__name__}: {error}")
