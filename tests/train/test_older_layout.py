"""Checkpoints from before q, k and v were one parameter: resumed bit for bit, on one process and on two."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from fastvst.batch import pack
from fastvst.model import Qwen25VL
from fastvst.model.published import layout_of, publish
from fastvst.train import checkpoint, distributed
from fastvst.train.checkpoint import CheckpointError
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.optimizer import OptimizerConfig, freeze, make_optimizer
from hf_parity import make_sample, small_config
from ranks import run_ranks

ALONE = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
CONFIG = small_config(vision={"intermediate_size": 20})


def make(world: World, seed: int, frozen: tuple[str, ...] = ()):
    torch.manual_seed(seed)
    model = Qwen25VL(CONFIG)
    freeze(model, frozen)
    distributed.shard(model, world)
    return model, make_optimizer(model, OptimizerConfig(lr=1e-2, vision_lr=1e-2, freeze=frozen))


def step(model, optimizer) -> None:
    batch = pack([make_sample(CONFIG, [("text", 3), ("image", 5, 9), ("text", 6)])])
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def as_before(path: Path, model, optimizer) -> None:
    """Rewrite a checkpoint with a tensor for every published one, as it was written then."""
    layout = layout_of(model)
    old = {}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        named = {n: p if kind == "model" else optimizer.state.get(p, {}).get(kind) for n, p in model.named_parameters()}
        found = publish({n: t.detach() for n, t in named.items() if t is not None}, layout)
        old |= {f"{kind}.{n}": t.contiguous() for n, t in found.items()}
    shutil.rmtree(path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            old, storage_writer=dcp.HuggingFaceStorageWriter(str(path / "state"), save_distributed=True), no_dist=True
        )
    state = json.loads((path / "train.json").read_text())
    steps = {name.removeprefix("exp_avg."): 2 for name in old if name.startswith("exp_avg.")}
    state |= {"tensors": {n: list(t.shape) for n, t in old.items()}, "optimizer_steps": steps}
    (path / "train.json").write_text(json.dumps(state))


def values(model, optimizer) -> list[torch.Tensor]:
    found = []
    for p in model.parameters():
        kept = [p.detach(), *(optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq") if optimizer.state.get(p))]
        found += [(t.full_tensor() if isinstance(t, DTensor) else t).clone() for t in kept]
    return found


def write(folder: Path, frozen: tuple[str, ...] = ()):
    model, optimizer = make(ALONE, 1, frozen)
    step(model, optimizer)
    step(model, optimizer)
    path = checkpoint.save(folder, 2, model, optimizer, ALONE, state={"guard": []}, rank_state={}, config={})
    as_before(path, model, optimizer)
    return path, values(model, optimizer)


@pytest.mark.parametrize("frozen", [(), ("vision",)])
def test_one_process(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    path, wanted = write(tmp_path, frozen)
    model, optimizer = make(ALONE, 2, frozen)
    checkpoint.load(path, model, optimizer, ALONE, verified=True)
    found = values(model, optimizer)
    assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(int(s["step"]) == 2 for s in optimizer.state.values())


def on_rank(env: dict[str, str], path: Path, wanted: list[np.ndarray]) -> None:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    model, optimizer = make(world, 2)
    assert isinstance(next(model.parameters()), DTensor)
    checkpoint.load(path, model, optimizer, world, verified=True)
    assert all(np.array_equal(a, b) for a, b in zip(values(model, optimizer), wanted, strict=True))
    distributed.stop(world)


def test_two_processes(tmp_path: Path) -> None:
    path, wanted = write(tmp_path)
    run_ranks(on_rank, 2, path, [value.numpy() for value in wanted])


def test_an_older_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    state = json.loads((path / "train.json").read_text())
    state["tensors"]["model.model.layers.0.self_attn.k_proj.weight"] = [3, 3]
    (path / "train.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="does not fit this model and optimizer"):
        checkpoint.load(path, *make(ALONE, 2), ALONE, verified=True)
