"""Norm, SwiGLU and rotary kernels in Triton's interpreter against float64, with every configuration of tuning."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from fastvst_kernels import add_rms_norm, mrope, rms_norm, rotary_embedding, swiglu, vision_rope
from fastvst_kernels.activation import op as activation
from fastvst_kernels.activation.op import swiglu_backward_op, swiglu_op, swiglu_reference
from fastvst_kernels.norm import op as norm
from fastvst_kernels.norm.op import rms_norm_op, rms_norm_reference
from fastvst_kernels.rope import op as rope_op
from fastvst_kernels.rotary import op as rotary_op
from fastvst_kernels.rotary.op import rotary_reference
from fastvst_kernels.shared.partial_sums import partial_sums
from fastvst_kernels.tuning.pointwise import CANDIDATES
from pointwise_oracle import angles, assert_as_good_as_plain, mrope_angles, rope


def choose(monkeypatch: pytest.MonkeyPatch, module: ModuleType, numbers: dict[str, tuple[int, ...]]) -> None:
    """The operators of a module use these configurations instead of those of the table."""
    monkeypatch.setattr(module, "config", lambda kernel, shape, device, variant="": numbers[kernel])


def pairs(family: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(forward, backward) configurations that together contain every candidate."""
    forward = CANDIDATES[f"{family}_forward"]
    backward = CANDIDATES[f"{family}_backward"]
    count = max(len(forward), len(backward))
    return [(forward[i % len(forward)], backward[i % len(backward)]) for i in range(count)]


def data(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("numbers", pairs("rms_norm"), ids=str)
def test_norm_configurations(monkeypatch, numbers):
    choose(monkeypatch, norm, {"rms_norm_forward": numbers[0], "rms_norm_backward": (*numbers[1][:2], 3)})
    for rows, width in ((7, 200), (1, 64), (0, 64)):
        inputs = data((rows, width), (rows, width), (width,))
        assert_as_good_as_plain(
            lambda x, r, w: add_rms_norm(x, r, w, 1e-6, backend="triton"),
            lambda x, r, w: (rms_norm_reference(x + r, w, 1e-6), x + r),
            inputs,
            data((rows, width), (rows, width)),
            f"{rows} x {width}",
        )


@pytest.mark.parametrize("width", [1, 37, 1280, 2048, 3584, 5003])
def test_norm_at_odd_and_true_widths(width: int):
    inputs = data((2, 3, width), (width,))
    grads = data((2, 3, width))
    ours: Callable = lambda x, w: rms_norm(x, w, 1e-5, backend="triton")  # noqa: E731
    assert_as_good_as_plain(ours, lambda x, w: rms_norm_reference(x, w, 1e-5), inputs, grads)
    bare: Callable = lambda x: rms_norm(x, None, 1e-5, backend="triton")  # noqa: E731
    assert_as_good_as_plain(bare, lambda x: rms_norm_reference(x, None, 1e-5), inputs[:1], grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_in_half_precision_and_on_strided_rows(dtype: torch.dtype):
    wide, weight, grad = data((5, 500), (250,), (5, 250), dtype=dtype)

    def ours(x, w):
        return rms_norm(x.chunk(2, 1)[1], w, 1e-6, backend="triton")  # rows 500 apart

    def formula(x, w):
        return rms_norm_reference(x.chunk(2, 1)[1], w, 1e-6)

    assert_as_good_as_plain(ours, formula, [wide, weight], [grad])


def test_a_wider_row_than_the_kernel_holds_is_refused():
    with pytest.raises(ValueError, match="rows are 9000 wide; the Triton RMSNorm takes up to 8192"):
        rms_norm(torch.zeros(1, 9000), None, 1e-6, backend="triton")


@pytest.mark.parametrize("numbers", pairs("swiglu"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu(monkeypatch, numbers, dtype):
    choose(monkeypatch, activation, {"swiglu_forward": numbers[0], "swiglu_backward": numbers[1]})
    for rows, width in ((9, 20), (2, 1100), (0, 8)):
        inputs = data((rows, width), (rows, width), dtype=dtype)
        grads = data((rows, width), dtype=dtype)
        ours: Callable = lambda g, u: swiglu(g, u, backend="triton")  # noqa: E731
        assert_as_good_as_plain(ours, swiglu_reference, inputs, grads)
        fused: Callable = lambda x: swiglu(x, backend="triton")  # noqa: E731
        formula: Callable = lambda x: swiglu_reference(*x.chunk(2, -1))  # noqa: E731
        assert_as_good_as_plain(fused, formula, [torch.cat(inputs, 1)], grads)


@pytest.mark.parametrize(
    ("rows", "numbers"), [(0, pairs("swiglu")[0]), (65, pairs("swiglu")[1]), (150, pairs("swiglu")[2])], ids=str
)
def test_the_sum_of_the_gradient_is_made_in_the_same_pass(monkeypatch, numbers, rows):
    """Rows of one program, of several, and a last one that is not full; the gradient itself has the same bits."""
    choose(monkeypatch, activation, {"swiglu_forward": numbers[0], "swiglu_backward": numbers[1]})
    (x, dout) = data((rows, 40), (rows, 20), dtype=torch.float32)
    plain = swiglu_backward_op(dout, x, None, True, True)
    found = swiglu_backward_op(dout, x, None, True, True, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], plain[:3], strict=True))
    torch.testing.assert_close(found[3].double(), plain[0].double().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[3], swiglu_backward_op(dout, x, None, True, True, torch.float32)[3])
    assert len(plain[3]) == 0


@pytest.mark.parametrize("numbers", pairs("rms_norm")[1:3], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 1280), (9, 112)])
def test_the_norm_sums_both_gradients_of_the_residual(monkeypatch, numbers, rows, width):
    choose(monkeypatch, norm, {"rms_norm_forward": numbers[0], "rms_norm_backward": (*numbers[1][:2], 3)})
    x, dy, dtotal, weight = data((rows, width), (rows, width), (rows, width), (width,), dtype=torch.float32)
    inverse = torch.rsqrt(x.pow(2).mean(1) + 1e-6)
    dx, own = norm.rms_norm_backward_op(dy, dtotal, x, weight, inverse, True, True, True)
    found, sums = norm.rms_norm_backward_op(dy, dtotal, x, weight, inverse, True, True, True, True)
    assert torch.equal(found, dx) and torch.equal(sums[:1], own) and sums.shape == (3, width)
    for total, gradient in zip(sums[1:], (dx, dtotal), strict=True):
        torch.testing.assert_close(total.double(), gradient.double().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (63, 33), (64, 32), (200, 3, 50)], ids=str)
def test_partial_sums(shape):
    partial = torch.randn(shape)
    found = partial_sums(partial, torch.bfloat16)
    assert found.shape == shape[1:] and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), partial.double().sum(0), rtol=2**-8, atol=1e-6)


def test_swiglu_of_rows_with_gaps():
    """Rows that lie apart; the gradient has another layout than gate and up."""
    gate, up = (torch.randn(9, 32)[:, :20] for _ in range(2))
    dout = torch.randn(9, 24)[:, :20]
    dense = [x.contiguous() for x in (gate, up, dout)]
    assert torch.equal(swiglu(gate, up, backend="triton"), swiglu(*dense[:2], backend="triton"))
    found = swiglu_backward_op(dout, gate, up, True)
    expected = swiglu_backward_op(dense[2], *dense[:2], True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_mrope(sizes: tuple[int, int, int], dim: int, sections: tuple[int, ...], dtype: torch.dtype) -> None:
    """sizes: tokens, heads, KV heads."""
    (tokens, heads, kv_heads) = sizes
    width = (sizes[1] + 2 * sizes[2]) * dim
    positions = torch.randint(0, 131_072, (3, tokens), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    by = mrope_angles(positions, dim, sections, 1e6)
    options = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "sections": sections, "theta": 1e6}
    shapes = [(tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim)]
    assert_as_good_as_plain(
        lambda x, b: mrope(x, b, positions, backend="triton", **options),
        lambda x, b: rope(x, b, by, heads, kv_heads),
        data((tokens, width), (width,), dtype=dtype),
        data(*shapes, dtype=dtype),
        f"{tokens} tokens",
    )


@pytest.mark.parametrize("numbers", pairs("rope"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope(monkeypatch, numbers, dtype):
    choose(monkeypatch, rope_op, {"rope_forward": numbers[0], "rope_backward": numbers[1]})
    check_mrope((11, 3, 1), 16, (2, 3, 3), dtype)
    check_mrope((5, 2, 2), 48, (8, 8, 8), dtype)
    check_mrope((0, 1, 1), 16, (2, 3, 3), dtype)
    positions = torch.randint(0, 90, (9, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    assert_as_good_as_plain(
        lambda x, b: vision_rope(x, b, positions, num_heads=2, backend="triton"),
        lambda x, b: rope(x, b, angles(positions, 80, 1e4), 2, 2),
        data((9, 480), (480,), dtype=dtype),
        data(*[(9, 2, 80)] * 3, dtype=dtype),
        "vision",
    )


def test_opcheck():
    x = torch.randn(3, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    torch.library.opcheck(rms_norm_op, (x, x.detach(), weight, 1e-6, True))
    torch.library.opcheck(swiglu_op, (x, None, True))
    positions = torch.zeros(3, 3, dtype=torch.int32)
    options = ([2, 3, 3], 1e4, torch.float32, None, True)
    qkv = torch.randn(3, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.fastvst.rope.default, (qkv, torch.randn(48), positions, 1, 1, *options))


def test_runs_are_bitwise_equal_and_every_value_is_written():
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        runs = []
        for _ in range(2):
            x, weight = (t.requires_grad_() for t in data((9, 96), (96,)))
            y = rms_norm(x, weight, 1e-6, backend="triton")
            z = swiglu(y, backend="triton")
            q, k, v = mrope(
                z,
                None,
                torch.arange(9).expand(3, 9),
                num_heads=1,
                num_kv_heads=1,
                head_dim=16,
                sections=(2, 3, 3),
                theta=1e4,
                backend="triton",
            )
            runs.append((q, k, v, *torch.autograd.grad((q + k * v).square().sum(), (x, weight))))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*runs, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


@pytest.mark.parametrize("numbers", CANDIDATES["rotary_embedding"], ids=str)
@pytest.mark.parametrize("by_pair", [False, True], ids=["by channel", "by pair"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary_embedding(monkeypatch, numbers, by_pair, interleaved):
    choose(monkeypatch, rotary_op, {"rotary_embedding": numbers})
    for tokens, heads, kv_heads, width, dim, rows in (
        (37, 3, 1, 40, 24, 37),
        (6, 2, 2, 16, 16, 3),
        (0, 1, 1, 16, 8, 0),
    ):
        cos, sin = data((rows, dim // 2 if by_pair else dim), (rows, dim // 2 if by_pair else dim))
        wide = [x.repeat_interleave(2, -1) if interleaved else torch.cat([x, x], -1) for x in (cos, sin)]
        wide = [x.repeat(max(1, tokens // max(1, rows)), 1) for x in (wide if by_pair else (cos, sin))]
        options = {"rotary_dim": dim, "interleaved": interleaved}

        def ours(q, k, cos=cos, sin=sin, options=options, rows=rows):
            q, k = (x.unflatten(0, (-1, rows)) if rows else x for x in (q, k))
            return tuple(x.flatten(0, -3) for x in rotary_embedding(q, k, cos, sin, backend="triton", **options))

        def formula(q, k, wide=wide, dim=dim):
            return tuple(rotary_reference(x, *(t.to(x) for t in wide), dim, interleaved) for x in (q, k))

        inputs = data((tokens, heads, width), (tokens, kv_heads, width))
        assert_as_good_as_plain(ours, formula, inputs, data((tokens, heads, width), (tokens, kv_heads, width)))


def test_rotary_embedding_in_half_precision_and_of_views():
    q, k = (x.transpose(0, 1) for x in data((3, 9, 32), (2, 9, 32), dtype=torch.float16))
    cos, sin = data((9, 32), (9, 32))
    ours = rotary_embedding(q, k, cos, sin, backend="triton")
    plain = rotary_embedding(q, k, cos, sin, backend="torch")
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
