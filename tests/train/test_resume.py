"""Damaged checkpoints are named and passed over; going back to an older one starts a branch that loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastvst import checksum
from fastvst.train import checkpoint, distributed, lock, resume, run
from fastvst.train.checkpoint import CheckpointError
from fastvst.train.distributed import ParallelConfig
from fastvst.train.optimizer import OptimizerConfig, make_optimizer
from fastvst.train.resume import Lineage
from fastvst.train.snapshot import HFDirectory
from ranks import run_ranks
from toy import ToyModel

ALONE = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


class Run:
    """A model whose weights are one number, saved in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = ToyModel()
        self.optimizer = make_optimizer(self.model, OptimizerConfig(lr=1e-2))

    def save(self, step: int, value: float, keep: int = 9, lineage: Lineage | None = None) -> Path:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

        return checkpoint.save(
            self.folder,
            step,
            self.model,
            self.optimizer,
            ALONE,
            state={},
            rank_state={},
            config={},
            hf=HFDirectory(torch.float32, lambda path: path),
            keep=keep,
            lineage=lineage,
        )

    def value(self, path: Path | None) -> float:
        assert path is not None
        checkpoint.load(path, self.model, self.optimizer, ALONE)
        return next(self.model.parameters()).flatten()[0].item()


def flip(path: Path, bit: int = 77) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "remove"])
def test_damage_of_any_file_is_named_and_auto_takes_the_one_before(tmp_path: Path, kind: str, capsys) -> None:
    made = Run(tmp_path / "run")
    made.save(5, 5)
    whole = made.save(10, 10)
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    assert len(names) == 6 and "hf/model.safetensors" in names
    shutil.copytree(whole, tmp_path / "copy")
    for name in names:
        file = whole / name
        if kind == "flip":
            flip(file)
        elif kind == "remove":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1] if kind == "cut" else b"")
        with pytest.raises(CheckpointError, match=Path(name).name):
            checkpoint.resolve(str(whole), made.folder)
        with pytest.raises(CheckpointError, match=Path(name).name):
            made.value(whole)
        capsys.readouterr()
        assert checkpoint.resolve("auto", made.folder) == made.folder / "step-000005"
        said = capsys.readouterr().out
        assert said.startswith("passed over: ") and Path(name).name in said and len(said.splitlines()) == 1
        shutil.rmtree(whole)
        shutil.copytree(tmp_path / "copy", whole)
    assert checkpoint.resolve("auto", made.folder) == whole


def test_a_swapped_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    made = Run(tmp_path / "run")
    path = made.save(10, 10)
    other = Run(tmp_path / "other").save(10, 11)
    shard = next((path / "state").iterdir())
    for name in ("a.safetensors", "deep/b.safetensors", shard.name + ".tmp"):
        target = path / "state" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(shard, target)
        with pytest.raises(CheckpointError, match="does not belong to this checkpoint"):
            made.value(path)
        target.unlink()
    assert made.value(path) == 10
    shutil.copy(path / "rank-00000.json", path / "rank-00001.json")
    with pytest.raises(CheckpointError, match=r"rank-00001.json does not belong"):
        made.value(path)
    (path / "rank-00001.json").unlink()
    (path / "hf" / "README.md").write_text("a note of the user")
    assert made.value(path) == 10
    shutil.copy(other / "state" / shard.name, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} was changed"):
        made.value(path)


def test_no_whole_checkpoint_raises_instead_of_starting_anew(tmp_path: Path) -> None:
    made = Run(tmp_path)
    for step in (1, 2):
        flip(next((made.save(step, step) / "state").iterdir()))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*step-000002.*; .*step-000001"):
        checkpoint.resolve("auto", tmp_path)


def test_a_damaged_checkpoint_is_renamed_and_written_again(tmp_path: Path, capsys) -> None:
    made = Run(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        made.save(step, step)
    flip(next((made.folder / "step-000003" / "state").iterdir()))
    found = run.open_run_folder(tmp_path, "auto", ALONE)
    lock.release()
    assert found is not None and found.name == "step-000002"
    assert "was renamed to step-000003.damaged" in capsys.readouterr().out
    assert resume.start_branch(made.folder, found) == []  # it is the newest one now
    made.save(3, 30, keep=2)
    names = sorted(p.name for p in made.folder.iterdir())
    assert names == ["step-000002", "step-000003", "step-000003.damaged"]
    assert made.value(checkpoint.resolve("auto", made.folder)) == 30


def test_a_branch_loses_nothing_and_takes_nothing_old_for_new(tmp_path: Path) -> None:
    made = Run(tmp_path / "checkpoints")
    (tmp_path / "metrics.jsonl").write_text('{"step": 39}\n')
    for step in (20, 30, 40):
        made.save(step, step, lineage=Lineage())
    back = made.folder / "step-000020"
    said = resume.start_branch(made.folder, back)
    assert said[0].endswith("branch 2 of this run starts from step-000020; of other branches: step-000030, step-000040")
    assert (tmp_path / "metrics-branch-1.jsonl").read_text() == '{"step": 39}\n'
    assert checkpoint.resolve("auto", made.folder) == back  # killed before the branch has saved anything
    assert resume.start_branch(made.folder, back) == []  # the same branch, started again
    lineage = resume.current_branch(made.folder)
    assert lineage == Lineage(2, "step-000020")
    new = made.save(30, 130, lineage=lineage)
    assert made.value(new) == 130 and made.value(made.folder / "step-000030-1") == 30
    assert checkpoint.resolve("auto", made.folder) == new
    assert resume.lineage_of(new, made.folder) == lineage
    marker = checksum.read_marker(new)
    assert (marker["branch"], marker["parent"]) == (2, "step-000020")
    before = new.stat().st_ino
    assert made.save(30, 131, lineage=lineage) == new and new.stat().st_ino == before  # written once
    assert resume.start_branch(made.folder, made.folder / "step-000040")[0].startswith("branch 3 ")
    made.save(41, 41, lineage=resume.current_branch(made.folder), keep=2)
    left = sorted(p.name for p in made.folder.glob("step-*"))
    assert left == ["step-000030", "step-000041"]  # the two that were written last


def test_a_run_from_a_checkpoint_of_another_folder(tmp_path: Path) -> None:
    path = Run(tmp_path / "a").save(20, 20)
    assert resume.lineage_of(path, tmp_path / "b") == Lineage(1, str(path))
    made = Run(tmp_path / "b")
    made.save(40, 40, lineage=Lineage())
    assert resume.lineage_of(path, made.folder) == Lineage(2, str(path))
    resume.start_branch(made.folder, path)
    made.save(30, 30, lineage=resume.current_branch(made.folder), keep=1)
    assert checkpoint.resolve("auto", made.folder) == made.folder / "step-000030"


def test_a_checkpoint_without_checksums_is_read_and_said(tmp_path: Path, capsys) -> None:
    made = Run(tmp_path)
    path = made.save(3, 3)
    marker = checksum.read_marker(path)
    sizes = {name: entry["size"] for name, entry in marker["files"].items()}
    (path / checksum.MARKER).write_text(json.dumps({"files": sizes}))
    assert made.value(checkpoint.resolve("auto", tmp_path)) == 3
    assert "has no checksums; only the sizes" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "{}", "1", '{"rng": 1}', "[" * 50_000])
@pytest.mark.parametrize("name", ["train.json", "rank-00000.json"])
def test_hostile_state_is_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    made = Run(tmp_path)
    path = made.save(3, 3)
    (path / name).write_text(content)
    files = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != checksum.MARKER]
    checksum.write_marker(path, checksum.measure(path, files))
    with pytest.raises(CheckpointError, match=name):
        made.value(path)


def _on_two_ranks(env: dict[str, str], folder: Path) -> str:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    try:
        found = checkpoint.resolve("auto", folder, world)
        return found.name if found is not None else "none"
    except CheckpointError as error:
        return str(error)


def test_all_ranks_agree_about_damage(tmp_path: Path) -> None:
    made = Run(tmp_path)
    for step in (1, 2, 3):
        made.save(step, step)
    flip(tmp_path / "step-000003" / "rank-00000.json")
    (tmp_path / "step-000002" / checksum.MARKER).write_text("")
    assert run_ranks(_on_two_ranks, 2, tmp_path) == ["step-000001"] * 2
    flip(next((tmp_path / "step-000001" / "state").iterdir()), 9999)
    first, second = run_ranks(_on_two_ranks, 2, tmp_path)
    assert first == second and "rank-00000.json was changed" in first and "state/shard-00001" in first
