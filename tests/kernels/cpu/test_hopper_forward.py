"""The Gluon attention kernel for Hopper in the emulator against float64: group shapes, odd sizes, heads, schedules."""

from __future__ import annotations

import inspect

import pytest
import torch

from attention_oracle import Pack, formula, group, join
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention import gluon_backend, hopper_forward, hopper_tiles
from fastvst_kernels.attention.gluon_api import refusal
from gluon_emulator import Emulator, Hazard

FORWARD = "fastvst_kernels.attention.hopper_forward"
PARTS = ("fastvst_kernels.attention.gluon_api", "fastvst_kernels.attention.hopper_tiles")
SCHEDULES = 6  # tests/support/hopper_schedules.py runs 50 of every shape, with the backward
GROUPS = join(group(19, 5, 0, 18), Pack((1, 0, 35)), group(0, 9, 3))
PLAIN = Pack((1, 0, 33, 16, 7))


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(strict=False)


@pytest.fixture(scope="module")
def kernels(emulator: Emulator):
    return emulator.load(FORWARD, also=PARTS)


def check(
    kernels, pack: Pack, heads: tuple[int, int], width: int, *, causal: bool, dtype=torch.bfloat16, **options
) -> None:
    """Output and logsumexp against float64: at most twice the plain formula's error in `dtype` plus half a unit."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn((pack.tokens, heads[0] + 2 * heads[1], width), generator=generator).to(dtype)
    q, k, v = qkv.split([heads[0], heads[1], heads[1]], dim=1)
    plan = prepare(pack.offsets(), pack.groups(), causal=causal, padded=True)
    sizes = {"rows": 8, "block_n": 16, "programs": 2} | options
    out, lse = kernels.hopper_forward(q, k, v, plan, scale=width**-0.5, **sizes)
    assert out.shape == q.shape
    assert lse.shape == (heads[0], pack.tokens)
    if not pack.tokens:
        return
    truth, true_lse = formula(q.double(), k.double(), v.double(), pack, causal=causal, scale=width**-0.5)
    plain, _ = formula(q, k, v, pack, causal=causal, scale=width**-0.5)
    allowed = 2 * (plain.double() - truth).abs().max() + torch.finfo(dtype).eps / 2 * truth.abs().max()
    assert (out.double() - truth).abs().max() <= allowed
    # The scores are float32 sums in another order.
    assert (lse.t().double() - true_lse).abs().max() <= 16 * torch.finfo(
        torch.float32
    ).eps * true_lse.abs().max().clamp(1)


@pytest.mark.parametrize(("width", "causal"), [(128, True), (80, True), (80, False), (128, False)])
def test_every_schedule_gives_attention(emulator: Emulator, kernels, width: int, causal: bool):
    for seed in range(SCHEDULES):
        emulator.seed = seed
        check(kernels, GROUPS if causal else PLAIN, (2, 1), width, causal=causal)


@pytest.mark.parametrize(
    "pack",
    [
        Pack((0,)),
        Pack((1,)),
        Pack((15,)),
        Pack((16,)),
        Pack((17,)),
        Pack((64,)),
        group(16, 16),
        group(15, 1, 17),
        group(33, 2, 2, 2, 2, 2),
        group(1, 40),
        join(group(40), group(5, 0, 0), Pack((3,))),
    ],
    ids=str,
)
def test_sizes(emulator: Emulator, kernels, pack: Pack):
    for seed in range(4):
        emulator.seed = seed
        check(kernels, pack, (1, 1), 80, causal=True)
        if pack.prompts is None:
            check(kernels, pack, (1, 1), 80, causal=False)


@pytest.mark.parametrize("width", gluon_backend.WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_head_dimensions_and_types(kernels, width: int, dtype: torch.dtype):
    check(kernels, group(19, 5, 18), (3, 1), width, causal=True, dtype=dtype)


@pytest.mark.parametrize("heads", [(7, 1), (4, 4), (8, 2)])
def test_heads_of_grouped_queries(kernels, heads: tuple[int, int]):
    check(kernels, group(10, 5, 9), heads, 64, causal=True, programs=5)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "causal"), [(128, True), (80, False)])
def test_the_tiles_of_the_hardware(width: int, causal: bool):
    """With the shipped sizes the tensor cores' rules hold and shared memory suffices."""
    emulator = Emulator()
    kernels = emulator.load(FORWARD, also=PARTS)
    pack = join(group(150, 70, 129), Pack((257,))) if causal else Pack((300, 64))
    for seed in range(3):
        emulator.seed = seed
        check(kernels, pack, (1, 1), width, causal=causal, rows=gluon_backend.ROWS, block_n=gluon_backend.BLOCK_N)
    assert 100_000 < emulator.most_shared < 232_448


def test_tensors_to_which_no_descriptor_can_point(kernels):
    """Rows that begin at odd multiples of 2 bytes, heads that are no neighbours."""
    pack = Pack((20,))
    wide = torch.randn(20, 6, 65, generator=torch.Generator().manual_seed(1)).bfloat16()
    plan = prepare(pack.offsets(), causal=True)
    for views in (wide[:, :, 1:].split(2, 1), (wide[:, ::3, :64], wide[:, 1::3, :64], wide[:, 2::3, :64])):
        q, k, v = views
        out, _ = kernels.hopper_forward(q, k, v, plan, scale=0.25, rows=8, block_n=16)
        expected, _ = formula(q.double(), k.double(), v.double(), pack, causal=True, scale=0.25)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.03)


SOURCES = {
    FORWARD: inspect.getsource(hopper_forward),
    PARTS[1]: inspect.getsource(hopper_tiles),
}
# (module, what stands there, what replaces it, the kinds of hazard that may come of it)
FAULTS = {
    "no turn is given to the other warp group": (
        FORWARD,
        "    mbarrier.arrive(turns.index(1 - GROUP), count=1)\n    if D1",
        "    if D1",
        "deadlock",
    ),
    "V is given back before its product has ended": (
        FORWARD,
        "        acc0, p = warpgroup_mma_wait(0, deps=[acc0, p])\n"
        "    mbarrier.arrive(v_empty.index(before), count=1)\n",
        "        pass\n    mbarrier.arrive(v_empty.index(before), count=1)\n"
        "    acc0, p = warpgroup_mma_wait(0, deps=[acc0, p])\n",
        "overwrite",
    ),
    "the scores are read while their product is in flight": (
        FORWARD,
        "scores = warpgroup_mma_wait(1, deps=[scores])",
        "scores = warpgroup_mma_wait(2, deps=[scores])",
        "accumulator in flight",
    ),
    "no wait for V": (
        FORWARD,
        "    mbarrier.wait(v_ready.index(slot), (step // STAGES) & 1)\n    if D1",
        "    if D1",
        "unordered read",
    ),
    "queries are given back too early": (
        FORWARD,
        "            mbarrier.wait(q_ready.index(GROUP), tile & 1)\n",
        "            mbarrier.wait(q_ready.index(GROUP), tile & 1)\n"
        "            mbarrier.arrive(q_empty.index(GROUP), count=1)\n",
        "overwrite, barrier count, deadlock, unordered read",
    ),
    "one warp group's release is enough for K": (
        FORWARD,
        "mbarrier.init(k_empty.index(i), count=2)",
        "mbarrier.init(k_empty.index(i), count=1)",
        "overwrite, deadlock, barrier count, unordered read",
    ),
    "the bytes of the second piece are forgotten": (
        PARTS[1],
        "mbarrier.expect(ready, N * (D0 + D1) * 2)",
        "mbarrier.expect(ready, N * D0 * 2)",
        "expect bytes, unordered read, barrier count",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_this_kernel_is_named(tmp_path, monkeypatch, fault: str):
    module, right, wrong, kinds = FAULTS[fault]
    assert right in SOURCES[module], "the kernel changed; change the fault with it"
    names = {FORWARD: "broken_forward", PARTS[1]: "broken_tiles"}
    for name, source in SOURCES.items():
        text = source.replace(right, wrong) if name == module else source
        (tmp_path / f"{names[name]}.py").write_text(text.replace(PARTS[1], "broken_tiles"))
    monkeypatch.syspath_prepend(tmp_path)
    emulator = Emulator(strict=False)
    kernels = emulator.load("broken_forward", also=(PARTS[0], "broken_tiles"))
    width = 80 if "second piece" in fault else 128
    found = []
    for seed in range(8):
        emulator.seed = seed
        try:
            check(kernels, join(group(19, 5, 18), Pack((40,))), (2, 1), width, causal=True)
        except Hazard as hazard:
            found.append(hazard.kind)
    assert len(found) == 8, f"{fault}: found only in {len(found)} of 8 schedules"
    assert set(found) <= set(kinds.split(", ")), found


def test_the_backend_is_refused_with_a_word_where_it_cannot_run():
    q = torch.randn(5, 2, 64).bfloat16()
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'gluon' needs a Hopper GPU \(compute capability 9.0\), but q is on cpu"):
        packed_attention(q, q, q, offsets, causal=True, backend="gluon")


@pytest.mark.parametrize(
    ("dtype", "width", "words"), [(torch.float32, 64, "float32"), (torch.bfloat16, 48, "dimension 48")]
)
def test_what_the_kernel_does_not_take(kernels, dtype: torch.dtype, width: int, words: str):
    q = torch.randn(5, 2, width).to(dtype)
    assert words in gluon_backend.takes(q)
    with pytest.raises(ValueError, match=words):
        kernels.hopper_forward(q, q, q, prepare(torch.tensor([0, 5]), causal=True), scale=1.0)


@pytest.mark.parametrize(
    ("version", "works"), [("3.6.0", True), ("3.7.1", True), ("3.8.0", False), ("3.5.1", False), ("x", False)]
)
def test_versions_of_gluon(version: str, works: bool):
    assert (refusal(version) is None) == works
    assert works or f"this is {version}" in refusal(version)
