from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastvst.train.metrics import (
    LogConfig,
    Metrics,
    StepLogConfig,
    device_peak_flops,
    duration,
    flat,
    peak_flops,
    progress_line,
    rates,
)


def _row(step: int, **more: object) -> dict[str, object]:
    row = {"step": step, "loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "seconds": 0.5, "tokens": 1000, "images": 4}
    return {**row, "fill": 0.98, "memory_gib": 1.5, "flops": 2e12, **more}


def _open(out: Path, done: int = 0, is_main: bool = True, **log: object) -> Metrics:
    config = LogConfig(**log)  # type: ignore[arg-type]
    return Metrics(out, config, total_steps=10, done=done, is_main=is_main, settings={})


def _steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_in_the_file_and_every_kth_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _open(tmp_path, every=4) as metrics:
        for step in range(1, 11):
            metrics.log(_row(step))
    assert _steps(tmp_path) == list(range(1, 11))
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1/10", "4/10", "8/10", "10/10"]


def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path: Path) -> None:
    with _open(tmp_path) as metrics:
        for step in range(1, 7):
            metrics.log(_row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    with _open(tmp_path, done=4) as metrics:
        for step in range(5, 8):
            metrics.log(_row(step))
    assert _steps(tmp_path) == list(range(1, 8))
    with _open(tmp_path, done=0) as metrics:
        metrics.log(_row(1))
    assert _steps(tmp_path) == [1]


def test_rates_and_line() -> None:
    row = rates(_row(3))
    assert (row["tokens_per_s"], row["images_per_s"], row["tflops_per_s"]) == (2000.0, 8.0, 4.0)
    line = progress_line({**row, "eta": 3725}, 10)
    for part in ("step  3/10", "loss 2.0000", "lr 1.00e-03", "grad 0.500", "2,000 tok/s", "8.0 img/s", "fill 98.0%"):
        assert part in line
    assert "mem 1.5 GiB" in line and line.endswith("left 1:02:05")
    assert progress_line({**row, "eta": 3, "skipped": "nan"}, 10).endswith("left 0:03  SKIPPED: nan")
    assert duration(59.6) == "1:00"


def test_mfu_is_shown_where_the_peak_is_known() -> None:
    row = rates(_row(3), 8e12)  # 2e12 operations in 0.5 s
    assert row["mfu"] == 0.5 and "img/s  mfu 50.0%  fill" in progress_line({**row, "eta": 3}, 10)
    assert "mfu" not in rates(_row(3)) and "mfu" not in progress_line({**rates(_row(3)), "eta": 3}, 10)


def test_a_stated_peak_wins_over_the_data_sheet() -> None:
    world = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, size=4)
    assert peak_flops(world, 0.5) == 2e12 and peak_flops(world) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="peak_tflops is 0"):
        StepLogConfig(peak_tflops=0)


def test_the_line_has_epochs_and_the_share_of_each_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LogConfig(every=1)
    options = {"total_steps": 10, "is_main": True, "settings": {}, "devices": 8, "on_gpu": True}
    with Metrics(tmp_path, config, done=0, epochs=2, **options) as metrics:
        metrics.log(_row(1, epoch=0.125))
    line = capsys.readouterr().out
    assert "step  1/10  epoch 0.12/2  loss" in line and "2,000 tok/s (250 each)" in line and "cost 0.00 GPU h" in line
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gpu_hours": 5.0}) + "\n")
    with Metrics(tmp_path, config, done=0, epochs=None, **options) as metrics:  # the step is done again
        metrics.log(_row(1, epoch=0.125))
    line = capsys.readouterr().out
    assert "epoch 0.12  loss" in line and "cost 5.00 GPU h" in line


def test_tables_of_numbers_are_flat_where_a_name_has_one_value() -> None:
    row = {"loss": 1.0, "losses": {"a": 2, "b": 3.0}, "evaluation": {"tasks": {"depth": 0.5}, "best": True}}
    assert dict(flat(row)) == {"loss": 1.0, "losses/a": 2, "losses/b": 3.0, "evaluation/tasks/depth": 0.5}


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_known_devices(name: str, teraflops: float | None) -> None:
    assert device_peak_flops(name, torch.bfloat16) == (teraflops and teraflops * 1e12)
    assert device_peak_flops(name, torch.float32) is None


def test_the_settings_are_kept_in_the_run_folder(tmp_path: Path) -> None:
    config = LogConfig()
    with Metrics(tmp_path, config, 10, done=0, is_main=True, settings={"steps": 10}):
        assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 10}


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _open(tmp_path, is_main=False) as metrics:
        metrics.log(_row(0))
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_time_left_is_the_steps_left_times_a_step(tmp_path: Path) -> None:
    with _open(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log(_row(step, seconds=2.0))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["eta"] == pytest.approx(14.0)


@pytest.mark.parametrize("option", [{"tensorboard": True}, {"wandb": "project"}])
def test_a_missing_option_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, object]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=rf"log\.{next(iter(option))} is on, but .* pip install"):
        _open(tmp_path, **option)


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with _open(tmp_path, tensorboard=True) as metrics:
        for step in range(1, 4):
            metrics.log(_row(step, seconds=1.0 + step))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("seconds")] == [(1, 2.0), (2, 3.0), (3, 4.0)]
    written = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert set(events.Tags()["scalars"]) == {k for k, v in written.items() if isinstance(v, (int, float))} - {"step"}


def test_wandb_gets_the_settings_every_row_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the three calls of its interface that are used."""
    import sys
    from types import ModuleType, SimpleNamespace

    calls: list[tuple[str, object]] = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append(("log", (step, numbers["loss"]))),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    module = ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options["project"])) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(RuntimeError), _open(tmp_path, wandb="project") as metrics:
        metrics.log(_row(0))
        raise RuntimeError
    loss = json.loads((tmp_path / "metrics.jsonl").read_text())["loss"]
    assert calls == [("init", "project"), ("log", (0, loss)), ("finish", 1)]
