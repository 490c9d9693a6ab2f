"""The window-attention kernels in Triton's interpreter against float64: edge windows, head sizes, every candidate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvst_kernels import window_attention
from fastvst_kernels.tuning.pointwise import CANDIDATES
from fastvst_kernels.window import op as window
from fastvst_kernels.window.inputs import WindowInputs
from fastvst_kernels.window.kernels import forward
from fastvst_kernels.window.op import window_op
from pointwise_oracle import angles, assert_as_good_as_plain, windows

# The interpreter has no warps and stages, so candidates differ only in the pairs of a step.
STEPS = sorted({step for kernel in ("window_forward", "window_backward") for step, _, _ in CANDIDATES[kernel]})


@pytest.fixture(autouse=True)
def table(monkeypatch, request):
    """One step for both kernels, the test's `step` or the smallest, even at shapes that no table holds."""
    step = request.getfixturevalue("step") if "step" in request.fixturenames else STEPS[0]
    monkeypatch.setattr(window, "config", lambda kernel, shape, device: (step, 4, 1))


def check(lengths: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype, *, direct: bool, seed: int = 0) -> None:
    """`direct` calls the operator itself, which takes float32 too (the public function uses packed_attention there)."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    width = 3 * heads * dim
    positions = torch.randint(0, 90, (total, 2), generator=g, dtype=torch.int32)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = [torch.randn(size, generator=g).to(dtype) for size in ((total, width), (width,))]
    grad = torch.randn(total, heads * dim, generator=g).to(dtype)

    def ours(qkv, bias):
        if not direct:
            return window_attention(
                qkv, bias, positions, offsets, num_heads=heads, max_window=max(lengths), backend="triton"
            )
        longest = max(lengths, default=1)
        return window_op(qkv, bias, positions, offsets, heads, 1e4, dim**-0.5, longest, torch.float32, True)[0]

    by = angles(positions, dim, 1e4)
    assert_as_good_as_plain(ours, lambda x, b: windows(x, b, by, lengths, heads), inputs, [grad], f"{lengths} {dim}")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128])
def test_head_dimensions_and_every_step_that_tuning_may_choose(dim: int, step: int):
    check((64, 4, 20), 2, dim, torch.float32, direct=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_public_function_in_half_precision(dtype: torch.dtype):
    check((64, 24, 64, 8), 3, 80, dtype, direct=False)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 64), min_size=1, max_size=3).filter(any))
def test_any_lengths(lengths: list[int]):
    """Empty windows, single patches, and windows shorter than their program."""
    check(tuple(lengths), 1, 16, torch.float32, direct=True)


def test_opcheck():
    qkv = torch.randn(9, 48, requires_grad=True)
    offsets = torch.tensor([0, 5, 9], dtype=torch.int32)
    positions = torch.zeros(9, 2, dtype=torch.int32)
    arguments = (qkv, torch.randn(48), positions, offsets, 1, 1e4, 0.25, 5, torch.float32, True)
    torch.library.opcheck(window_op, arguments)


def test_it_keeps_its_inputs_only():
    saved = []
    qkv = torch.randn(9, 48, dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.tensor([0, 5, 9], dtype=torch.int32)
    positions = torch.zeros(9, 2, dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        window_attention(qkv, None, positions, offsets, num_heads=1, max_window=5, backend="triton")
    assert {t.data_ptr() for t in saved} == {qkv.data_ptr(), positions.data_ptr(), offsets.data_ptr()}


def test_offsets_that_leave_the_pack_stay_inside_the_tensors():
    """Without validation wrong offsets give wrong numbers, but the kernels read and write no other memory."""
    wild = torch.tensor([-7, 4, 1 << 30], dtype=torch.int32)
    positions = torch.zeros(9, 2, dtype=torch.int32)
    inputs = WindowInputs(torch.zeros(9, 48), None, positions, wild, 1, 1e4, 1.0, 64, torch.float32)
    out = forward(inputs, (16, 4, 1))
    assert out.shape == (9, 16) and out.isfinite().all()
