"""Evaluation while a model trains: loss on held-out packs, and answers to held-out questions.

Training does not notice it: the random state is restored, and no row comes from its loader. The figures do not depend
on the number of ranks: packs are planned from the rows alone, each is computed by one rank, and the sums over packs are
made in one order. Answers are greedy.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastvst import jsonl
from fastvst.batch import EncodedSample, PackedBatch, empty_sample, pack
from fastvst.config import ConfigError, check_at_least
from fastvst.data.isolated import isolate
from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.mixture import SourceConfig
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.evaluate import predictions
from fastvst.evaluate.held_out import QuestionSet, open_questions, open_rows, separate
from fastvst.evaluate.run import answer
from fastvst.rollout.fsdp_engine import gather_parameters, is_sharded
from fastvst.train.distributed import World
from fastvst.train.run import raise_together
from fastvst_kernels import linear_cross_entropy

if TYPE_CHECKING:
    from fastvst.model import Qwen25VL

BATCH = 64  # answers decoded together
BETTER = {"loss": "lower", "accuracy": "higher"}


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation while the model trains, and the checkpoint that is kept as checkpoints/best.

    Attributes:
        every: optimizer steps between two evaluations; the last is after the final step. 0 = none.
        path: held-out rows (loss of every source, and answers where rows have a checkable one), "rooms" (rendered rooms
            that training never sees), or NAME=PATH for a benchmark or task of `fastvst evaluate`: vsi_bench=DIR,
            choice=FILE. Several: a,b or a list of tables as in data.sources. None: the rooms, if training uses rooms.
        rows: rows of each path, evenly spaced.
        best: figure that chooses the best checkpoint: "loss" (lower is better) or "accuracy" (higher is better, the
            mean over all paths with answers); none = the loss, or the accuracy where no path has a loss.
    """

    every: int = 0
    path: str | tuple[SourceConfig, ...] | None = None
    rows: int = 200
    best: Literal["loss", "accuracy"] | None = None

    def __post_init__(self) -> None:
        check_at_least(0, every=self.every)
        check_at_least(1, rows=self.rows)
        if self.every and self.path is not None and not separate(self.path):
            raise ValueError("path is empty; expected a file, a folder, rooms or NAME=PATH")


@dataclass
class Evaluation:
    """The held-out data of a run, and the best figure so far. Every rank calls `after` for the same steps.

    Attributes:
        packs: samples of each pack, of all ranks; those of other ranks are empty lists.
        names: data set names of the samples, by `EncodedSample.origin`.
        questions: what is asked.
        best: {"step", "metric", "better", "value"} of the best evaluation so far; empty before the first.
        done: the step of the last evaluation.
    """

    config: EvaluationConfig
    out: Path
    world: World
    processor: Processor
    packs: list[list[Sample]]
    names: list[str]
    questions: list[QuestionSet]
    best: dict[str, Any] = field(default_factory=dict)
    done: int = -1
    _left_out: set[str] = field(default_factory=set, repr=False)

    @property
    def metric(self) -> Literal["loss", "accuracy"]:
        """The figure that chooses the best checkpoint."""
        return self.config.best or ("loss" if self.packs else "accuracy")

    def due(self, step: int, steps: int) -> bool:
        """True if the configuration asks for an evaluation after `step` steps."""
        return step % self.config.every == 0 or step == steps

    def after(self, step: int, model: Qwen25VL) -> dict[str, Any]:
        """Evaluate, write a row of evaluation.jsonl, and print it. Returns the row, the same on every rank."""
        begin = time.perf_counter()
        row: dict[str, Any] = {"step": step}
        with _as_it_was(model, self.world):
            if self.packs:
                row |= self._losses(model)
            if self.questions:
                row |= self._answers(model, step)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()  # the KV cache's memory, before the next step needs it
        self.done = step
        value = row.get(self.metric)
        if value is not None and _is_better(value, self.best, self.metric):
            self.best = {"step": step, "metric": self.metric, "better": BETTER[self.metric], "value": value}
        row["best_step"] = self.best.get("step", 0)
        seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=self.world.device)
        row["seconds"] = round(self.world.sum(seconds).item() / self.world.size, 3)
        if self.world.is_main:
            jsonl.drop_from_step(self.out / "evaluation.jsonl", step)
            jsonl.append(self.out / "evaluation.jsonl", [row])
            print(self._describe(row), flush=True)
        return row

    def is_best(self, step: int) -> bool:
        """True if the evaluation after this step is the best so far, so that its checkpoint is to be written."""
        return self.best.get("step") == step

    def load(self, best: dict[str, Any]) -> None:
        """Continue from the `best` of a checkpoint; one by another figure is no longer compared."""
        self.best = dict(best) if best.get("metric") == self.metric else {}

    def _losses(self, model: Qwen25VL) -> dict[str, Any]:
        """Mean loss of the supervised tokens, in all and by data set."""
        size = self.world.size
        table = torch.zeros(len(self.packs), 2, len(self.names), dtype=torch.float64, device=self.world.device)
        for first in range(0, len(self.packs), size):  # all ranks make the same calls: their collectives must match
            own = first + self.world.rank
            batch = pack(self._encode(own)).to(self.world.device)
            sums = _sums(model, batch, len(self.names))
            if own < len(self.packs):
                table[own] = sums
        losses, weights = self.world.sum(table).cpu().numpy().sum(axis=0)
        if not weights.sum():
            raise ConfigError("evaluation.path: no token of the held-out rows is supervised")
        by_name = {n: loss / w for n, loss, w in zip(self.names, losses, weights, strict=True) if w}
        return {"loss": losses.sum() / weights.sum(), "losses": by_name, "targets": int(weights.sum())}

    def _encode(self, index: int) -> list[EncodedSample]:
        """The samples of a pack; one unsupervised token if there are none."""
        encoded = []
        for sample in self.packs[index] if index < len(self.packs) else ():
            try:
                one = self.processor.encode(sample)
            except SampleError as error:  # pixels that cannot be decoded
                if str(error) not in self._left_out:
                    print(f"evaluation: left out: {error}", flush=True)
                self._left_out.add(str(error))
                continue
            encoded.append(dataclasses.replace(one, origin=self.names.index(sample.source)))
        return encoded or [empty_sample()]

    def _answers(self, model: Qwen25VL, step: int) -> dict[str, Any]:
        """Scores of the answers: one number for each path, and by task or category."""
        plain = gather_parameters(model, dtype=self.world.dtype) if is_sharded(model) else model
        folder = self.out / "evaluation" / f"step-{step:06d}"
        accuracies: dict[str, float] = {}
        tasks: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float]] = {}
        for asked in self.questions:
            texts, failures = self._ask(plain, asked, folder / asked.folder)
            accuracies[asked.name], tasks[asked.name] = asked.score(texts, failures)
            if asked.errors is not None:
                errors[asked.name] = asked.errors(texts)
            if failures and self.world.is_main:
                reasons = "; ".join(list(dict.fromkeys(failures.values()))[:3])
                print(f"evaluation: {len(failures)} questions of {asked.name} have no answer: {reasons}", flush=True)
        mean = sum(accuracies.values()) / len(accuracies)
        return {"accuracy": mean, "accuracies": accuracies, "tasks": tasks, **({"errors": errors} if errors else {})}

    def _ask(self, model: Qwen25VL, asked: QuestionSet, folder: Path) -> tuple[list[str | None], dict[str, str]]:
        """(text of every question or None, id -> reason where there is none). The ranks share the questions."""
        rank = self.world.rank
        size = self.world.size
        mine = asked.rows[rank::size]
        path = folder / f"predictions-{rank:05d}.jsonl"
        error: Exception | None = None
        found: list[predictions.Prediction] = []
        try:
            limit = asked.max_new_tokens
            answer(model, asked.processor, mine, asked.prompt, path, max_new_tokens=limit, batch_size=BATCH)
            known = {row.id for row in mine}
            found = [p for p in (predictions.read(path) if path.exists() else []) if p.id in known]
        except Exception as caught:
            error = caught
        raise_together(error, self.world)
        parts: list[Any] = [found]
        if size > 1:
            parts = [None] * size
            dist.all_gather_object(parts, found)
        return predictions.for_rows(asked.rows, [p for part in parts for p in part])

    def _describe(self, row: dict[str, Any]) -> str:
        parts = []
        if "loss" in row:
            several = ", ".join(f"{name} {loss:.4f}" for name, loss in row["losses"].items())
            parts.append(f"loss {row['loss']:.4f}" + (f" ({several})" if len(row["losses"]) > 1 else ""))
        parts += [f"{name} {100 * share:.1f} % right" for name, share in row.get("accuracies", {}).items()]
        parts += [f"{name}: {key} {value:.3g}" for name, e in row.get("errors", {}).items() for key, value in e.items()]
        best = f"{self.metric}, {BETTER[self.metric]} is better: the best is step {self.best.get('step', 'none')}"
        return f"evaluation after step {row['step']}: {', '.join(parts)} ({best})"


def open_evaluation(
    config: EvaluationConfig,
    *,
    out: Path,
    world: World,
    processor: Processor,
    tokens_per_pack: int,
    rooms: Any,
    trained_on: Sequence[str],
) -> Evaluation | None:
    """Read the held-out rows, on every rank; None without an evaluation.

    Args:
        rooms: called without arguments, it returns the folder of held-out rooms.
        trained_on: paths of the training data; a held-out path among them is said.

    Raises:
        ConfigError: a path that cannot be opened, no usable row, or a `best` figure that no path has.
    """
    if not config.every:
        return None
    if config.path is None and len(trained_on):
        raise ConfigError(f"evaluation.every is {config.every}, but evaluation.path is empty; pass the held-out rows")
    processor = isolate(processor)
    ledger = Ledger(out / "ledger-evaluation.jsonl" if world.is_main else None, deferred=True)
    samples: list[Sample] = []
    questions: list[QuestionSet] = []
    for source in separate(config.path or "rooms"):
        if str(Path(source.path).resolve()) in {str(Path(path).resolve()) for path in trained_on}:
            world.say(f"evaluation: {source.path} is also trained on; its figures are not those of unseen rows")
        try:
            asked = open_questions(source, config.rows, processor)
            if asked is None:
                place = dataclasses.replace(source, path=rooms()) if source.path == "rooms" else source
                found = open_rows(place, config.rows, processor, tokens_per_pack, ledger)
                samples += found.samples
                asked = found.questions
        except (OSError, ValueError) as error:
            raise ConfigError(f"evaluation.path: {error}") from error
        questions += [asked] if asked is not None else []
    if ledger.total:
        world.say("evaluation: rows are left out", ledger.summary())
    names = sorted({sample.source for sample in samples})
    packs = plan(samples, processor, tokens_per_pack, world)
    made = Evaluation(config, out, world, processor, packs, names, _named_apart(questions))
    if (made.metric == "loss" and not packs) or (made.metric == "accuracy" and not questions):
        raise ConfigError(f"evaluation.best is {config.best!r}, but no row of evaluation.path has one")
    return made


def plan(samples: Sequence[Sample], processor: Processor, budget: int, world: World) -> list[list[Sample]]:
    """Packs of at most `budget` tokens, in the order of the samples; a rank keeps the samples of its own packs."""
    packs: list[list[Sample]] = []
    filled = budget
    for sample in samples:
        tokens = processor.measure(sample).tokens
        if filled + tokens > budget:
            packs.append([])
            filled = 0
        packs[-1].append(sample)
        filled += tokens
    return [p if number % world.size == world.rank else [] for number, p in enumerate(packs)]


@torch.no_grad()
def _sums(model: Qwen25VL, batch: PackedBatch, count: int) -> Tensor:
    """(2, count) sums over data sets of the weighted losses and of the weights of a pack."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        parts = torch.zeros_like(batch.target_weights)
        rows = hidden[batch.loss_rows]
        linear_cross_entropy(rows, weight, batch.targets, row_weights=batch.target_weights, row_losses=parts)
        return torch.stack([batch.sum_by_origin(values, count) for values in (parts, batch.target_weights)])

    found: Tensor = model(batch, head=head)
    return found


@contextmanager
def _as_it_was(model: Qwen25VL, world: World) -> Iterator[None]:
    """Evaluation mode; afterwards the mode, the random state and the sharding are those from before."""
    training = model.training
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            for module in model.modules():
                if isinstance(module, FSDPModule):  # a forward pass without a backward leaves the root gathered
                    module.reshard()


def _is_better(value: float, best: dict[str, Any], metric: str) -> bool:
    """Whether a figure is better than the best so far; NaN never is."""
    if not best:
        return value == value
    return value < best["value"] if BETTER[metric] == "lower" else value > best["value"]


def _named_apart(questions: Sequence[QuestionSet]) -> list[QuestionSet]:
    """The same sets with different names: "a", "a#2"."""
    names = [asked.name for asked in questions]
    numbers = [names[:index].count(name) + 1 for index, name in enumerate(names)]
    return [
        asked if number == 1 else dataclasses.replace(asked, name=f"{asked.name}#{number}")
        for asked, number in zip(questions, numbers, strict=True)
    ]
