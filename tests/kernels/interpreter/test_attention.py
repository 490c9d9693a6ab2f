"""The attention kernels in Triton's interpreter against float64: shapes, tiles, groups, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_kernels import attention_with
from attention_oracle import GROUP_SHAPES, Pack, Results, assert_as_good_as_plain, formula, group, join
from fastvst_kernels import prepare
from fastvst_kernels.attention.forward import forward
from fastvst_kernels.attention.plan import KernelTiles
from fastvst_kernels.shared.tile_tables import DESCRIPTORS, PERSISTENT, POINTERS, SLICES, Tile
from fastvst_kernels.tuning.attention import CANDIDATES, DESCRIPTOR_CANDIDATES, FLOAT32_CANDIDATES

MIXED = join(group(37, 5, 0, 30), Pack((1, 0, 65)), group(0, 9, 3))
ALL = (*CANDIDATES.values(), DESCRIPTOR_CANDIDATES, FLOAT32_CANDIDATES)
TILES = sorted({(m, n, path[0] if path else POINTERS) for many in ALL for m, n, _, _, *path in many}, reverse=True)


def kernels(pack: Pack, *, causal: bool, tile: tuple[int, int, int] = (64, 64, POINTERS), padded: bool = False):
    """compute(q, k, v) -> (out, lse) of the Triton kernels, all three with one tile shape."""
    block_m, block_n, path = tile
    plan = prepare(pack.offsets(), pack.groups(), causal=causal, padded=padded)
    return attention_with(plan, KernelTiles(*[Tile(block_m, block_n, 4, 1, path)] * 3))


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]} path {t[2]}")
def test_every_tile_shape_that_tuning_may_choose(tile: tuple[int, int, int]):
    small = min(tile) < 32  # the interpreter's time grows with the number of steps
    pack = join(group(17, 5, 0, 9), Pack((1, 20))) if small else join(group(70, 5, 0, 66), Pack((1, 195)))
    assert_as_good_as_plain(kernels(pack, causal=True, tile=tile), pack, (1, 1), 32, torch.float32, causal=True)
    pack = Pack((17, 0, 3)) if small else Pack((65, 0, 1, 128))
    assert_as_good_as_plain(kernels(pack, causal=False, tile=tile), pack, (1, 1), 32, torch.float32, causal=False)


@pytest.mark.parametrize("width", [16, 48, 64, 80, 96, 112, 128, 208, 256])
def test_head_dimensions(width: int):
    pack = join(group(30, 7, 40), Pack((9,)))
    assert_as_good_as_plain(kernels(pack, causal=True), pack, (2, 1), width, torch.float32, causal=True)
    pack = Pack((65,))
    assert_as_good_as_plain(kernels(pack, causal=False), pack, (1, 1), width, torch.float32, causal=False)


@pytest.mark.parametrize("path", [SLICES, DESCRIPTORS, PERSISTENT])
@pytest.mark.parametrize("width", [48, 80, 112])
def test_head_dimensions_of_the_other_ways_to_load(width: int, path: int):
    """One piece and two, with and without columns to mask; more tiles than the persistent grid has programs."""
    pack = join(group(40, 7, 20), Pack((0, 9)))
    compute = kernels(pack, causal=True, tile=(32, 32, path), padded=True)
    assert_as_good_as_plain(compute, pack, (1, 1), width, torch.float32, causal=True)


def test_what_no_descriptor_can_point_at_is_read_by_pointers():
    """Rows that begin at odd multiples of 4 bytes."""
    torch.manual_seed(0)
    wide = torch.randn(70, 3, 17)
    q, k, v = wide[:, :, 1:].split(1, 1)
    plan = prepare(torch.tensor([0, 70], dtype=torch.int32), causal=True)
    out, _ = forward(q, k, v, plan, scale=0.25, tile=Tile(32, 32, 4, 1, DESCRIPTORS))
    expected, _ = formula(q.double(), k.double(), v.double(), Pack((70,)), causal=True, scale=0.25)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "width", "causal"), [((7, 1), 128, True), ((8, 1), 128, True), ((3, 3), 80, False)])
def test_half_precision_at_the_real_heads(heads: tuple[int, int], width: int, causal: bool, dtype: torch.dtype):
    pack = group(40, 30, 11) if causal else Pack((63, 20))
    assert_as_good_as_plain(kernels(pack, causal=causal), pack, heads, width, dtype, causal=causal)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 130])
def test_lengths(length: int):
    for causal in (True, False):
        pack = Pack((length,))
        assert_as_good_as_plain(kernels(pack, causal=causal), pack, (2, 2), 16, torch.float32, causal=causal)


@pytest.mark.parametrize(
    "pack",
    [*GROUP_SHAPES, Pack((0, 0))],
    ids=lambda p: "-".join(map(str, p.lengths))[:40],
)
def test_group_shapes(pack: Pack):
    heads = (1, 1) if len(pack.lengths) > 10 else (2, 1)  # the interpreter's time grows with the number of programs
    assert_as_good_as_plain(kernels(pack, causal=True), pack, heads, 16, torch.float32, causal=True)


LENGTH = st.integers(0, 70)
GROUP = st.builds(
    lambda prompt, completions: group(prompt, *completions), LENGTH, st.lists(LENGTH, min_size=1, max_size=4)
)
PLAIN = st.builds(lambda length: Pack((length,)), LENGTH)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(GROUP, PLAIN), min_size=1, max_size=3), st.booleans())
def test_any_pack(parts: list[Pack], padded: bool):
    pack = join(*parts)
    compute = kernels(pack, causal=True, padded=padded)
    assert_as_good_as_plain(compute, pack, (2, 1), 16, torch.float32, causal=True, with_dlse=True)


def test_the_gradient_of_the_logsumexp():
    assert_as_good_as_plain(kernels(MIXED, causal=True), MIXED, (2, 1), 16, torch.float32, causal=True, with_dlse=True)


def test_runs_are_bitwise_equal_and_every_value_is_written():
    torch.manual_seed(0)
    qkv = torch.randn(MIXED.tokens, 3, 80)
    dout = torch.randn(MIXED.tokens, 1, 80)
    results = []
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        for padded in (False, True, False):
            compute = kernels(MIXED, causal=True, padded=padded)
            results.append(Results.of(compute, qkv, (1, 1), dout, None).values)
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results:
        for name, value in other.items():
            assert not value.isnan().any(), name
            assert torch.equal(value, results[0][name]), name


def test_large_scores_do_not_overflow():
    pack = Pack((65,))
    q = torch.randn(65, 1, 16, dtype=torch.float64)
    qkv = torch.cat([q * 60, q * 60, torch.randn(65, 1, 16)], 1).float()
    ours = Results.of(kernels(pack, causal=True), qkv, (1, 1), torch.ones(65, 1, 16), None)
    assert all(value.isfinite().all() for value in ours.values.values())
    q, k, v = qkv.double().split(1, 1)
    expected, _ = formula(q, k, v, pack, causal=True, scale=0.25)
    torch.testing.assert_close(ours.values["out"].double(), expected, rtol=0, atol=5e-3)  # exponents of 1e4 at eps 1e-7
