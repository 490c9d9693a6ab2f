"""The norm, activation, rotary and window kernels on a GPU: against float64, repeatable, all values written."""

from __future__ import annotations

import pytest
import torch

from fastvst_kernels import add_rms_norm, mrope, rms_norm, rotary_embedding, swiglu, vision_rope, window_attention
from fastvst_kernels.activation.op import swiglu_backward_op, swiglu_reference
from fastvst_kernels.norm.op import rms_norm_reference
from fastvst_kernels.rotary.op import rotary_reference
from fastvst_kernels.tuning.pointwise import CANDIDATES
from fastvst_kernels.window import op as window
from pointwise_oracle import angles, assert_as_good_as_plain, mrope_angles, rope, windows, with_gradients

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def data(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=g, device="cuda").to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [37, 1280, 2048, 3584, 8192])
def test_norms(width: int, dtype: torch.dtype):
    x, r, w, g, h = data((1000, width), (1000, width), (width,), (1000, width), (1000, width), dtype=dtype)
    assert_as_good_as_plain(
        lambda x, w: rms_norm(x, w, 1e-6, backend="triton"), lambda x, w: rms_norm_reference(x, w, 1e-6), [x, w], [g]
    )
    assert_as_good_as_plain(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6, backend="triton"),
        lambda x, r, w: (rms_norm_reference(x + r, w, 1e-6), x + r),
        [x, r, w],
        [g, h],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [100, 3420, 18944])
def test_swiglu(width: int, dtype: torch.dtype):
    (x, g) = data((300, 2 * width), (300, width), dtype=dtype)
    assert_as_good_as_plain(
        lambda x: swiglu(x, backend="triton"), lambda x: swiglu_reference(*x.chunk(2, -1)), [x], [g]
    )
    # As the model calls it: two tensors, and a gradient whose rows may have gaps.
    gaps = torch.empty(300, width + 28, device=x.device, dtype=dtype)[:, :width].copy_(g)
    gate, up = (torch.empty_like(gaps).copy_(half) for half in x.chunk(2, -1))
    for found, expected in zip(
        swiglu_backward_op(gaps, gate, up, True), swiglu_backward_op(g, x, None, True)[0].chunk(2, -1), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_embeddings_of_both_towers(dtype: torch.dtype):
    positions = torch.randint(0, 131_072, (3, 1001), device="cuda", dtype=torch.int32)
    by = mrope_angles(positions, 128, (16, 24, 24), 1e6).cuda()
    options = {"num_heads": 28, "num_kv_heads": 4, "head_dim": 128, "sections": (16, 24, 24), "theta": 1e6}
    shapes = [(1001, 28, 128), (1001, 4, 128), (1001, 4, 128)]
    assert_as_good_as_plain(
        lambda x, b: mrope(x, b, positions, backend="triton", **options),
        lambda x, b: rope(x, b, by, 28, 4),
        data((1001, 36 * 128), (36 * 128,), dtype=dtype),
        data(*shapes, dtype=dtype),
    )
    patches = torch.randint(0, 200, (1001, 2), device="cuda", dtype=torch.int32)
    by = angles(patches, 80, 1e4).cuda()
    assert_as_good_as_plain(
        lambda x, b: vision_rope(x, b, patches, num_heads=16, backend="triton"),
        lambda x, b: rope(x, b, by, 16, 16),
        data((1001, 3840), (3840,), dtype=dtype),
        data(*[(1001, 16, 80)] * 3, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(64,) * 9 + (48, 24, 4), (1, 0, 63, 64)])
def test_windows(lengths: tuple[int, ...], dtype: torch.dtype):
    """In float32 these are the rotary kernel and packed attention."""
    total = sum(lengths)
    positions = torch.randint(0, 90, (total, 2), device="cuda", dtype=torch.int32)
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    by = angles(positions, 80, 1e4).cuda()
    assert_as_good_as_plain(
        lambda x, b: window_attention(x, b, positions, offsets, num_heads=16, max_window=64, backend="triton"),
        lambda x, b: windows(x, b, by, lengths, 16),
        data((total, 3840), (3840,), dtype=dtype),
        data((total, 1280), dtype=dtype),
    )


@pytest.mark.parametrize("numbers", sorted({*CANDIDATES["window_forward"], *CANDIDATES["window_backward"]}), ids=str)
def test_every_configuration_of_the_windows_that_tuning_may_choose(monkeypatch, numbers: tuple[int, ...]):
    monkeypatch.setattr(window, "config", lambda kernel, shape, device: numbers)
    test_windows((64,) * 9 + (48, 24, 4), torch.bfloat16)


def test_repeated_runs_are_bitwise_equal_and_write_every_value():
    """Twenty runs at real sizes: a race would show as a difference. Fresh memory is filled with NaN."""
    x, w, qkv, bias = data((4096, 3584), (3584,), (4096, 3840), (3840,), dtype=torch.bfloat16)
    positions = torch.randint(0, 90, (4096, 2), device="cuda", dtype=torch.int32)
    offsets = torch.arange(0, 4097, 64, device="cuda", dtype=torch.int32)

    def run(x, w, qkv, bias):
        out = window_attention(qkv, bias, positions, offsets, num_heads=16, max_window=64)
        return rms_norm(swiglu(add_rms_norm(x, x, w, 1e-6)[0]), None, 1e-6), out

    grads = data((4096, 1792), (4096, 1280), dtype=torch.bfloat16)
    first = None
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(20):
            values = with_gradients(run, [x, w, qkv, bias], grads)
            first = first or values
            for index, (a, b) in enumerate(zip(values, first, strict=True)):
                assert not a.isnan().any() and torch.equal(a, b), index
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_by_tables(interleaved: bool, dtype: torch.dtype):
    q, k, dq, dk = data(*[(2, 501, heads, 128) for heads in (28, 4)] * 2, dtype=dtype)
    cos, sin = data((501, 96), (501, 96), dtype=torch.float32)
    assert_as_good_as_plain(
        lambda q, k: rotary_embedding(q, k, cos, sin, rotary_dim=96, interleaved=interleaved, backend="triton"),
        lambda q, k: tuple(rotary_reference(x, cos.to(x), sin.to(x), 96, interleaved) for x in (q, k)),
        [q, k],
        [dq, dk],
    )
