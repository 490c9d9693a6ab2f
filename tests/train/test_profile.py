from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvst.train import distributed, profile
from fastvst.train.distributed import ParallelConfig
from small_run import arguments, curve, load_script, rows_of, write_data, write_model

sft = load_script()
ALONE = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
ON_GPU = dataclasses.replace(ALONE, device=torch.device("cuda", 0), rank=3)


def test_one_step_is_profiled_and_the_run_continues(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    data = write_data(tmp_path / "data")
    sft.main(arguments(tmp_path / "run", data, model, "steps=4", "log.profile=2"))
    sft.main(arguments(tmp_path / "plain", data, model, "steps=4"))
    assert curve(tmp_path / "run") == curve(tmp_path / "plain") and len(rows_of(tmp_path / "run")) == 4
    folder = tmp_path / "run" / "profile"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002.trace.json", "step-000002.txt"]
    names = {event.get("name") for event in json.loads((folder / "step-000002.trace.json").read_text())["traceEvents"]}
    assert {"aten::mm", "fastvst::linear_cross_entropy"} <= names
    lines = (folder / "step-000002.txt").read_text().splitlines()
    table = lines[3 : next(i for i, line in enumerate(lines) if i > 3 and line.startswith("---"))]
    assert len(table) == profile.ROWS and any("mm" in line.split()[0] for line in table)
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_profile_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    with profile.profiled(5, 5, tmp_path, ALONE):
        torch.ones(3).sum()
    assert "profile of step 5 could not be written" in capsys.readouterr().out


def test_another_step_and_another_rank_are_not_profiled(tmp_path: Path) -> None:
    for step, world in ((4, ALONE), (5, dataclasses.replace(ALONE, rank=1))):
        with profile.profiled(step, 5, tmp_path, world):
            pass
    assert not list(tmp_path.iterdir())


def test_out_of_memory_writes_a_snapshot_and_stays_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def dump(path: str) -> None:
        written.append(path)
        Path(path).write_bytes(b"snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    for name in ("out_of_memory-00003.pickle", "out_of_memory-00003-1.pickle"):
        with (
            pytest.raises(torch.OutOfMemoryError, match="tried"),
            profile.snapshot_when_out_of_memory(tmp_path, ON_GPU),
        ):
            raise torch.OutOfMemoryError("tried 2 GiB")
        assert written[-1] == str(tmp_path / name) and name in capsys.readouterr().out


def test_a_snapshot_that_fails_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: str) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    with pytest.raises(torch.OutOfMemoryError), profile.snapshot_when_out_of_memory(tmp_path, ON_GPU):
        raise torch.OutOfMemoryError("tried 2 GiB")
    assert "no memory snapshot: No space left" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError), profile.snapshot_when_out_of_memory(tmp_path, ALONE):
        raise torch.OutOfMemoryError("on the CPU there is no snapshot")
    assert not list(tmp_path.iterdir())


def test_allocations_are_remembered_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    with profile.allocations_remembered(ALONE):
        assert calls == []
    with profile.allocations_remembered(ON_GPU):
        assert calls == [{"max_entries": profile.HISTORY, "stacks": "python"}]
    assert calls[1:] == [{"enabled": None}]
