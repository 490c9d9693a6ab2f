from __future__ import annotations

import socket

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig, ParallelError
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from ranks import run_ranks
from toy import ToyModel, toy_batch

CPU = ParallelConfig(device="cpu", threads=1)


def test_one_process_needs_no_group() -> None:
    world = distributed.start(CPU, environment={})
    assert (world.rank, world.size, world.mesh, world.store) == (0, 1, None, None) and world.is_main
    assert world.dtype == torch.float32
    model = ToyModel()
    distributed.shard(model, world)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert "1 process" in world.describe() and "float32" in world.describe()


def test_threads_are_the_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for config in (ParallelConfig(device="cpu"), CPU):
        distributed.start(config, environment={})
    assert chosen == [8, 1]


def _train(env: dict[str, str], steps: int, packs: int, config: ParallelConfig) -> list[float]:
    """`packs` batches in every step, distributed over the ranks; the loss is the mean over the global batch."""
    world = distributed.start(config, environment=env)
    model = ToyModel()
    distributed.shard(model, world)
    optimizer = make_optimizer(model, OptimizerConfig(lr=1e-2, vision_lr=1e-2))
    curve = []
    for step in range(steps):
        total = torch.zeros(())
        for pack in range(world.rank, packs, world.size):
            tokens, pixels, targets = toy_batch(step * packs + pack)
            loss = nn.functional.cross_entropy(model(tokens, pixels), targets) / packs
            loss.backward()
            total += loss.detach()
        curve.append(clip_gradients(model.parameters(), 0).item())  # Adam hides gradients of a wrong scale
        optimizer.step()
        optimizer.zero_grad()
        curve.append(world.sum(total).item())
    distributed.stop(world)
    return curve


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_and_accumulation_give_the_same_curve(size: int, replicas: int) -> None:
    config = ParallelConfig(device="cpu", threads=1, replicas=replicas)
    alone = _train({}, 10, 4, config)
    for curve in run_ranks(_train, size, 10, 4, config):
        assert curve == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[1]


def _bf16(env: dict[str, str]) -> tuple[str, str, str, float]:
    world = distributed.start(ParallelConfig(device="cpu", dtype="bfloat16", threads=1), environment=env)
    model = ToyModel()
    distributed.shard(model, world)
    tokens, pixels, targets = toy_batch(0)
    logits = model(tokens, pixels.to(torch.bfloat16))
    nn.functional.cross_entropy(logits.float(), targets).backward()
    weight = model.model.layers[0].weight
    assert weight.grad is not None
    norm = weight.grad.full_tensor().norm().item()
    distributed.stop(world)
    return str(logits.dtype), str(weight.dtype), str(weight.grad.dtype), norm


@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_keeps_float32_weights_and_gradients(size: int) -> None:
    model = ToyModel()
    tokens, pixels, targets = toy_batch(0)
    nn.functional.cross_entropy(model(tokens, pixels), targets).backward()
    grad = model.model.layers[0].weight.grad
    assert grad is not None
    for logits, weight, gradient, norm in run_ranks(_bf16, size):
        assert (logits, weight, gradient) == ("torch.bfloat16", "torch.float32", "torch.float32")
        # all ranks have the same batch, and gradients are summed over ranks, not averaged
        assert norm == pytest.approx(size * grad.norm().item(), rel=0.05)


def test_a_missing_gpu_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ParallelError, match=r"finds no GPU. Pass --parallel.device cpu"):
        distributed.start(ParallelConfig(device="cuda"), environment={})


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.pick_device("auto", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(ParallelError, match=r"3 processes.*2 GPU\(s\); pass --nproc-per-node 2"):
        distributed.pick_device("auto", 2, 3)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(ParallelError, match=rf"port {port} on 127.0.0.1 is used.*--master-port"):
            distributed.start(CPU, environment=env)


def test_a_start_without_launcher_is_explained() -> None:
    with pytest.raises(ParallelError, match="MASTER_ADDR and MASTER_PORT is not set; start the run with torchrun"):
        distributed.start(CPU, environment={"RANK": "0", "WORLD_SIZE": "2"})


def _bad_replicas(env: dict[str, str]) -> str:
    try:
        distributed.start(ParallelConfig(device="cpu", threads=1, replicas=3), environment=env)
    except ParallelError as error:
        return str(error)
    return "nothing"


def test_replicas_must_divide_the_ranks() -> None:
    assert run_ranks(_bad_replicas, 2) == ["parallel.replicas is 3, which does not divide 2 processes"] * 2


def _placed(env: dict[str, str]) -> dict[str, float]:
    world = distributed.start(CPU, environment=env)
    with torch.device("meta"):
        skeleton = ToyModel()
    skeleton.model.norm.weight.requires_grad_(False)
    model = distributed.place(ToyModel(seed=3) if world.is_main else None, skeleton, world)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {name: tensor.double().sum().item() for name, tensor in whole.items()}


@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_gets_the_values_of_rank_0(size: int) -> None:
    expected = {name: p.double().sum().item() for name, p in ToyModel(seed=3).named_parameters()}
    assert run_ranks(_placed, size) == [expected] * size
