"""The attention kernels on a GPU: against float64, bitwise repeatable, every value written, long sequences, peers."""

from __future__ import annotations

import pytest
import torch

from attention_kernels import attention_with
from attention_oracle import Pack, Results, assert_as_good_as_plain, group, join
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention.plan import KernelTiles
from fastvst_kernels.shared.tile_tables import Tile
from fastvst_kernels.tuning.attention import KERNELS, candidates

MIXED = join(group(1600, 512, 3, 0, 200), Pack((1, 0, 65, 777)), group(0, 90, 33))


def compute(pack: Pack, causal: bool, backend: str = "triton", planned: bool = True):
    """compute(q, k, v) -> (out, lse) by the public function, with the loader's plan or one made on the GPU."""
    offsets = pack.offsets("cuda")
    groups = pack.groups("cuda")
    plan = prepare(pack.offsets(), pack.groups(), causal=causal).to("cuda") if planned else None

    def run(q, k, v):
        return packed_attention(
            q, k, v, offsets, causal=causal, groups=groups, backend=backend, return_lse=True, plan=plan
        )

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 96, 112, 128, 256])
def test_groups_and_full_at_every_width(width: int, dtype: torch.dtype):
    options = {"device": "cuda", "with_dlse": True}
    assert_as_good_as_plain(compute(MIXED, True), MIXED, (7, 1), width, dtype, causal=True, **options)
    full = Pack((1000, 1, 0, 64, 333))
    assert_as_good_as_plain(compute(full, False), full, (4, 4), width, dtype, causal=False, **options)


def with_tile(pack: Pack, causal: bool, kernel: str, chosen: Tile):
    """compute(q, k, v) -> (out, lse) where one of the three kernels runs with a given configuration."""
    plan = prepare(pack.offsets(), pack.groups(), causal=causal).to("cuda")
    tiles = dict.fromkeys(KERNELS, Tile(32, 32, 8, 1)) | {kernel: chosen}
    return attention_with(plan, KernelTiles(*tiles.values()))


@pytest.mark.parametrize("shape", ["16x80", "16x128", "32x80", "32x128"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_every_configuration_that_tuning_may_choose(kernel: str, shape: str):
    """Includes tensor descriptors and the persistent grid; what does not fit shared memory is skipped."""
    from triton.runtime.errors import OutOfResources

    bits, width = map(int, shape.split("x"))
    major, minor = torch.cuda.get_device_capability()
    ran = []
    for numbers in candidates(kernel, shape, 10 * major + minor):
        run = with_tile(MIXED, True, kernel, Tile(*numbers))
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        try:
            assert_as_good_as_plain(run, MIXED, (7, 1), width, dtype, causal=True, device="cuda")
        except OutOfResources:
            continue
        ran.append(numbers)
    assert ran


@pytest.mark.parametrize("heads", [(28, 4), (16, 2), (16, 16)])
def test_the_real_heads_and_a_plan_made_on_the_device(heads: tuple[int, int]):
    pack = join(group(700, 100, 300), Pack((900,)))
    run = compute(pack, True, planned=False)
    assert_as_good_as_plain(run, pack, heads, 128, torch.bfloat16, causal=True, device="cuda")


def test_sixty_four_completions():
    pack = group(900, *range(1, 65))
    assert_as_good_as_plain(compute(pack, True), pack, (7, 1), 128, torch.bfloat16, causal=True, device="cuda")


def test_repeated_runs_are_bitwise_equal_and_write_every_value():
    """Twenty runs, in which a race would show as a difference; fresh memory is filled with NaN first."""
    torch.manual_seed(0)
    qkv = torch.randn(MIXED.tokens, 28 + 8, 128, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(MIXED.tokens, 28, 128, device="cuda", dtype=torch.bfloat16)
    first = None
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(20):
            values = Results.of(compute(MIXED, True), qkv, (28, 4), dout, None).values
            first = first or values
            for name, value in values.items():
                assert not value.isnan().any(), name
                assert torch.equal(value, first[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("length", [65_537, 131_072])
def test_long_sequences_against_torch(length: int):
    """One sequence past 65,536 tokens, against torch's own variable-length attention in the same dtype."""
    pack = Pack((length,))
    torch.manual_seed(0)
    qkv = torch.randn(length, 3, 128, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(length, 1, 128, device="cuda", dtype=torch.bfloat16)
    ours = Results.of(compute(pack, True), qkv, (1, 1), dout, None).values

    def torch_varlen(q, k, v):
        out = packed_attention(q, k, v, pack.offsets("cuda"), causal=True, max_seqlen=length, backend="torch")
        return out, out

    theirs = Results.of(torch_varlen, qkv, (1, 1), dout, None).values
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-2, atol=2e-2)


def test_rows_beyond_the_reach_of_32_bit_offsets():
    """Offsets of rows are 64-bit: 2^31 values come before the last sequence."""
    tokens = 131_072
    heads = 130
    qkv = torch.zeros(tokens, heads + 2, 128, device="cuda", dtype=torch.bfloat16)
    qkv[-100:].normal_()
    q, k, v = qkv.split([heads, 1, 1], 1)
    offsets = torch.tensor([0, tokens - 100, tokens], device="cuda", dtype=torch.int32)
    out = packed_attention(q, k, v, offsets, causal=True, backend="triton")
    tail = (x[-100:].double() for x in (q, k, v))
    own = torch.tensor([0, 100], device="cuda", dtype=torch.int32)
    expected = packed_attention(*tail, own, causal=True, backend="reference")
    torch.testing.assert_close(out[-100:].double(), expected, rtol=2e-2, atol=2e-2)


def test_against_flash_attn():
    pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    offsets = torch.tensor([0, 1000, 1001, 3000], device="cuda", dtype=torch.int32)
    q = torch.randn(3000, 28, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(3000, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ours = packed_attention(q, k, v, offsets, causal=True, backend="triton")
    theirs = packed_attention(q, k, v, offsets, causal=True, backend="flash", max_seqlen=1999)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_compiled_block():
    pack = join(group(100, 20, 30), Pack((50,)))
    weight = torch.randn(64, 6 * 64, device="cuda", dtype=torch.bfloat16)
    run = compute(pack, True)

    def block(x):
        q, k, v = (x @ weight).view(-1, 6, 64).split([4, 1, 1], 1)
        return run(q, k, v)[0].flatten(1)

    x = torch.randn(pack.tokens, 64, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
