"""The figures of a run: a progress line, metrics.jsonl always, TensorBoard and W&B on request.

Steps are counted from 1 everywhere. The row of step k is written after the k-th step, and so is the checkpoint step-k.
"""

from __future__ import annotations

import importlib
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastvst import atomic, jsonl
from fastvst.config import check_at_least, check_positive
from fastvst.train.distributed import World

# Peak bfloat16 FLOP/s of the tensor cores without sparsity, by the product names that CUDA reports. Source: NVIDIA's
# data sheets of A100 (2021), H100 (2023; PCIe: 2022) and H200 (2024), which state twice as much, with sparsity, for the
# latter two.
PEAK_BF16_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
}


@dataclass(frozen=True)
class LogConfig:
    """Where the figures of a run are written.

    Attributes:
        every: optimizer steps between two progress lines (metrics.jsonl has every step).
        tensorboard: also write TensorBoard events to <out>/tensorboard.
        wandb: also log to this Weights & Biases project; empty = no.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self) -> None:
        check_at_least(1, every=self.every)


@dataclass(frozen=True)
class StepLogConfig(LogConfig):
    """Where the figures of a run are written, and what one step is compared with.

    Attributes:
        every: optimizer steps between two progress lines (metrics.jsonl has every step).
        tensorboard: also write TensorBoard events to <out>/tensorboard.
        wandb: also log to this Weights & Biases project; empty = no.
        peak_tflops: peak of one device in TFLOP/s, measured or stated, for the MFU; none = of the data sheet, if known.
        profile: step whose trace and costliest operators are written to <out>/profile; 0 = none.
    """

    peak_tflops: float | None = None
    profile: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, profile=self.profile)
        if self.peak_tflops is not None:
            check_positive(peak_tflops=self.peak_tflops)


class MissingPackage(ImportError):
    """An option needs a package that is not installed; the message says which one."""


class Metrics:
    """Writes the figures of one run; on ranks other than 0 it does nothing. Use as a context manager.

    Args:
        out: run folder; rows are appended to `out/metrics.jsonl`.
        done: steps done so far; rows of later steps are dropped. A run that was killed after its last checkpoint leaves
            such rows, and the resumed run writes them again.
        settings: the resolved configuration; it is written to `out/config.json` and sent to W&B.
        line: makes the progress line of a row; default `progress_line`.
        peak_flops: FLOP/s of all devices together, for the MFU; None = unknown.
        devices: number of devices, for the tokens/s of one and for the cost so far (gpu_hours or cpu_hours, by on_gpu).
            The cost of steps that a kill has undone counts too.
        epochs: data.epochs, for the progress line; None = endless data.
        origins: (option, where its value comes from), written to `out/config_origins.json`.
    """

    def __init__(
        self,
        out: Path,
        config: LogConfig,
        total_steps: int,
        *,
        done: int,
        is_main: bool,
        settings: dict[str, Any],
        line: Callable[[dict[str, Any], int], str] | None = None,
        peak_flops: float | None = None,
        devices: int = 1,
        on_gpu: bool = False,
        epochs: int | None = None,
        origins: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.is_main = is_main
        self.line = line or progress_line
        self.peak_flops = peak_flops
        self.devices = devices
        self.cost = "gpu_hours" if on_gpu else "cpu_hours"
        self.epochs = epochs
        self.path = out / "metrics.jsonl"
        self._seconds_per_step: float | None = None
        self._evaluated = done
        self._evaluation_share = 0.0  # seconds of an evaluation divided by the steps between two
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._begin = time.perf_counter()
        self._hours = 0.0  # device hours of earlier processes of this run
        if not is_main:
            return
        if self.path.is_file():
            self._hours = max((row.get(self.cost, 0.0) for row in jsonl.read(self.path)), default=0.0)
        if config.tensorboard:
            module = _optional("torch.utils.tensorboard", "tensorboard", "log.tensorboard")
            self._tensorboard = module.SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
        if config.wandb:
            module = _optional("wandb", "wandb", "log.wandb")
            out.mkdir(parents=True, exist_ok=True)
            self._wandb = module.init(project=config.wandb, dir=str(out), config=settings, resume="allow")
        jsonl.drop_from_step(self.path, done + 1)
        for name, values in (("config.json", settings), ("config_origins.json", dict(origins))):
            atomic.write_text(out / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def log(self, row: dict[str, Any]) -> None:
        """Write one step. `row` needs step, loss, lr, grad_norm, seconds, tokens, images, fill; more keys are kept.

        Tables of numbers ("losses": {"rooms": 1.2}) are written as they are; for TensorBoard and W&B they are flat
        ("losses/rooms").
        """
        if not self.is_main:
            return
        row = rates(row, self.peak_flops, self.devices)
        row[self.cost] = round(self._hours + self.devices * (time.perf_counter() - self._begin) / 3600, 5)
        if self.epochs is not None and "epoch" in row:
            row["epochs"] = self.epochs
        step = row["step"]
        seconds = row["seconds"]
        old = self._seconds_per_step
        self._seconds_per_step = seconds if old is None else 0.9 * old + 0.1 * seconds  # about the last ten steps
        if "evaluation" in row:
            self._evaluation_share = row["evaluation"]["seconds"] / max(1, step - self._evaluated)
            self._evaluated = step
        row["eta"] = round((self.total_steps - step) * (self._seconds_per_step + self._evaluation_share), 1)
        jsonl.append(self.path, [row])
        numbers = {name: value for name, value in flat(row) if name != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if step % self.config.every == 0 or step in (1, self.total_steps) or "skipped" in row:
            print(self.line(row, self.total_steps), flush=True)


def flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of the numbers of a row and of its tables, whose names are joined by "/"."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, value


def rates(row: dict[str, Any], peak_flops: float | None = None, devices: int = 1) -> dict[str, Any]:
    """The row with tokens_per_s, images_per_s, tflops_per_s and, where the peak is known, mfu.

    They follow from the row's totals over all ranks and its seconds. MFU (model FLOPs utilization, arXiv 2204.02311) is
    the share of the peak that the model's own operations use; what is computed again in backward does not count.
    """
    seconds = max(row["seconds"], 1e-9)
    row = dict(row)
    row["tokens_per_s"] = round(row["tokens"] / seconds, 1)
    if devices > 1:
        row["tokens_per_s_per_device"] = round(row["tokens"] / seconds / devices, 1)
    row["images_per_s"] = round(row["images"] / seconds, 2)
    if "flops" in row:
        flops_per_s = row.pop("flops") / seconds
        row["tflops_per_s"] = round(flops_per_s / 1e12, 4)
        if peak_flops:
            row["mfu"] = round(flops_per_s / peak_flops, 4)
    return row


def of_world(world: World, peak_tflops: float | None = None) -> dict[str, Any]:
    """The arguments of `Metrics` that follow from the devices of the run; for peak_tflops see `StepLogConfig`."""
    return {
        "is_main": world.is_main,
        "peak_flops": peak_flops(world, peak_tflops),
        "devices": world.size,
        "on_gpu": world.device.type == "cuda",
    }


def peak_flops(world: World, peak_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of all devices of a run together, or None where it is not known.

    Args:
        peak_tflops: see `StepLogConfig`.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12 * world.size
    if world.device.type != "cuda":
        return None
    peak = device_peak_flops(torch.cuda.get_device_name(world.device), world.dtype)
    return peak and peak * world.size


def device_peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device for matrix products in `dtype`, or None where it is not known (CPU, MIG slices, ...).

    Args:
        device_name: as `torch.cuda.get_device_name` reports it, such as "NVIDIA H100 80GB HBM3".
    """
    if dtype != torch.bfloat16 or "MIG" in device_name:
        return None
    known = [name for name in PEAK_BF16_FLOPS if f"{device_name} ".replace("-", " ").startswith(f"{name} ")]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


def progress_line(row: dict[str, Any], total_steps: int) -> str:
    """Step, epoch, loss, learning rate, gradient norm, rates, MFU if known, fill, memory, cost so far and time left.

    The cost is in hours of all devices together.
    """
    width = len(str(total_steps))
    mfu = f"mfu {100 * row['mfu']:.1f}%  " if "mfu" in row else ""
    epoch = f"  epoch {row['epoch']:.2f}" + (f"/{row['epochs']}" if "epochs" in row else "") if "epoch" in row else ""
    each = f" ({row['tokens_per_s_per_device']:,.0f} each)" if "tokens_per_s_per_device" in row else ""
    costs = [f"cost {row[f'{kind}_hours']:.2f} {kind.upper()} h  " for kind in ("gpu", "cpu") if f"{kind}_hours" in row]
    text = (
        f"step {row['step']:>{width}}/{total_steps}{epoch}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"grad {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tok/s{each}  {row['images_per_s']:,.1f} img/s  {mfu}"
        f"fill {100 * row['fill']:.1f}%  mem {row['memory_gib']:.1f} GiB  {''.join(costs)}left {duration(row['eta'])}"
    )
    text += rejected(row)
    return f"{text}  SKIPPED: {row['skipped']}" if "skipped" in row else text


def rejected(row: dict[str, Any]) -> str:
    """The count and the share of samples that cannot be used; empty if there are none."""
    return f"  rejected {row['rejected']:,} ({100 * row['rejected_share']:.2g}%)" if row.get("rejected") else ""


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
        raise MissingPackage(
            f"{option} is on, but {package} is not installed: pip install {package} ({error})"
        ) from None
