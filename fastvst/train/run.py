"""What all training scripts share around their loops: command line, processes, run folder, model, processor, saving."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fastvst.config import ConfigError, leaves, load_config, resolve, usage
from fastvst.data import LoaderConfig, MixtureConfig, Processor, ProcessorConfig
from fastvst.data.ledger import TooManyBadSamples
from fastvst.data.loader import make_planner, open_again
from fastvst.data.mixture import Mixture, open_mixture
from fastvst.data.planner_process import Node
from fastvst.data.probe import probe
from fastvst.data.processor import with_action_tokens
from fastvst.data.sample import Sample
from fastvst.model import ModelConfig, Qwen25VL, weights
from fastvst.model.recompute import Recompute
from fastvst.model.vocabulary import grow_vocabulary
from fastvst.train import checkpoint, distributed, lock
from fastvst.train.checkpoint import CheckpointConfig, CheckpointError
from fastvst.train.checkpoint_writer import CheckpointWriter
from fastvst.train.distributed import ParallelConfig, ParallelError, World
from fastvst.train.fitting import OutOfMemory
from fastvst.train.guard import GuardError
from fastvst.train.metrics import MissingPackage
from fastvst.train.model_card import write_card
from fastvst.train.optimizer import freeze
from fastvst.train.recipes import Layers
from fastvst.train.resume import Lineage, current_branch, find, set_damaged_aside, start_branch
from fastvst.train.snapshot import Contents, HFDirectory
from fastvst.train.stop_signal import StopRequest, end_with_launcher
from fastvst.train.watchdog import Watchdog

C = TypeVar("C")


class RankError(RuntimeError):
    """Another rank has an error that ends the run on all ranks; the message has its text."""


# Errors whose message tells the user what to change; everything else ends with a traceback.
USER_ERRORS: tuple[type[Exception], ...] = (
    ConfigError,
    ParallelError,
    CheckpointError,
    GuardError,
    TooManyBadSamples,
    RankError,
    lock.FolderInUse,
    MissingPackage,
    OutOfMemory,
    FileNotFoundError,
)
# Errors of the disk and of paths, which the user can repair.
USER_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EADDRINUSE, errno.EMFILE, errno.ENFILE),
}
COUNTED_ROWS = 20_000  # rows that are planned to count the steps of an epoch; the rest is extrapolated
ERROR_WAIT = 5.0  # seconds that a run which ends with an error waits for the checkpoint in progress
STORE_WAIT = timedelta(seconds=8)  # limit for a connection to the launcher's store; the launcher may be gone
SPEAK_WAIT = timedelta(seconds=60)  # limit for the rank that prints the error of all


# --------------------------------------------------------------------------------------------------------- command line


def run_script(main: Callable[[Sequence[str]], object], *errors: type[Exception]) -> None:
    """Call a script's `main` with the command line. USER_ERRORS and `errors` end it with one line, not a traceback."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted before the end", file=sys.stderr, flush=True)
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
    except Exception as error:
        if not isinstance(error, (*USER_ERRORS, *errors, OSError)):
            raise
        if isinstance(error, OSError) and not isinstance(error, USER_ERRORS) and error.errno not in USER_ERRNOS:
            raise
        sys.exit(_say_once(f"{Path(sys.argv[0]).name}: {type(error).__name__}: {error}"))


def _say_once(text: str) -> str | int:
    """The argument of `sys.exit` for an error that ends a run: its text, or 1 if it has been printed.

    Under torchrun the rank that is first to have an error prints it; the others wait for that. Ranks mostly meet the
    same error, or one that follows from the first. They agree in the store of torchrun, which ends them all as soon as
    one has ended.
    """
    key = f"fastvst error {os.environ.get('TORCHELASTIC_RUN_ID')} {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with contextlib.suppress(RuntimeError, OSError):  # the launcher is gone: then every rank speaks
            address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            store = dist.TCPStore(*address, is_master=False, timeout=STORE_WAIT, wait_for_workers=False)
            if store.add(key, 1) > 1:
                store.wait([f"{key} said"], SPEAK_WAIT)
                return 1
    if store is None:
        return text
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(RuntimeError, OSError):
        store.set(f"{key} said", "")
    return 1


def read_config(
    config_class: type[C],
    arguments: Sequence[str],
    description: str | None,
    layers: Callable[[Mapping[str, Any]], Layers] | None = None,
) -> C | None:
    """The configuration that the command line describes, or None after printing the help that it asks for.

    Args:
        layers: see `fastvst.config.resolve`. The class needs `steps` and a field `origins` for (name, origin).

    Raises:
        ConfigError: as `load_config`, or model.path is not a checkpoint.
    """
    if not {"-h", "--help"} & set(arguments):
        if layers is None:
            return load_config(config_class, arguments)
        try:
            config, origins = resolve(config_class, arguments, layers)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"model.path: {error}") from error
        except (OSError, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"model.path: {error}") from error
        steps = cast(Any, config).steps
        if steps is not None and steps < 1:
            raise ConfigError(f"steps is {steps}; expected at least 1")
        return replace(cast(Any, config), origins=tuple(origins.items()))
    try:
        print(f"{description}\nOptions:\n{usage(config_class)}", flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more when it exits
    return None


# ------------------------------------------------------------------------------------------------------- start of a run


@contextmanager
def joined(
    parallel: ParallelConfig, environment: Mapping[str, str] | None, weights: torch.dtype = torch.float32
) -> Iterator[tuple[World, StopRequest]]:
    """This process as a rank of the run: process group, watchdog and stop signals, until the end of the block.

    Args:
        environment: see `distributed.start`, like weights.
    """
    stop = StopRequest()
    end_with_launcher(os.environ if environment is None else environment, stop)
    world = distributed.start(parallel, environment=environment, weights=weights)
    try:
        with Watchdog(world), stop:
            yield world, stop
            distributed.stop(world)
    finally:
        lock.release()


def open_run_folder(out: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to resume from, if any. Without `resume`, an earlier run in `out` is renamed, never overwritten.

    The folder is locked until the end of `joined`.

    Raises:
        FolderInUse: another process trains in `out`; raised on every rank.
        CheckpointError: the checkpoint that `resume` names is damaged, or "auto" finds none that is whole.
    """
    found, damaged = find(resume, out / "checkpoints", world)
    refused: Exception | None = None
    if world.is_main:
        try:
            lock.acquire(out)
            if not resume and checkpoint.set_aside(out) is not None:
                lock.acquire(out)
            for path in damaged:
                print(f"{path} was renamed to {set_damaged_aside(path).name}", flush=True)
        except lock.FolderInUse as error:
            refused = error
        except OSError as error:
            refused = ConfigError(f"out: {out} cannot be a run folder: {error.strerror} ({error.filename})")
    raise_together(refused, world)
    return found


def raise_together(error: Exception | None, world: World) -> None:
    """Raise on every rank if any rank has an error: its own one, or RankError. Every rank calls it."""
    failed = torch.zeros(world.size, device=world.device)
    failed[world.rank] = error is not None
    ranks = world.sum(failed).nonzero().flatten().tolist()
    if not ranks:
        return
    if world.store is not None and world.rank == ranks[0]:
        world.store.set("first error", str(error))
    if error is not None:
        raise error
    assert world.store is not None
    raise RankError(f"rank {ranks[0]}: {world.store.get('first error').decode()}")


def say_hopeless_sources(mixture: Mixture, examine: Callable[[Sample], object], world: World) -> None:
    """Print the sources whose first rows all fail, with the first reason."""
    if world.is_main:
        world.say(*(found.describe() for found in probe(mixture, examine) if found.hopeless))


def open_data(config: MixtureConfig, *, whole_rows: bool = False) -> Mixture:
    """`open_mixture`, with a data set that cannot be opened as ConfigError."""
    try:
        return open_mixture(config, whole_rows=whole_rows)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.sources: {error}") from error


def total_steps(steps: int | None, default: int, mixture: Mixture, count: Callable[[Mixture], int]) -> int:
    """Steps of the schedule: `steps`, or all of data.epochs if that is given and fewer, or `default` without both.

    Args:
        count: steps of a finite mixture; called only if data.epochs is given.
    """
    if mixture.config.epochs is None:
        return default if steps is None else steps
    found = max(1, count(mixture))
    return found if steps is None else min(steps, found)


def count_steps(mixture: Mixture, processor: Processor, loader: LoaderConfig, ranks: int) -> int:
    """Steps of the loader over all epochs. They are planned without decoding, and extrapolated after COUNTED_ROWS."""
    planner = make_planner(open_again(mixture), processor, loader, ranks)
    steps = 0
    seen = 0
    while (step := planner.next_step()) is not None and step.packs:
        steps += 1
        seen += step.seen
        if seen >= COUNTED_ROWS:
            return round(steps * len(mixture) * (mixture.config.epochs or 1) / seen)
    return steps


def restore_data(path: Path, choice: str, world: World, load: Callable[[], object]) -> None:
    """Call `load`, which takes the data state of the checkpoint `path`, unless `choice` (resume.data) is "anew".

    Raises:
        CheckpointError: the data state does not fit the data; it names the option to continue on other data.
    """
    if choice == "anew":
        world.say("the data start anew (resume.data is anew)")
        return
    try:
        load()
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error} To keep the model, the optimizer and the step and to start the data from the beginning, "
            "pass --resume.data anew"
        ) from error


def loader_place(world: World) -> dict[str, Any]:
    """Arguments of `make_loader`: this rank, and its machine, whose ranks share a planner. Call it once a run."""
    node = Node(world.once_per_node("planner", secrets.token_hex), world.local_rank, world.local_size)
    return {"rank": world.rank, "world_size": world.size, "node": node}


def build_model(
    world: World,
    *,
    path: str | None,
    preset: str = "tiny",
    seed: int = 0,
    frozen: Iterable[str] = (),
    recompute: Recompute = "none",
    reshard: bool = True,
    weights_dtype: torch.dtype = torch.float32,
    vocab_size: int = 0,
) -> Qwen25VL:
    """The model on its device, sharded over the ranks. Rank 0 loads the weights, the other ranks receive their shards.

    Args:
        path: directory of a checkpoint; None = `preset` with random weights drawn from `seed`.
        frozen: see `OptimizerConfig.freeze`.
        recompute: see `fastvst.model.recompute`.
        reshard: see `ParallelConfig`.
        weights_dtype: dtype of the weights between steps, see `OptimizerConfig.state`.
        vocab_size: rows of the embedding; more than the checkpoint's are appended, see `grow_vocabulary`.
    """
    source = None
    failure: Exception | None = None
    config = model_config(path, preset)
    rows = max(vocab_size, config.vocab_size)
    with torch.device("meta"):
        skeleton = Qwen25VL(replace(config, vocab_size=rows)).to(weights_dtype)
    if world.is_main and path:
        try:
            source = Qwen25VL.from_pretrained(path, dtype=weights_dtype)
        except (OSError, ValueError) as error:
            failure = ConfigError(f"model.path: {error}")
    elif world.is_main:
        torch.manual_seed(seed)
        source = Qwen25VL.fresh(preset, start="aligned").to(weights_dtype)
    raise_together(failure, world)
    if source is not None and rows > config.vocab_size:
        grow_vocabulary(source, rows, seed)
        world.say(f"the vocabulary of the model grows from {config.vocab_size} to {rows} rows")
    try:
        freeze(skeleton, frozen)
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error
    model = distributed.place(source, skeleton, world, reshard=reshard)
    model.recompute = recompute
    return model


def model_config(path: str | None, preset: str = "tiny") -> ModelConfig:
    """The configuration of the model that `build_model` builds."""
    try:
        return ModelConfig.from_pretrained(path) if path else ModelConfig.preset(preset)
    except ValueError as error:
        raise ConfigError(f"{'model.path' if path else 'model.preset'}: {error}") from error


def build_processor(
    config: ProcessorConfig, path: str | None, preset: str = "tiny", data: MixtureConfig | None = None
) -> Processor:
    """The processor of a checkpoint or preset with the options of `config`; the rest comes from the checkpoint.

    Args:
        data: its sources of robot actions add their tokens to the tokenizer. `model_config` of the result has the rows
            that these need, see `ActionRows.grow`.
    """
    options = dict(leaves(config))
    try:
        processor = Processor.from_pretrained(path, **options) if path else Processor.preset(preset, **options)
        for source in data.sources if data is not None else ():
            if source.actions:
                processor = with_action_tokens(processor, source.actions.codec, grow=source.actions.grow)
        return processor
    except ValueError as error:
        hint = f"model.path: {error}" if path else f"model.preset is {preset!r} without model.path: {error}"
        raise ConfigError(hint) from error


# --------------------------------------------------------------------------------------------------------------- saving


@dataclass
class Saver:
    """Writes the checkpoints of a run while it trains, and at its end the model as a Hugging Face directory.

    Every rank calls `load`, `save`, `join` and `save_model`. As a context manager around the loop: whatever ends the
    loop, a checkpoint that was saved before a normal end is complete afterwards.

    Attributes:
        out: run folder.
        settings: the resolved configuration, JSON-able; a part of every checkpoint.
    """

    out: Path
    config: CheckpointConfig
    settings: Mapping[str, Any]
    model: Qwen25VL
    optimizer: torch.optim.Optimizer
    processor: Processor
    world: World

    def __post_init__(self) -> None:
        self._writer = CheckpointWriter(self.out / "checkpoints", self.world)
        self._last = time.monotonic()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.join()
        else:
            self._writer.leave(ERROR_WAIT if isinstance(error, Exception) else 0)

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint into model and optimizer; returns (state of all ranks, state of this rank)."""
        found = checkpoint.load(path, self.model, self.optimizer, self.world, verified=True)  # by open_run_folder
        self.world.say(f"resumed from {path}")
        if self.world.is_main:
            self.world.say(*start_branch(self.out / "checkpoints", path))
        return found

    def minutes_over(self) -> bool:
        """True if the clock asks for a checkpoint; only on rank 0, whose answer the loop shares with all ranks.

        It travels in the sum that the loop already makes in each step, so that all ranks save after the same step.
        """
        minutes = (time.monotonic() - self._last) / 60
        return self.world.is_main and minutes >= self.config.every_minutes > 0 and not self._writer.busy

    def due(self, step: int, total_steps: int, minutes_over: bool) -> bool:
        """True if the configuration asks for a checkpoint after `step` steps. The one at the end is not included.

        Also says how the last write went, if it has ended since.

        Args:
            minutes_over: what rank 0's `minutes_over` said.
        """
        self._writer.report()
        every = self.config.every
        return step < total_steps and (minutes_over or (every > 0 and step % every == 0))

    def save(self, step: int, *, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Start to write the checkpoint of `step`; for state and rank_state see `Contents`."""
        folder = self.out / "checkpoints"
        hf = self._hf() if self.config.hf else None
        lineage = current_branch(folder) or Lineage()
        contents = Contents(state, rank_state, self.settings, hf, self.config.keep, lineage)
        self._writer.save(step, self.model, self.optimizer, contents)
        self._last = time.monotonic()

    def join(self) -> None:
        """Wait for the checkpoint that is being written. Raises CheckpointError if it fails."""
        self._writer.join()

    def save_model(self, method: str, data: Mixture | str) -> Path:
        """Write the Hugging Face directory `out/hf` in the compute dtype, with its model card (see `write_card`)."""
        folder = checkpoint.save_hf(self.out / "hf", self.model, self.world, self._hf())
        if self.world.is_main:
            write_card(self.out, self.settings, data, method)
        return folder

    def _hf(self) -> HFDirectory:
        def write_settings(folder: Path) -> None:
            weights.write_settings(folder, self.model.config, [self.world.dtype], self.processor)

        return HFDirectory(self.world.dtype, write_settings)
