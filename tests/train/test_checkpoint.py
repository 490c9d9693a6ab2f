from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from fastvst.train import checkpoint, distributed
from fastvst.train.checkpoint import CheckpointConfig, CheckpointError
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, freeze, make_optimizer
from fastvst.train.snapshot import HFDirectory, hf_part
from ranks import run_ranks
from toy import ToyModel, toy_batch

ALONE = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


def _hf(dtype: torch.dtype = torch.float32) -> HFDirectory:
    return HFDirectory(dtype, lambda folder: (folder / "config.json").write_text("{}"))


def _whole(model: nn.Module) -> dict[str, Any]:
    state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    return {name: tensor.detach().numpy().copy() for name, tensor in state.items()}


def _make(world: World, frozen: tuple[str, ...] = ()) -> tuple[ToyModel, torch.optim.AdamW]:
    model = ToyModel()
    freeze(model, frozen)
    distributed.shard(model, world)
    return model, make_optimizer(model, OptimizerConfig(lr=1e-2, vision_lr=1e-2, freeze=frozen))


def _steps(model: ToyModel, optimizer: torch.optim.AdamW, world: World, first: int, last: int) -> list[float]:
    curve = []
    for step in range(first, last):
        tokens, pixels, targets = toy_batch(step)
        loss = nn.functional.cross_entropy(model(tokens, pixels), targets) / world.size
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(world.sum(loss.detach().clone()).item())
    return curve


def _save(folder: Path, step: int, model: nn.Module, optimizer: Any, world: World, **more: Any) -> Path:
    more = {"state": {"guard": [1]}, "rank_state": {"mine": world.rank}, "config": {"a": 1}, **more}
    return checkpoint.save(folder, step, model, optimizer, world, **more)


def test_resume_is_bit_exact_in_one_process(tmp_path: Path) -> None:
    model, optimizer = _make(ALONE)
    _steps(model, optimizer, ALONE, 0, 5)
    path = _save(tmp_path, 5, model, optimizer, ALONE)
    noise = torch.rand(3)
    whole = _steps(model, optimizer, ALONE, 5, 12)

    again, fresh = _make(ALONE)
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    state, rank_state = checkpoint.load(path, again, fresh, ALONE)
    assert (state, rank_state) == ({"step": 5, "world_size": 1, "guard": [1]}, {"mine": 0})
    assert torch.equal(torch.rand(3), noise)
    assert _steps(again, fresh, ALONE, 5, 12) == whole
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], fresh.state[q]["exp_avg_sq"])


def _first_half(env: dict[str, str], folder: Path) -> tuple[list[float], dict[str, Any]]:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    model, optimizer = _make(world)
    _steps(model, optimizer, world, 0, 5)
    _save(folder, 5, model, optimizer, world, hf=_hf())
    full = _whole(model)
    return _steps(model, optimizer, world, 5, 10), full


def _second_half(env: dict[str, str], folder: Path) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    model, optimizer = _make(world)
    _, rank_state = checkpoint.load(folder / "step-000005", model, optimizer, world)
    full = _whole(model)
    return _steps(model, optimizer, world, 5, 10), full, rank_state


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3), (3, 2)])
def test_resume_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    first = run_ranks(_first_half, before, tmp_path)
    second = run_ranks(_second_half, after, tmp_path)
    for name, array in first[0][1].items():
        assert np.array_equal(second[0][1][name], array), name
    assert second[0][0] == (first[0][0] if before == after else pytest.approx(first[0][0], rel=1e-5))
    assert [r[2]["mine"] for r in second] == [rank if rank < before else 0 for rank in range(after)]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    run_ranks(_first_half, 2, tmp_path)
    path = tmp_path / "step-000005"
    files = [p for p in path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ""} and len(files) == 11
    for file in files:
        if file.suffix == ".safetensors":
            load_file(file)
        else:
            json.loads(file.read_text())


def test_the_hf_directory_holds_the_weights(tmp_path: Path) -> None:
    model, optimizer = _make(ALONE)
    path = _save(tmp_path, 1, model, optimizer, ALONE, hf=_hf(torch.bfloat16))
    for name, tensor in load_file(path / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16))
    final = checkpoint.save_hf(tmp_path / "hf", model, ALONE, _hf())
    again = checkpoint.save_hf(tmp_path / "hf", model, ALONE, _hf())
    assert final == again and load_file(final / "model.safetensors").keys() == model.state_dict().keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "step-000001"]


def test_auto_takes_the_newest_complete_one(tmp_path: Path) -> None:
    model, optimizer = _make(ALONE)
    assert checkpoint.resolve("auto", tmp_path / "nowhere") is None
    assert checkpoint.resolve("", tmp_path) is None
    paths = [_save(tmp_path, step, model, optimizer, ALONE, keep=9) for step in (1, 9, 10)]
    assert checkpoint.resolve("auto", tmp_path) == paths[2]
    (paths[2] / "COMPLETE").unlink()
    assert checkpoint.resolve("auto", tmp_path) == paths[1]
    with pytest.raises(CheckpointError, match="no COMPLETE marker.*step-000001, step-000009"):
        checkpoint.resolve(str(paths[2]), tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.resolve(str(tmp_path / "step-3"), tmp_path)


def test_a_truncated_file_is_found(tmp_path: Path) -> None:
    model, optimizer = _make(ALONE)
    path = _save(tmp_path, 1, model, optimizer, ALONE)
    file = next((path / "state").iterdir())
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=f"{file.name} has {len(data) - 10} bytes, but {len(data)} bytes"):
        checkpoint.load(path, model, optimizer, ALONE)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(path, model, optimizer, ALONE)


def test_another_choice_of_frozen_parts_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1, *_make(ALONE), ALONE)
    with pytest.raises(CheckpointError, match="unexpected: exp_avg.visual.blocks.0.bias"):
        checkpoint.load(path, *_make(ALONE, ("vision",)), ALONE)


def test_only_the_newest_are_kept_and_no_partial_folder_is_left(tmp_path: Path) -> None:
    model, optimizer = _make(ALONE)
    for step in range(1, 6):
        _save(tmp_path, step, model, optimizer, ALONE, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def _full_disk(env: dict[str, str], folder: Path, limit: int) -> str:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    model, optimizer = _make(world)
    _save(folder, 1, model, optimizer, world, hf=_hf())
    _steps(model, optimizer, world, 0, 2)
    if world.rank == world.size - 1:  # this rank cannot write files longer than `limit` bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        _save(folder, 2, model, optimizer, world, hf=_hf())
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "written"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("limit", [100, 4000])
def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path: Path, size: int, limit: int) -> None:
    messages = run_ranks(_full_disk, size, tmp_path, limit)
    for rank, message in enumerate(messages):
        assert message.startswith(f"rank {rank}: could not write {tmp_path}/step-000002"), message
        assert "untouched: step-000001" in message and "GiB are free" in message
    assert any("File too large" in message for message in messages)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    checkpoint.load(tmp_path / "step-000001", *_make(ALONE), ALONE)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    model, optimizer = _make(ALONE)
    checkpoint.save_hf(tmp_path / "hf", model, ALONE, _hf())
    with pytest.raises(CheckpointError, match="No space left on device"):
        _save(tmp_path, 3, model, optimizer, ALONE, hf=HFDirectory(torch.float32, broken))
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save_hf(tmp_path / "hf", model, ALONE, HFDirectory(torch.float32, broken))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"] and load_file(tmp_path / "hf" / "model.safetensors")


def _save_hf(env: dict[str, str], folder: Path) -> tuple[dict[str, Any], int]:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    model, optimizer = _make(world)
    _steps(model, optimizer, world, 0, 2)
    checkpoint.save_hf(folder / "hf", model, world, _hf(torch.bfloat16))
    part = hf_part(model, world, _hf(torch.bfloat16))
    return _whole(model), sum(t.numel() for t in part.tensors.values())


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_writes_a_file_of_the_hf_directory(tmp_path: Path, size: int) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_text("of an earlier run")
    (tmp_path / "hf" / "note.txt").write_text("of the user")
    results = run_ranks(_save_hf, size, tmp_path)
    files = [f"model-{i + 1:05d}-of-{size:05d}.safetensors" for i in range(size)]
    names = ["config.json", *files, "model.safetensors.index.json", "note.txt"]
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == names
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / "hf" / file).items()}
    assert found.keys() == index["weight_map"].keys() == results[0][0].keys()
    for name, array in results[0][0].items():
        assert torch.equal(found[name], torch.from_numpy(array).to(torch.bfloat16)), name
    numbers = sum(array.size for array in results[0][0].values())
    assert sum(held for _, held in results) == numbers and max(held for _, held in results) < 0.8 * numbers
    assert index["metadata"]["total_size"] == 2 * numbers
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_bad_settings() -> None:
    for wrong in ({"keep": 0}, {"every": -1}, {"every_minutes": -0.1}, {"every_minutes": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; expected at least"):
            CheckpointConfig(**wrong)
