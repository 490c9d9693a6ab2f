"""Checkpoints that a thread writes while training continues. Events hold the writer; no test depends on a clock."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fastvst.train import checkpoint, checkpoint_writer, distributed
from fastvst.train.checkpoint import CheckpointError, complete
from fastvst.train.checkpoint_writer import CheckpointWriter, free_host_memory
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from fastvst.train.resume import Lineage
from fastvst.train.snapshot import Contents, HFDirectory
from ranks import run_ranks
from toy import ToyModel, toy_batch

HF = HFDirectory(torch.bfloat16, lambda folder: (folder / "config.json").write_text("{}"))


class Gate:
    """In place of the tensors' writer: it starts, waits until `opened`, and fails with `error` if there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = threading.Event()
        self.opened = threading.Event()
        self.error: Exception | None = None
        self._write = checkpoint.write_tensors
        monkeypatch.setattr(checkpoint, "write_tensors", self)

    def __call__(self, *arguments: Any) -> Any:
        self.started.set()
        assert self.opened.wait(60)
        names = self._write(*arguments)
        if self.error is not None:
            raise self.error
        return names


class Training:
    """A toy model with its optimizer and its checkpoints, on one or several ranks."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.world: World = distributed.start(ParallelConfig(device="cpu", threads=1), environment=environment or {})
        self.model = ToyModel()
        distributed.shard(self.model, self.world)
        self.optimizer = make_optimizer(self.model, OptimizerConfig(lr=1e-2, vision_lr=1e-2))
        self.writer = CheckpointWriter(folder, self.world)
        self.folder = folder

    def steps(self, first: int, last: int) -> list[float]:
        curve = []
        for step in range(first, last):
            tokens, pixels, targets = toy_batch(step)
            loss = nn.functional.cross_entropy(self.model(tokens, pixels), targets) / self.world.size
            loss.backward()
            clip_gradients(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            curve.append(self.world.sum(loss.detach().clone()).item())
        return curve

    def save(self, step: int, **more: Any) -> None:
        state = {"mine": [step]}  # changed below: the writer must not see it
        contents = Contents(state, {"rank": self.world.rank}, {}, **{"hf": HF, **more})
        self.writer.save(step, self.model, self.optimizer, contents)
        state["mine"].append(-1)

    def load(self, step: int) -> dict[str, Any]:
        path = checkpoint.path_of(self.folder, step)
        return checkpoint.load(path, self.model, self.optimizer, self.world)[0]

    def numbers(self) -> list[np.ndarray]:
        state = checkpoint.tensors_of(self.model, self.optimizer)[0].values()
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in state]
        return [tensor.detach().numpy().copy() for tensor in whole]


def _open_when_waited_for(gate: Gate, thread: int) -> None:
    """Open the gate as soon as a thread is inside `Thread.join`."""
    while Path(sys._current_frames()[thread].f_code.co_filename).name != "threading.py":
        time.sleep(0.01)
    gate.opened.set()


def names(folder: Path) -> list[str]:
    return [path.name for path in complete(folder)]


def test_training_goes_on_and_the_copy_is_of_the_step_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    run = Training(tmp_path)
    run.steps(0, 5)
    at_save = run.numbers()
    run.save(5)
    assert gate.started.wait(60)
    whole = run.steps(5, 12)  # changes every tensor in place, while nothing is written yet
    assert run.writer.busy and names(tmp_path) == []
    assert not any(np.array_equal(a, b) for a, b in zip(at_save, run.numbers(), strict=True))
    gate.opened.set()
    run.writer.join()
    assert names(tmp_path) == ["step-000005"]

    again = Training(tmp_path)
    assert again.load(5) == {"step": 5, "world_size": 1, "mine": [5]}
    assert all(np.array_equal(a, b) for a, b in zip(at_save, again.numbers(), strict=True))
    assert again.steps(5, 12) == whole


def test_the_next_save_waits_for_the_last_one_and_both_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint_writer, "WORTH_SAYING", 0.0)
    gate = Gate(monkeypatch)
    run = Training(tmp_path)
    for step in (1, 2, 3):
        run.steps(step, step + 1)
        if step == 2:
            threading.Thread(target=_open_when_waited_for, args=(gate, threading.get_ident())).start()
        run.save(step, keep=2)  # the staging memory of the last one is used again
    expected = run.numbers()
    run.writer.join()
    assert names(tmp_path) == ["step-000002", "step-000003"]
    said = capsys.readouterr().out
    assert "step 2 waited" in said and "checkpoint.every" in said and "saved" in said
    run.steps(4, 6)
    run.load(3)
    assert all(np.array_equal(a, b) for a, b in zip(expected, run.numbers(), strict=True))


def test_a_full_disk_is_reported_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(monkeypatch)
    gate.opened.set()
    run = Training(tmp_path)
    run.save(1)
    run.writer.join()
    gate.error = OSError(28, "No space left on device")
    run.save(2)
    run.writer._thread.join()  # type: ignore[union-attr]
    run.writer.report()  # what the loop calls in every step
    said = capsys.readouterr().err
    assert (
        "could not write" in said and "No space left" in said and "step-000001" in said and "Training continues" in said
    )
    run.writer.report()
    assert capsys.readouterr().err == ""  # said once
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    gate.error = None
    run.save(3)
    run.writer.join()
    assert names(tmp_path) == ["step-000001", "step-000003"]
    gate.error = OSError(28, "No space left on device")
    run.save(4)
    with pytest.raises(CheckpointError, match="No space left"):  # at the end of a run
        run.writer.join()


def test_a_run_that_ends_with_an_error_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(monkeypatch)
    gate.opened.set()
    run = Training(tmp_path)
    run.save(1)
    run.writer.join()
    gate.opened.clear()
    gate.started.clear()
    run.save(2)
    assert gate.started.wait(60)
    run.writer.leave(0.01)
    assert "step-000002 was still being written and is given up; complete checkpoints: step-000001" in (
        capsys.readouterr().out
    )
    assert (tmp_path / ".step-000002.partial").is_dir()  # as after a kill
    later = Training(tmp_path)
    gate.opened.set()
    run.writer._thread.join()  # type: ignore[union-attr]
    (tmp_path / ".step-000009.partial").mkdir()
    later.save(3)
    later.writer.join()
    assert not list(tmp_path.glob(".*"))


def test_a_step_of_this_branch_is_written_once(tmp_path: Path) -> None:
    run = Training(tmp_path)
    run.save(1, lineage=Lineage())
    run.save(1, lineage=Lineage())
    run.writer.join()
    assert names(tmp_path) == ["step-000001"]


def test_without_host_memory_training_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (free_host_memory() or 0) > 2**20
    monkeypatch.setattr(checkpoint_writer, "free_host_memory", lambda: 1000)
    run = Training(tmp_path)
    run.steps(0, 2)
    run.save(2)
    assert not run.writer.busy and names(tmp_path) == ["step-000002"]
    expected = run.numbers()
    run.steps(2, 3)
    run.save(3)
    said = capsys.readouterr().out
    assert said.count("which is not free; training waits") == 1
    run.load(2)
    assert all(np.array_equal(a, b) for a, b in zip(expected, run.numbers(), strict=True))


def _ranks(env: dict[str, str], folder: Path, victim: int) -> tuple[list[float], list[float], str]:
    patch = pytest.MonkeyPatch()
    gate = Gate(patch)
    run = Training(folder, env)
    run.steps(0, 3)
    run.save(3)
    assert gate.started.wait(60)
    whole = run.steps(3, 8)  # the collectives of the steps and those of the writer are under way together
    assert not list(folder.glob("step-*"))
    dist.barrier()
    gate.opened.set()
    run.writer.join()
    if run.world.rank == victim:
        gate.error = OSError(28, "No space left on device")
    run.save(8)
    error = "written"
    try:
        run.writer.join()
    except CheckpointError as caught:
        error = str(caught)
    run.load(3)
    again = run.steps(3, 8)
    patch.undo()
    return whole, again, error


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_together_and_agree_about_a_failure(tmp_path: Path, size: int) -> None:
    for whole, again, error in run_ranks(_ranks, size, tmp_path, size - 1):
        assert whole == again
        assert "step-000008" in error and "untouched: step-000003" in error
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    alone = Training(tmp_path)
    alone.load(3)
    assert len(alone.steps(3, 5)) == 2
