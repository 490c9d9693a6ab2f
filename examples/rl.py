"""Reinforcement learning of Qwen2.5-VL with verifiable rewards: a training script, from configuration to report.

Without arguments it starts from the model that examples/sft.py wrote to runs/sft/hf (and runs that script first if
there is none), asks it questions about furnished rooms, and trains on its own completions: GRPO with DAPO's clip. Then
it writes runs/rl/report/index.html with the reward on rooms that training never saw.

    torchrun examples/rl.py                                        # one process, GPU or CPU
    torchrun --nproc-per-node 8 examples/rl.py                     # one node, 8 GPUs: FSDP2

Your own rows and reward function (docs/rl.md) with a published checkpoint:

    torchrun --nproc-per-node 8 examples/rl.py --model.path DIR --data.sources '[{path = "rows.parquet"}]' \\
        --reward.function my_rewards.py:closeness --sampling.prompts 256 --optimizer.lr 1e-6

One step: the engine samples n completions of each prompt with the trainer's current weights; reward processes score
them; prompts whose completions teach nothing are replaced; rewards become advantages within each group; and the
update runs on packs in which a prompt and its images are computed once for all of its completions. `--help` lists all
options, `--dry-run` estimates the cost of a step, `--resume auto` continues from the newest complete checkpoint.
SIGTERM and Ctrl-C save a checkpoint and end the run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastvst.config import not_an_option, render, to_dict
from fastvst.data import Ledger, MixtureConfig, ProcessorConfig
from fastvst.model import Qwen25VL
from fastvst.rl import budget
from fastvst.rl import policy_update as policy
from fastvst.rl.advantages import advantages, pooled_deviation, square_sum
from fastvst.rl.collect import Collected, Collector
from fastvst.rl.filtering import FilterConfig, FilterState, NoUpdate, UpdateWatch
from fastvst.rl.heldout import HELD_OUT_COMPLETIONS, EvaluationConfig, evaluation_row, read_prompts, write_evaluation
from fastvst.rl.packing import Group, Sharing
from fastvst.rl.page import write_report
from fastvst.rl.prompts import NoPrompts
from fastvst.rl.records import RolloutLog, progress_text, step_figures, step_rates
from fastvst.rl.rewards.pool import RewardConfig, RewardError, RewardPool
from fastvst.rl.rollouts import SamplingConfig, resolve_old_logprobs, sample_and_score
from fastvst.rl.rooms import RoomsOptions, find_data, open_prompts, supervised_model
from fastvst.rl.servers import make_engines, saved_when_lost
from fastvst.rollout import RolloutError
from fastvst.train import guard
from fastvst.train.checkpoint import CheckpointConfig
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.fitting import show
from fastvst.train.guard import GuardConfig
from fastvst.train.metrics import LogConfig, Metrics, memory_gib
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from fastvst.train.recipes import Layers, rl_layers
from fastvst.train.run import (
    Saver,
    build_model,
    build_processor,
    joined,
    open_run_folder,
    raise_together,
    read_config,
    restore_data,
    run_script,
    say_hopeless_sources,
)
from fastvst.train.schedule import ScheduleConfig, set_learning_rates
from fastvst.train.stop_signal import StopRequest

# -------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelOptions:
    """The model to train.

    Attributes:
        path: directory of a Qwen2.5-VL checkpoint; none = runs/sft/hf, which examples/sft.py writes if it is missing.
        recompute: activations that backward computes again instead of keeping them, as in examples/sft.py.
    """

    path: str | None = None
    recompute: str | dict[str, str] = "auto"


@dataclass(frozen=True)
class Config:
    """A whole run. Without data.sources it trains on rooms with the settings of `layers`, on a small CPU.

    examples/vst_rl.toml is the third stage of VST.

    Attributes:
        out: run folder; an earlier run in it is renamed, never overwritten.
        steps: rounds of sampling and updating.
        seed: random seed of sampling.
        resume: "auto", a checkpoint folder, or empty.
        resume_data: "anew" = resume with other data, from their beginning; the model, the optimizer and the step stay.
        dry_run: print what a step would cost, and end.
        device_memory: GB of each GPU, for a dry run and for whether the engine is kept between steps; none = of the GPU
            that there is.
        bad_samples: stop when a larger share of the rows cannot be used; <out>/ledger-*.jsonl lists them.
        origins: (option, where its value comes from) of values that are not the defaults below.
    """

    out: str = "runs/rl"
    steps: int = 120
    seed: int = 0
    resume: str = ""
    resume_data: Literal["same", "anew"] = "same"
    dry_run: bool = False
    device_memory: float | None = None
    bad_samples: float = 0.05
    model: ModelOptions = ModelOptions()
    data: MixtureConfig = MixtureConfig(sources=(), shuffle_buffer=200)
    processor: ProcessorConfig = ProcessorConfig(max_pixels=168 * 126, max_seq_len=1024, fov_base_width=200)
    rooms: RoomsOptions = RoomsOptions()
    sampling: SamplingConfig = SamplingConfig(prompts=48, max_tokens=512)
    reward: RewardConfig = RewardConfig()
    filter: FilterConfig = FilterConfig()
    update: policy.UpdateConfig = policy.UpdateConfig(objective="grpo", clip_high=0.28, minibatches=2)
    evaluation: EvaluationConfig = EvaluationConfig(every=30, questions=600)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, vision_lr=1e-5, weight_decay=0.01)
    schedule: ScheduleConfig = ScheduleConfig(kind="constant", warmup=0.0)
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=30, hf=False)
    guard: GuardConfig = GuardConfig(spike=50.0)
    log: LogConfig = LogConfig(every=1)
    origins: tuple[tuple[str, str], ...] = not_an_option(())


def layers(given: Mapping[str, Any]) -> Layers:
    """Settings that follow from what the user gives: see fastvst/train/recipes.py, and those of the rooms."""
    rooms = {
        "sampling.max_tokens": 96,
        # The tiny model's boxes are never right, but it can learn their format: groups without a right completion are
        # kept. Its probabilities are flat: a penalty on entropy makes it give the most likely answer more often.
        "filter.low": -0.01,
        "filter.high": 0.99,
        "filter.tries": 1,
        "update.entropy_coef": -0.1,
        "optimizer.freeze": ["vision", "merger"],
    }
    return [*([] if given.get("data.sources") else [("for the rooms", rooms)]), *rl_layers(given)]


def read(arguments: Sequence[str]) -> Config | None:
    return read_config(Config, arguments, __doc__, layers)


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    config = read(arguments)
    if config is None:
        return
    budget.check(config)
    config = dataclasses.replace(config, update=resolve_old_logprobs(config.update, config.sampling))
    with joined(config.parallel, environment, config.optimizer.weights) as (world, stop):
        if config.model.path is None:
            path = world.once_per_node("start model", lambda: supervised_model(Path(__file__).with_name("sft.py")))
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
        config = budget.resolve_recompute(config, world)
        world.say(render(config, dict(config.origins)), world.describe())
        if config.dry_run:
            dry_run(config, world)
        else:
            run(config, world, stop)


# ------------------------------------------------------------------------------------------------------- model and data


def load_model(config: Config, world: World, weights_dtype: torch.dtype) -> Qwen25VL:
    return build_model(
        world,
        path=config.model.path,
        frozen=config.optimizer.freeze,
        recompute=config.model.recompute,
        reshard=config.parallel.reshard,
        weights_dtype=weights_dtype,
    )


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class StepRollouts:
    """The completions of one step on this rank.

    Attributes:
        found: what the sampling phase has brought.
        groups: the kept groups, with advantages.
    """

    found: Collected
    groups: list[Group]


def collect(config: Config, step: int, collector: Collector, state: FilterState, world: World) -> StepRollouts:
    """Sample prompts until the filter has kept enough groups, or filter.tries is reached. Every rank calls it."""
    found = collector.collect(step, state)
    totals = [record.totals for record, _ in found.kept]
    rewards = torch.tensor(totals, dtype=torch.float64).view(-1, config.sampling.answers)
    squares, count = world.sum(torch.tensor(square_sum(rewards), dtype=torch.float64).to(world.device)).tolist()
    values = advantages(rewards, config.update.advantages, deviation=pooled_deviation(squares, count)).tolist()
    groups = []
    for (record, group), row in zip(found.kept, values, strict=True):
        record.advantages = row
        scored = zip(group.answers, row, record.rewards, strict=True)
        chosen = [dataclasses.replace(a, advantage=v) for a, v, reward in scored if reward.scored]
        groups.append(dataclasses.replace(group, answers=tuple(chosen)))
    return StepRollouts(found, groups)


# --------------------------------------------------------------------------------------------------------------- update


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
    """All optimizer steps on the groups of one step. Every rank calls it.

    Returns:
        (figures, averaged over the optimizer steps; token counts of the packs; the guard's state).
    """
    objective = policy.make_objective(config.update, config.sampling.max_tokens)
    batches, sharing = policy.make_minibatches(groups, config.update, objective, model.config, world)
    temperature = config.sampling.temperature
    frozen = {"vision", "merger"} <= set(config.optimizer.freeze)
    # What depends on the sampling weights or on a frozen vision tower is computed before the first update.
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
                continue  # on all ranks: no rank has a group with an advantage
            first = epoch == 0 and index == 0
            losses = []
            stats = []
            for pack in (pack.to(world.device) for pack in batch.packs):
                loss, found = model(
                    pack.batch, head=policy.policy_head(pack, objective, temperature, first=first), vision=pack.vision
                )
                loss.backward()
                losses.append(loss.detach())
                stats.append(found)
            norm = clip_gradients(model.parameters(), config.optimizer.clip).to(world.device)
            row = policy.reduce_stats(stats, world, loss=world.sum(torch.stack(losses).sum()), grad_norm=norm)
            # A policy loss is always near 0, so only the gradient norm can show a spike.
            judged = row["loss"] if not math.isfinite(row["loss"]) else 0.0
            reason, recent = guard.check(config.guard, recent, judged, row["grad_norm"], config.optimizer.clip)
            if reason is None:
                optimizer.step()
            else:
                shares = [float(p.row_weights.sum()) for p in batch.packs]
                ids = [p.batch.sample_ids for p in batch.packs]
                skip = guard.skip_row(world.rank, step + 1, reason, [loss.item() for loss in losses], shares, ids)
                row["skipped"] = reason
                guard.record_skip(config.guard, recent, Path(config.out), skip)
            optimizer.zero_grad()
            rows.append(row)
    return policy.merge_updates(rows), sharing, recent


# -------------------------------------------------------------------------------------------------------------- the run


def run(config: Config, world: World, stop: StopRequest) -> None:
    out = Path(config.out)
    settings = to_dict(config)
    resume_from = open_run_folder(out, config.resume, world)
    mixture, test_rows = find_data(config.data, config.rooms, config.evaluation, world)
    processor = build_processor(config.processor, config.model.path).with_uint8_patches()
    model = load_model(config, world, config.optimizer.weights)
    stored = policy.reference_dtype(config.optimizer.weights, world)
    reference = None if config.update.kl == "none" else policy.as_reference(load_model(config, world, stored))
    optimizer = make_optimizer(model, config.optimizer)
    saver = Saver(out, config.checkpoint, settings, model, optimizer, processor, world)
    ledger = Ledger(out / f"ledger-{world.rank:05d}.jsonl", config.bad_samples, min_samples=200, deferred=True)
    completion_tokens = config.sampling.answers * config.sampling.max_tokens
    place = {"rank": world.rank, "size": world.size, "completion_tokens": completion_tokens}
    stream = open_prompts(config, mixture, processor, ledger, **place)
    say_hopeless_sources(stream.mixture, stream.examine, world)
    first = 0
    recent = guard.Recent()
    filtered = FilterState()
    parked = None
    if resume_from is not None:
        state, rank_state = saver.load(resume_from)
        first = state["step"]
        recent = guard.Recent.from_json(state["guard"])
        filtered = FilterState(**state["filter"])
        parked = rank_state.get("parked") if config.resume_data == "same" else None
        restore_data(resume_from, config.resume_data, world, lambda: stream.load_state_dict(rank_state["stream"]))
    kept, line = budget.kept_cache(config, model.config, world)
    world.say(line)
    engine, judge = make_engines(model, processor, config, world, kept)
    questions = read_prompts(test_rows, config.evaluation.questions, stream) if test_rows else []

    def save(step: int) -> None:
        state = {"guard": recent.to_json(), "filter": filtered.to_json()}
        rank_state = {"stream": stream.state_dict(), "parked": collector.state_dict()}
        saver.save(step, state=state, rank_state=rank_state)

    def save_lost() -> None:
        if step > first:
            save(step)
            saver.join()
            world.say(f"no server is left after step {step}; continue with --resume auto")

    def evaluate(step: int) -> None:
        every = config.evaluation.every
        if every and questions and (step % every == 0 or step == config.steps):
            mine = stream.encode(questions[world.rank :: world.size])
            found = sample_and_score(mine, config.sampling.params(HELD_OUT_COMPLETIONS, 987_654_321), judge, pool)
            if judge is not engine:
                judge.release()
            row = evaluation_row(step, questions, [record for record, _ in found], world)
            world.say(f"held out, step {step}: {write_evaluation(out, row, world)}")

    metrics = Metrics(
        out,
        config.log,
        config.steps,
        done=first,
        is_main=world.is_main,
        settings=settings,
        line=progress_text,
        origins=config.origins,
    )
    log = RolloutLog(out, rank=world.rank, done=first)
    with (
        metrics,
        RewardPool(config.reward) as pool,
        Collector(config, engine, stream, pool, world, parked) as collector,
        saver,
        saved_when_lost(save_lost),
    ):
        watch = UpdateWatch(config.guard.patience)
        row: dict[str, Any] | None = None
        step = first
        stopped = False
        while step < config.steps and not stopped:
            evaluate(step)
            begin = time.perf_counter()
            set_learning_rates(optimizer, config.schedule, step, config.steps)
            world.use_free_cores()
            try:
                rollouts = collect(config, step, collector, filtered, world)
            except NoPrompts as end:
                if step == first:
                    raise
                world.say(end)
                break
            found = rollouts.found
            filtered = found.filtered
            log.write(step + 1, found.records)
            engine.release()
            if step + 1 < config.steps:
                collector.prepare(filtered)  # images of the next prompts are encoded during the update
            started = time.perf_counter()
            with config.sampling.numerics_context():
                updated, sharing, recent = improve(
                    config, model, reference, optimizer, rollouts.groups, recent, step, world
                )
            seconds = {**found.seconds, "update": time.perf_counter() - started, "step": time.perf_counter() - begin}
            figures = step_figures(found.records, world)
            rates = step_rates(
                sharing,
                seconds,
                world,
                prompt_tokens=found.prompt_tokens,
                images=sum(group.prompt.grid.shape[0] for group in rollouts.groups),
                completion_tokens=figures["answer_tokens"],
                update=config.update,
            )
            row = {
                "step": step + 1,
                "lr": optimizer.param_groups[-1]["lr"],
                **figures,
                **found.figures,
                **updated,
                **rates,
                "memory_gib": memory_gib(world.device),
                "kept_share": round(filtered.kept_share, 4),
                **ledger.figures(),
            }
            metrics.log(row)
            watch.saw(row, filtered, pool.summary())
            flags = [float(stop.requested or ledger.failure() is not None), float(saver.minutes_over())]
            stopped, minutes_over = world.sum(torch.tensor(flags, device=world.device)).bool().tolist()
            step += 1
            if stopped or saver.due(step, config.steps, minutes_over):
                save(step)
        saver.join()
        raise_together(ledger.failure(), world)
        if stopped:
            world.say(f"stopped by a signal after step {step}; continue with --resume auto")
            return
        watch.check_end(row, filtered, pool.summary())
        evaluate(config.steps)
        world.say(pool.summary(), ledger.summary())
        save(step)
    directory = saver.save_model("reinforcement learning", stream.mixture)
    if world.is_main:
        print(f"model: {directory}\nreport: {write_report(out, settings)}", flush=True)


def dry_run(config: Config, world: World) -> None:
    """Memory and FLOPs of a step, estimated from the first 100 prompts; nothing is sampled, trained or written."""
    mixture, _ = find_data(config.data, config.rooms, config.evaluation, world)
    if world.is_main:
        processor = build_processor(config.processor, config.model.path)
        show(*budget.dry_run(config, open_prompts(config, mixture, processor, Ledger()), world))


if __name__ == "__main__":
    run_script(main, RewardError, RolloutError, NoPrompts, NoUpdate)
