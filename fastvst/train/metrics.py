"""What a run says while it works: a progress line, metrics.jsonl always, TensorBoard and W&B when asked for."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastvst import jsonl


@dataclass(frozen=True)
class LogConfig:
    """Where figures go.

    Attributes:
        every: optimizer steps between two progress lines (metrics.jsonl has every step).
        tensorboard: also write TensorBoard events under <out>/tensorboard.
        wandb: also log to this Weights & Biases project; empty = no.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str = ""


class Metrics:
    """The open sinks of one run; on ranks other than 0 it swallows everything. Use as a context manager.

    Args:
        out: run folder; rows go to `out/metrics.jsonl`.
        first_step: rows of this step and later ones, left by a run that was killed after its last checkpoint, are
            dropped, so that the file reads like an uninterrupted run.
        line: makes the progress line of a row; default `progress_line`.
    """

    def __init__(
        self,
        out: Path,
        config: LogConfig,
        total_steps: int,
        *,
        first_step: int,
        is_main: bool,
        settings: dict[str, Any],
        line: Callable[[dict[str, Any], int], str] | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.is_main = is_main
        self.line = line or progress_line
        self.path = out / "metrics.jsonl"
        self._seconds_per_step: float | None = None
        self._board: Any = None
        self._wandb: Any = None
        if not is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        if config.tensorboard:
            module = _optional("torch.utils.tensorboard", "tensorboard", "log.tensorboard")
            self._board = module.SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
        if config.wandb:
            module = _optional("wandb", "wandb", "log.wandb")
            self._wandb = module.init(project=config.wandb, dir=str(out), config=settings, resume="allow")
        jsonl.drop_from_step(self.path, first_step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def log(self, row: dict[str, Any]) -> None:
        """Write one step. `row` needs step, loss, lr, grad_norm, seconds, tokens, images, fill; more keys are kept."""
        if not self.is_main:
            return
        row = rates(row)
        step = row["step"]
        seconds = row["seconds"]
        old = self._seconds_per_step
        self._seconds_per_step = seconds if old is None else 0.9 * old + 0.1 * seconds  # about the last ten steps
        row["eta"] = round((self.total_steps - step - 1) * self._seconds_per_step, 1)
        jsonl.append(self.path, [row])
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if step % self.config.every == 0 or step == self.total_steps - 1 or "skipped" in row:
            print(self.line(row, self.total_steps), flush=True)


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """The row with tokens_per_s, images_per_s and tflops_per_s, from its totals over all ranks and its seconds."""
    seconds = max(row["seconds"], 1e-9)
    row = dict(row)
    row["tokens_per_s"] = round(row["tokens"] / seconds, 1)
    row["images_per_s"] = round(row["images"] / seconds, 2)
    if "flops" in row:
        row["tflops_per_s"] = round(row.pop("flops") / seconds / 1e12, 4)
    return row


def progress_line(row: dict[str, Any], total_steps: int) -> str:
    """loss, lr, gradient norm, LLM tokens/s, images/s, pack fill, memory and time left, in one line."""
    width = len(str(total_steps))
    text = (
        f"step {row['step'] + 1:>{width}}/{total_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"grad {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tok/s  {row['images_per_s']:,.1f} img/s  "
        f"fill {100 * row['fill']:.1f}%  mem {row['memory_gib']:.1f} GiB  left {duration(row['eta'])}"
    )
    return f"{text}  SKIPPED: {row['skipped']}" if "skipped" in row else text


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the GPU, or resident in this process on the CPU. No device sync."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)  # Linux counts KiB


def _optional(module: str, package: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{option} is on, but {package} is not installed: pip install {package} ({error})") from None
