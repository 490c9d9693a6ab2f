"""AdamW with bfloat16 and 8-bit states: the published formula and codes, rounding without bias, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastvst.train import checkpoint, distributed, low_memory
from fastvst.train.checkpoint import CheckpointError
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.optimizer import OptimizerConfig, bytes_per_parameter, init_state, make_optimizer
from ranks import run_ranks

STATES = ("bf16", "8bit")
BF16 = torch.bfloat16


class Odd(nn.Module):
    """Parameters of odd shapes: rows that are no multiple of 256, fewer rows than ranks, a vector, a 5-D kernel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        shapes = {"wide": (7, 300), "short": (2, 513), "vector": (5,), "kernel": (6, 3, 2, 5, 5), "exact": (8, 512)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape).to(BF16)))


def gradient(name: str, step: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(step * 100 + len(name))
    return (torch.randn(shape, generator=generator) ** 3).to(BF16)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for name, parameter in model.named_parameters():
            grad = gradient(name, step, parameter.shape)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        optimizer.step()


def make(world: World, state: str) -> tuple[Odd, torch.optim.Optimizer]:
    model = Odd()
    if world.mesh is not None:
        torch.distributed.fsdp.fully_shard(model, mesh=world.mesh)
    return model, make_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.1, state=state))  # type: ignore[arg-type]


def start(env: dict[str, str]) -> World:
    return distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)


ALONE = start({})


# ---------------------------------------- against other people


def test_codes_and_map_are_those_of_torchao() -> None:
    peer = pytest.importorskip("torchao.optim.quant_utils")
    torch.manual_seed(0)
    for signed in (True, False):
        values = low_memory.dynamic_map(signed)
        assert torch.equal(values, torch.tensor(peer.create_dynamic_map(signed=signed)))
        x = torch.randn(9, 1024) ** 3 * 10.0 ** torch.randint(-9, 9, (9, 1))
        x = x if signed else x.abs()
        codes, scales = low_memory.quantised(x, signed=signed)
        scaled, wanted = peer.scale_tensor(x, 256)
        assert torch.equal(scales.flatten(), wanted.flatten())
        theirs = peer.quantize_8bit_with_qmap(scaled, values)
        assert torch.equal(codes, theirs if signed else torch.where(x > 0, theirs.clamp(min=1), 0))
        again = low_memory.dequantised(codes, scales, signed=signed)
        assert torch.equal(again, peer.dequant_with_qmap(codes, values, scales.flatten()))


def test_the_map_is_the_published_one() -> None:
    """arXiv 2110.02861: seven decades, 0 and 1, ascending, symmetric but for 1 where it has a sign."""
    signed = low_memory.dynamic_map(True)
    unsigned = low_memory.dynamic_map(False)
    assert len(signed) == len(unsigned) == 256 and signed[-1] == unsigned[-1] == 1
    assert (signed.diff() > 0).all() and (unsigned.diff() > 0).all() and unsigned[0] == 0
    assert torch.equal(signed[:127], -signed[128:255].flip(0)) and signed[127] == 0
    assert 1e-7 < unsigned[1] < 1e-6 and 1e-7 < signed[128] < 1e-6


@pytest.mark.parametrize("state", STATES)
def test_one_step_is_adamw_in_float64(state: str) -> None:
    """With exact moments (the first step, from zero) the new weight is torch's, up to one rounding to bfloat16."""
    model, optimizer = make(ALONE, state)
    wide = {name: nn.Parameter(p.detach().double()) for name, p in model.named_parameters()}
    decayed = [p for p in wide.values() if p.dim() >= 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [wide["vector"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2)
    steps(model, optimizer, 0, 1)
    for name, p in wide.items():
        p.grad = gradient(name, 0, p.shape).double()
    theirs.step()
    for name, parameter in model.named_parameters():
        ours = parameter.detach().double()
        want = wide[name].detach()
        assert (ours - want).abs().max() <= 2**-7 * want.abs().max(), name
        assert ((ours - want).abs() <= 2**-7 * want.abs() + 1e-9).all(), name


@pytest.mark.parametrize(("state", "limit"), [("bf16", 0.02), ("8bit", 0.04)])
def test_many_steps_end_near_fp32(state: str, limit: float) -> None:
    """Gradients with heavy tails: a second moment that is rounded to 0 would be a step of any size."""
    model, optimizer = make(ALONE, state)
    wide = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    begin = {name: p.detach().clone() for name, p in wide.items()}
    decayed = [p for p in wide.values() if p.dim() >= 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [wide["vector"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(60):
        for name, p in wide.items():
            p.grad = gradient(name, step, p.shape).float()
        theirs.step()
    steps(model, optimizer, 0, 60)
    for name, parameter in model.named_parameters():
        moved = (wide[name] - begin[name]).norm()
        assert (parameter.detach().float() - wide[name]).norm() < 0.25 * moved, name
        assert (parameter.detach().float() - wide[name]).mean().abs() < limit, name


def test_small_steps_are_not_lost_and_second_moments_decay() -> None:
    """A step of 1/2000 of the weight, and a decay of 1/1000: round-to-nearest would do neither."""
    weight = nn.Parameter(torch.full((400, 256), 0.02).to(BF16))
    begin = float(weight.detach()[0, 0])
    group = {"params": [weight], "lr": 1e-5, "weight_decay": 0.0}
    optimizer = low_memory.LowMemoryAdamW([group], betas=(0.9, 0.999), eps=1e-8, state="bf16")
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert begin - float(weight.detach().float().mean()) == pytest.approx(1e-4, rel=0.02)
    before = float(optimizer.state[weight]["exp_avg_sq"].float().mean())
    for _ in range(10):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(optimizer.state[weight]["exp_avg_sq"].float().mean()) == pytest.approx(before * 0.999**10, rel=1e-3)


# ---------------------------------------- the rounding


@settings(max_examples=60, deadline=None)
@given(st.floats(width=32), st.integers(1, 1 << 40), st.integers(0, 800), st.integers(0, 2))
def test_a_rounded_number_is_a_neighbour(value: float, step: int, number: int, which: int) -> None:
    x = torch.full((1, 64), value)
    rounded = low_memory.RandomBits(step, number, 7, x).rounded(x, which)
    assert torch.equal(rounded.to(BF16).float(), rounded) or x.isnan().all()
    low = (x.view(torch.int32) & -0x10000).view(torch.float32)  # toward zero
    high = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    if not x.isfinite().all():
        assert torch.equal(rounded, x) or (rounded.isnan().all() and x.isnan().all())
    else:
        assert ((rounded == low) | (rounded == high)).all()
        assert torch.equal(x, low) <= torch.equal(rounded, x)


def test_rounding_has_no_bias_and_independent_streams() -> None:
    torch.manual_seed(0)
    x = torch.rand(500, 500) + 1
    bits = low_memory.RandomBits(3, 1, 0, x)
    errors = [(bits.rounded(x, which) - x) / 2**-7 for which in range(3)]  # in units of the last place
    for error in errors:
        assert abs(float(error.mean())) < 5 * 0.41 / 500  # five standard errors of 250,000 draws
    other = (low_memory.RandomBits(4, 1, 0, x).rounded(x, 0) - x) / 2**-7
    another = (low_memory.RandomBits(3, 2, 0, x).rounded(x, 0) - x) / 2**-7
    shifted = (low_memory.RandomBits(3, 1, 1, x).rounded(x, 0) - x) / 2**-7
    pairs = [(errors[0], e) for e in (errors[1], errors[2], other, another, shifted)] + [(errors[1], errors[2])]
    for a, b in pairs:
        # Both errors depend on x, so the noise is compared where x is the same: the sign of the rounding.
        up_a = ((a > 0).double() - (x * 128 % 1)).flatten()
        up_b = ((b > 0).double() - (x * 128 % 1)).flatten()
        assert abs(float((up_a * up_b).mean() / (up_a.std() * up_b.std()))) < 0.01


# ---------------------------------------- ranks and resume


def _full(model: nn.Module, optimizer: Any) -> dict[str, np.ndarray]:
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{kind}": v for kind, v in optimizer.state[parameter].items() if kind != "step"}
        found[name] = parameter.detach()
    whole = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in found.items()}
    return {name: (v.float() if v.dtype == BF16 else v).numpy().copy() for name, v in whole.items()}


def _train(env: dict[str, str], state: str, folder: Path | None) -> dict[str, np.ndarray]:
    world = start(env)
    model, optimizer = make(world, state)
    steps(model, optimizer, 0, 3)
    if folder is not None:
        checkpoint.save(folder, 3, model, optimizer, world, state={}, rank_state={}, config={})
    steps(model, optimizer, 3, 6)
    return _full(model, optimizer)


def _continue(env: dict[str, str], state: str, folder: Path) -> dict[str, np.ndarray]:
    world = start(env)
    model, optimizer = make(world, state)
    checkpoint.load(folder / "step-000003", model, optimizer, world)
    steps(model, optimizer, 3, 6)
    return _full(model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_any_number_of_ranks_has_the_same_bits_also_after_a_resume(tmp_path: Path, state: str) -> None:
    want = _train({}, state, tmp_path / "one")
    for size in (2, 3):
        folder = tmp_path / str(size)
        for found in run_ranks(_train, size, state, folder):
            assert found.keys() == want.keys() and all(np.array_equal(found[n], want[n]) for n in want)
    for size, folder in ((1, "3"), (3, "2"), (2, "one")):
        found = run_ranks(_continue, size, state, tmp_path / folder)[0]
        assert all(np.array_equal(found[n], want[n]) for n in want), (size, folder)
    kinds = {name.split(".")[-1]: a.dtype for name, a in want.items() if name.startswith("wide.")}
    assert kinds["exp_avg"] == (np.uint8 if state == "8bit" else np.float32)


@pytest.mark.parametrize(("before", "after"), [("bf16", "8bit"), ("8bit", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_a_checkpoint_of_another_state_is_refused(tmp_path: Path, before: str, after: str) -> None:
    model, optimizer = make(ALONE, "bf16") if before == "fp32" else make(ALONE, before)
    if before == "fp32":
        model = model.float()
        optimizer = make_optimizer(model, OptimizerConfig())
    checkpoint.save(tmp_path, 1, model, optimizer, ALONE, state={}, rank_state={}, config={})
    other = Odd().float() if after == "fp32" else Odd()
    target = make_optimizer(other, OptimizerConfig(state=after))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="optimizer.state"):
        checkpoint.load(tmp_path / "step-000001", other, target, ALONE)


def test_float32_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="optimizer.state 8bit needs bfloat16 weights; got torch.float32"):
        make_optimizer(Odd().float(), OptimizerConfig(state="8bit"))


@pytest.mark.parametrize("state", ["fp32", *STATES])
def test_the_stated_bytes_are_those_of_the_tensors(state: str) -> None:
    model = Odd().float() if state == "fp32" else Odd()
    optimizer = make_optimizer(model, OptimizerConfig(state=state))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        init_state(optimizer, parameter)
        moments = [v.nbytes for kind, v in optimizer.state[parameter].items() if kind != "step"]
        stated = bytes_per_parameter(state, parameter.shape)
        assert [parameter.nbytes / parameter.numel(), sum(moments) / parameter.numel()] == [
            pytest.approx(stated[0]),
            pytest.approx(stated[2]),
        ], name
