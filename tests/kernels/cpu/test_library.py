"""Packed attention by a FlashAttention library, shared prompts included, with stand-ins of the libraries in float64."""

import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import fastvst_kernels.flops  # noqa: F401 - the formulas that the counter uses
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention import api, choice, libraries
from fastvst_kernels.attention.backends import AttentionCall, lacks
from fastvst_kernels.attention.choice import TABLE, Case, choose, fastest, read_rows, record
from fastvst_kernels.attention.library_op import attend, library_attention_op
from tests.support import flash_libraries
from tests.support.attention_oracle import Pack, Results, formula, group, join
from tests.support.pretended_gpu import pretended_gpu

STAND_INS = {
    "flash-attn-4": flash_libraries.flash_attention_4,
    "flash-attn-3": flash_libraries.flash_attention_3,
    "flash-attn-2": flash_libraries.flash_attention_2,
}


@pytest.fixture(params=libraries.LIBRARIES)
def library(request, monkeypatch):
    """The name of a library whose functions are stand-ins."""
    libraries.load.cache_clear()
    if request.param == "torch-varlen":
        kept = flash_libraries.torch_varlen()
        yield request.param
        kept._destroy()
    else:
        for name, module in STAND_INS[request.param]().items():
            monkeypatch.setitem(sys.modules, name, module)
        yield request.param
    libraries.load.cache_clear()


def through(library, pack, *, causal, scale):
    plan = prepare(pack.offsets(), pack.groups(), causal=causal)

    def compute(q, k, v):
        out, lse = attend(
            library,
            (q, k, v),
            pack.offsets(),
            pack.groups(),
            plan.prompts,
            longest=plan.longest,
            causal=causal,
            scale=scale,
        )
        return out, lse.transpose(0, 1)

    return compute


def assert_equals_the_formula(library, pack, heads, *, causal, scale=0.3, width=16):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(pack.tokens, heads[0] + 2 * heads[1], width, generator=generator, dtype=torch.float64)
    dout = torch.randn(pack.tokens, heads[0], width, generator=generator, dtype=torch.float64)
    found = Results.of(through(library, pack, causal=causal, scale=scale), qkv, heads, dout, None).values
    want = Results.of(lambda q, k, v: formula(q, k, v, pack, causal=causal, scale=scale), qkv, heads, dout, None).values
    for name, value in want.items():
        size = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name], value, atol=1e-12 * size, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


sequences = st.integers(0, 9).map(lambda n: Pack((n,), (-1,)))
prompts = st.builds(lambda p, c: group(p, *c), st.integers(0, 9), st.lists(st.integers(0, 6), min_size=1, max_size=5))
packs = st.lists(st.one_of(sequences, prompts), min_size=1, max_size=5).map(lambda parts: join(*parts))
heads = st.sampled_from([(1, 1), (4, 2), (7, 1), (6, 3)])
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(packs.filter(lambda pack: pack.tokens > 0), heads)
def test_every_group_shape_equals_the_formula(library, pack, heads):
    assert_equals_the_formula(library, pack, heads, causal=True)


@quick
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any), heads, st.booleans())
def test_plain_rows_equal_the_formula(library, lengths, heads, causal):
    assert_equals_the_formula(library, Pack(tuple(lengths)), heads, causal=causal)


def test_a_large_score_of_either_part_does_not_overflow(library):
    """exp(score) is inf for both parts; their shares are computed from differences."""
    assert_equals_the_formula(library, join(group(5, 3, 4), group(7, 2)), (4, 2), causal=True, scale=300.0)


def test_the_operator(library):
    """Fake tensors, autograd and aot dispatch by torch's own checks."""
    pack = join(group(5, 3, 0, 4), Pack((6,), (-1,)), group(7, 2))
    plan = prepare(pack.offsets(), pack.groups(), causal=True)
    rows = plan.prompts
    q = torch.randn(pack.tokens, 4, 16, dtype=torch.float64, requires_grad=True)
    k = torch.randn(pack.tokens, 2, 16, dtype=torch.float64, requires_grad=True)
    args = (
        *(q, k, k.detach().clone().requires_grad_(), pack.offsets(), pack.groups()),
        *(rows.completion_rows, rows.prompt_rows, rows.completion_offsets, rows.prompt_offsets),
        *([plan.longest, rows.longest_completions, rows.longest_prompt], library, True, 0.25),
    )
    torch.library.opcheck(library_attention_op, args)


def test_rows_of_shared_prompts():
    pack = join(Pack((3,), (-1,)), group(5, 2, 0, 4), group(0, 2), group(4, 0), group(1, 1))
    rows = prepare(pack.offsets(), pack.groups(), causal=True).prompts
    assert rows.prompt_rows.tolist() == [3, 4, 5, 6, 7, 20]
    assert rows.completion_rows.tolist() == [8, 9, 10, 11, 12, 13, 21]
    assert rows.prompt_offsets.tolist() == [0, 5, 6] and rows.completion_offsets.tolist() == [0, 6, 7]
    assert (rows.longest_prompt, rows.longest_completions) == (5, 6)


def test_flops_are_those_of_the_packed_operator(library):
    pack = join(group(5, 3, 4), Pack((6,), (-1,)))
    counts = []
    qkv = torch.randn(pack.tokens, 8, 16, dtype=torch.float64)
    for compute in (
        through(library, pack, causal=True, scale=0.25),
        lambda q, k, v: packed_attention(
            q, k, v, pack.offsets(), causal=True, groups=pack.groups(), scale=0.25, return_lse=True
        ),
    ):
        with FlopCounterMode(display=False) as counter:
            Results.of(compute, qkv, (4, 2), torch.ones(pack.tokens, 4, 16), None)
        counts.append(counter.get_total_flops())
    pairs = 5 * 6 / 2 + 3 * 4 / 2 + 4 * 5 / 2 + 7 * 5 + 6 * 7 / 2
    assert counts == [12 * 4 * 16 * pairs] * 2


def call(dtype=torch.bfloat16, groups=None, plan=None, longest=8, grad=False):
    q = torch.zeros(8, 2, 16, dtype=dtype, requires_grad=grad)
    return AttentionCall(q, q, q, torch.tensor([0, 8], dtype=torch.int32), groups, plan, longest, True, 0.25)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dtype": torch.float32}, "float32"),
        ({"longest": None}, "give max_seqlen"),
        ({"groups": torch.tensor([-1])}, "rows of shared prompts"),
        ({"grad": True}, "a logsumexp with a gradient"),
    ],
)
def test_what_a_library_lacks_is_named(wrong, message):
    assert any(message in text for text in lacks(call(**wrong), return_lse=True))
    assert lacks(call(), return_lse=True) == ["cpu tensors"]


def case(**changes):
    given = {"capability": (9, 0), "gpu": "NVIDIA H100", "width": 128, "training": True, "groups": False}
    return Case(**({**given, "mean_length": 4096} | changes))


@pytest.mark.parametrize(
    "changes, available, expected",
    [
        ({}, ("flash-attn-3", "torch-varlen"), "flash-attn-3"),
        ({}, ("torch-varlen",), "triton"),
        ({}, ("flash-attn-4", "flash-attn-3"), "flash-attn-3"),
        ({"groups": True}, ("flash-attn-4",), "flash-attn-4"),
        ({"mean_length": 100}, ("flash-attn-3",), "triton"),
        ({"width": 80}, ("flash-attn-3",), "flash-attn-3"),
        ({"width": 256}, ("flash-attn-3",), "triton"),
        ({"capability": (8, 0)}, ("flash-attn-2",), "triton"),
        ({"capability": (10, 0)}, ("flash-attn-4", "flash-attn-3"), "flash-attn-4"),
        ({"capability": (12, 0)}, ("flash-attn-4",), "triton"),
    ],
)
def test_auto_on_a_gpu(changes, available, expected):
    name, why = fastest(case(**changes), read_rows(TABLE), available)
    assert name == expected and why


def test_without_a_library_auto_takes_the_own_kernels():
    assert choose(case(), ())[0] == "triton"


def test_a_measurement_overrides_the_model(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(TABLE.read_text())
    everything = tuple(libraries.LIBRARIES)
    record(case(), {"triton": 1.0, "flash-attn-3": 1.2, "flash-attn-4": 1.1}, "bench, 2026-01-01", path)
    assert fastest(case(), read_rows(path), everything) == ("triton", "this package's kernels (bench, 2026-01-01)")
    assert fastest(case(gpu="NVIDIA H200"), read_rows(path), everything)[0] == "flash-attn-3"
    assert fastest(case(mean_length=2048), read_rows(path), everything)[0] == "flash-attn-3"
    record(case(), {"triton": 1.0, "flash-attn-4": 0.8}, "again", path)
    assert fastest(case(), read_rows(path), everything) == ("flash-attn-4", "again")
    assert sum(row["gpu"] is not None for row in json.loads(path.read_text())["rows"]) == 1
    with pytest.raises(ValueError, match="expected 'triton'"):
        record(case(), {"flash-attn-3": 1.0}, "no Triton", path)
    path.write_text('{"rows": [{"arch": 9}]}')
    read_rows.cache_clear()
    with pytest.raises(ValueError, match=r"table\.json is no table"):
        read_rows(path)


def test_auto_takes_gluon_where_a_measurement_says_so(tmp_path, monkeypatch):
    """On the fake driver of a Hopper GPU, by the launches; the package's own table never does."""
    path = tmp_path / "table.json"
    path.write_text(TABLE.read_text())
    offsets = torch.tensor([0, 40], dtype=torch.int32)

    def launched(name, dtype=torch.bfloat16):
        with pretended_gpu(name=name) as seen:
            q = torch.empty(40, 2, 128, device="cuda", dtype=dtype, requires_grad=True)
            plan = prepare(offsets, causal=True).to("cuda")
            packed_attention(q, q, q, offsets.cuda(), causal=True, plan=plan).sum().backward()
            return {kernel for kernel in seen.launches if kernel.endswith("_kernel")}

    assert not any("hopper" in kernel for kernel in launched("NVIDIA H100"))
    monkeypatch.setattr(choice, "TABLE", path)
    monkeypatch.setattr(api, "installed", lambda: ())
    record(case(mean_length=40), {"triton": 1.0, "gluon": 0.8}, "made up", path)
    assert launched("NVIDIA H100") == {
        f"hopper_{name}_kernel" for name in ("forward", "delta", "backward_queries", "backward_keys")
    }
    assert not any("hopper" in kernel for kernel in launched("NVIDIA H200"))  # another GPU
    assert not any("hopper" in kernel for kernel in launched("NVIDIA H100", torch.float32))
    record(case(mean_length=40), {"triton": 0.7, "gluon": 0.8}, "made up", path)
    assert not any("hopper" in kernel for kernel in launched("NVIDIA H100"))
    model = json.loads(TABLE.read_text())
    model["rows"][0]["order"] = ["gluon"]
    path.write_text(json.dumps(model))
    read_rows.cache_clear()
    with pytest.raises(ValueError, match="only a measurement names it"):
        read_rows(path)


def test_a_library_that_breaks_when_it_is_imported_is_said(monkeypatch, tmp_path, caplog):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    libraries.installed.cache_clear()
    assert libraries.installed() == ("torch-varlen",)
    assert "flash-attn-2 is installed but cannot be imported: undefined symbol" in caplog.text
    libraries.installed.cache_clear()
