"""The Gluon attention kernels for Hopper, backward, in the emulator against float64.

`tests/support/hopper_schedules.py` runs all shapes under 50 schedules.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from attention_oracle import Pack, Results, assert_as_good_as_plain, formula, group, join
from fastvst_kernels import prepare
from fastvst_kernels.attention import hopper_backward, hopper_backward_keys, hopper_backward_queries, hopper_tiles
from fastvst_kernels.attention.gluon_backend import BLOCK_M, BLOCK_N, GLUON_TILES, ROWS
from fastvst_kernels.attention.op import gluon_attention_backward_op, gluon_attention_op
from fastvst_kernels.attention.plan import ForwardState
from gluon_emulator import Emulator, Hazard
from hopper_schedules import CAUSAL_PACKS, KEYS, PARTS, PLAIN_PACKS, QUERIES, SMALL, TILES, Case, Emulated

MIXED = CAUSAL_PACKS[1]
FULL = Pack((1, 0, 33, 16, 7))


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    return Emulated()


@pytest.mark.parametrize(
    "case",
    [
        Case(MIXED, (2, 1), 128, True),
        Case(FULL, (2, 2), 80, False),
        Case(group(19, 5, 18), (7, 1), 64, True),
        Case(group(15, 1, 17), (4, 2), 96, True),
        Case(FULL, (1, 1), 128, False),
    ],
    ids=str,
)
def test_gradients_in_some_schedules(emulated: Emulated, case: Case):
    for seed in range(2):
        emulated.check(case, seed)


@pytest.mark.parametrize("pack", [*PLAIN_PACKS[:9], group(0, 5, 7), group(9, 0), group(33, 0, 0, 12, 0)], ids=str)
def test_sizes(emulated: Emulated, pack: Pack):
    emulated.check(Case(pack, (2, 1), 80, True), 1)


def test_the_same_bits_in_every_schedule(emulated: Emulated):
    """There are no atomics: the order of programs and of operations in flight changes nothing."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn((MIXED.tokens, 4, 64), generator=generator).bfloat16()
    dout = torch.randn((MIXED.tokens, 2, 64), generator=generator)
    found = []
    for seed in (0, 1):
        emulated.emulator.seed = seed
        compute = emulated.attention(MIXED, 64, causal=True)
        found.append(Results.of(compute, qkv, (2, 1), dout, None).values)
    for name, first in found[0].items():
        assert all(torch.equal(first, other[name]) for other in found[1:]), name


def test_rows_of_others_do_not_leak(emulated: Emulated):
    """Every block holds rows of other sequences; large values there change nothing."""
    emulated.emulator.seed = 0
    pack = Pack((21, 11, 17))
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn((pack.tokens, 1, 64), generator=generator).bfloat16() for _ in range(4))

    def gradients(factor: float):
        rows = torch.ones(pack.tokens, 1, 1).bfloat16()
        rows[:21] = factor
        rows[32:] = factor
        given = torch.cat([x * rows for x in (q, k, v)], 1)
        compute = emulated.attention(pack, 64, causal=True)
        values = Results.of(compute, given, (1, 1), dout * rows, None).values
        return {name: x[21:32] for name, x in values.items() if name != "lse"}

    quiet = gradients(1.0)
    loud = gradients(256.0)
    assert all(torch.equal(x, loud[name]) for name, x in quiet.items())


@pytest.mark.slow
@pytest.mark.parametrize(("width", "causal"), [(128, True), (80, False)])
def test_the_tiles_of_the_hardware(width: int, causal: bool):
    """With the shipped sizes the tensor cores' rules hold and shared memory suffices."""
    emulated = Emulated(strict=True)
    sizes = {"rows": ROWS, "block_n": BLOCK_N, "block_m": BLOCK_M}
    pack = join(group(150, 70, 129), Pack((257,))) if causal else Pack((300, 64))
    for seed in range(2):
        emulated.emulator.seed = seed
        compute = emulated.attention(pack, width, causal=causal, sizes=sizes)
        assert_as_good_as_plain(compute, pack, (2, 1), width, torch.bfloat16, causal=causal)
    assert 100_000 < emulated.emulator.most_shared < 232_448


def test_the_operator_trains(emulated: Emulated):
    """`backend="gluon"` end to end: operator, tables of the plan, autograd; its kernels in the emulator."""

    pack = join(group(19, 5, 18), Pack((9,)))
    offsets = pack.offsets()
    plan = prepare(offsets, pack.groups(), causal=True)  # it has the tables of the small tiles too

    def forward(q, k, v, cu, groups, forward_tiles, query_tiles, key_tiles, causal, scale):
        assert forward_tiles.shape[1] == query_tiles.shape[1] == 6 and key_tiles.shape[1] == 4
        return emulated.forward(q, k, v, plan, scale=scale, rows=8, block_n=16)

    def backward(dout, dlse, q, k, v, out, lse, cu, groups, query_tiles, key_tiles, causal, scale):
        assert query_tiles.shape[1] == 6 and key_tiles.shape[1] == 4
        state = ForwardState(q, k, v, out, lse)
        return emulated.backward(dout, dlse, state, plan, scale=scale, **SMALL)

    with torch.library._scoped_library("fastvst", "IMPL") as library:
        library.impl("packed_attention_gluon", forward, "CPU")
        library.impl("packed_attention_gluon_backward", backward, "CPU")
        tables = plan.tables(GLUON_TILES, torch.device("cpu"))

        def compute(q, k, v):
            out, lse = gluon_attention_op(q, k, v, offsets, pack.groups(), *tables, True, 64**-0.5)
            return out, lse.transpose(0, 1)

        emulated.emulator.seed = 5
        for with_dlse in (False, True):
            assert_as_good_as_plain(
                compute, pack, (4, 2), 64, torch.bfloat16, causal=True, with_dlse=with_dlse, seed=int(with_dlse)
            )


def test_the_operators_have_fake_results():
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(5, 4, 64)
        k = torch.empty(5, 2, 64)
        cu = torch.empty(2, dtype=torch.int32)
        tables = (torch.empty(1, 6, dtype=torch.int32), torch.empty(1, 4, dtype=torch.int32))
        out, lse = gluon_attention_op(q, k, k, cu, None, tables[0], *tables, True, 1.0)
        assert out.shape == q.shape and lse.shape == (4, 5)
        grads = gluon_attention_backward_op(q, None, q, k, k, out, lse, cu, None, *tables, True, 1.0)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 48)])
def test_what_the_kernels_do_not_take(emulated: Emulated, dtype: torch.dtype, width: int):
    q = torch.randn(5, 2, width).to(dtype)
    state = ForwardState(q, q, q, q, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="do not take"):
        emulated.backward(q, None, state, prepare(torch.tensor([0, 5]), causal=True), scale=1.0)


SOURCES = {
    QUERIES: inspect.getsource(hopper_backward_queries),
    KEYS: inspect.getsource(hopper_backward_keys),
    TILES: inspect.getsource(hopper_tiles),
}
# What is broken: (module, what stands there, what replaces it, the kinds of hazard that may come of it)
FAULTS = {
    "dO and Q are given back before their products have ended": (
        KEYS,
        "                dk0, dv0, p16, ds = warpgroup_mma_wait(0, deps=[dk0, dv0, p16, ds])\n"
        "            mbarrier.arrive(empty.index(slot), count=1)\n",
        "                pass\n            mbarrier.arrive(empty.index(slot), count=1)\n"
        "            dk0, dv0, p16, ds = warpgroup_mma_wait(0, deps=[dk0, dv0, p16, ds])\n",
        "overwrite",
    ),
    "dP is read while its product is in flight": (
        KEYS,
        "dp = warpgroup_mma_wait(PIECES, deps=[dp])",
        "dp = warpgroup_mma_wait(2 * PIECES, deps=[dp])",
        "accumulator in flight",
    ),
    "the rows' logsumexp is not counted": (
        KEYS,
        "mbarrier.init(ready.index(i), count=2)",
        "mbarrier.init(ready.index(i), count=1)",
        "unordered read, barrier count, uninitialised read, overwrite, deadlock",
    ),
    "one warp group's release is enough": (
        KEYS,
        "mbarrier.init(empty.index(i), count=2)",
        "mbarrier.init(empty.index(i), count=1)",
        "overwrite, deadlock, barrier count, unordered read",
    ),
    "no wait for K and V of the tile": (
        KEYS,
        "        mbarrier.wait(kv_ready.index(GROUP), 0)\n",
        "",
        "unordered read, uninitialised read",
    ),
    "K is given back while dQ is computed": (
        QUERIES,
        "                dq0, ds = warpgroup_mma_wait(0, deps=[dq0, ds])\n"
        "            mbarrier.arrive(k_empty.index(slot), count=1)\n",
        "                pass\n            mbarrier.arrive(k_empty.index(slot), count=1)\n"
        "            dq0, ds = warpgroup_mma_wait(0, deps=[dq0, ds])\n",
        "overwrite",
    ),
    "V is given back before dP": (
        QUERIES,
        "            mbarrier.wait(v_ready.index(slot), phase)\n            dp = score_product(",
        "            mbarrier.wait(v_ready.index(slot), phase)\n"
        "            mbarrier.arrive(v_empty.index(slot), count=1)\n"
        "            dp = score_product(",
        "overwrite, barrier count, deadlock, unordered read",
    ),
    "the bytes of dO are forgotten": (
        TILES,
        "mbarrier.expect(ready, 2 * N * (D0 + D1) * 2)",
        "mbarrier.expect(ready, N * (D0 + D1) * 2)",
        "expect bytes, unordered read, barrier count, deadlock",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_these_kernels_is_named(tmp_path, monkeypatch, fault: str):
    module, right, wrong, kinds = FAULTS[fault]
    assert SOURCES[module].count(right) == 1, "the kernel changed; change the fault with it"
    names = {QUERIES: "broken_queries", KEYS: "broken_keys", TILES: "broken_tiles"}
    for name, source in SOURCES.items():
        text = source.replace(right, wrong) if name == module else source
        (tmp_path / f"{names[name]}.py").write_text(text.replace(TILES, "broken_tiles"))
    source = inspect.getsource(hopper_backward)
    for name, broken in names.items():
        source = source.replace(name, broken)
    (tmp_path / "broken_backward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    emulator = Emulator(strict=False)
    backward = emulator.load("broken_backward", also=(PARTS[0], *names.values())).hopper_backward
    pack = group(19, 5, 18)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn((pack.tokens, n, 128), generator=generator).bfloat16() for n in (2, 1, 1, 2))
    out, lse = formula(q.float(), k.float(), v.float(), pack, causal=True, scale=0.1)
    state = ForwardState(q, k, v, out.bfloat16(), lse.t().contiguous())
    plan = prepare(pack.offsets(), pack.groups(), causal=True)
    found = []
    for seed in range(4):
        emulator.seed = seed
        try:
            backward(dout, None, state, plan, scale=0.1, **SMALL)
        except Hazard as hazard:
            found.append(hazard.kind)
    assert len(found) == 4, f"{fault}: found only in {len(found)} of 4 schedules"
    assert set(found) <= set(kinds.split(", ")), found
