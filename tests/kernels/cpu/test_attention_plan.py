"""Tile tables: every query and every key in exactly one tile, longest work first, the same ranges as the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_oracle import Pack, group, join
from fastvst_kernels import prepare

lengths = st.integers(0, 40)
groups = st.builds(lambda p, a: group(p, *a), lengths, st.lists(lengths, min_size=1, max_size=4))
packs = st.lists(st.one_of(groups, st.builds(lambda n: Pack((n,)), lengths)), min_size=1, max_size=4).map(
    lambda parts: join(*parts)
)


def seen(pack: Pack, causal: bool) -> torch.Tensor:
    """(T, T) bool: row sees column, from the definition, sequence by sequence."""
    offsets = pack.offsets().tolist()
    mask = torch.zeros(pack.tokens, pack.tokens, dtype=torch.bool)
    for i, prompt in enumerate(pack.prompts or [-1] * len(pack.lengths)):
        a = offsets[i]
        b = offsets[i + 1]
        mask[a:b, a:b] = torch.ones(b - a, b - a).tril().bool() if causal else True
        if prompt >= 0:
            mask[a:b, offsets[prompt] : offsets[prompt + 1]] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(packs, st.booleans(), st.booleans())
def test_tiles_cover_the_mask_exactly(pack: Pack, causal: bool, padded: bool):
    if not causal:
        pack = Pack(pack.lengths)
    plan = prepare(pack.offsets(), pack.groups(), causal=causal, padded=padded)
    wanted = seen(pack, causal)
    at = torch.arange(pack.tokens)
    for block, table in plan.queries.items():
        found = torch.zeros_like(wanted)
        for begin, end, first, last, prompt_first, prompt_last in table.tolist():
            assert 0 <= end - begin <= block
            rows = found[begin:end]
            assert not rows.any()  # no row twice
            rows[:, first:last] = at[first:last] <= at[begin:end, None] if causal else True
            rows[:, prompt_first:prompt_last] = True
        assert torch.equal(found, wanted)
    for block, table in plan.keys.items():
        found = torch.zeros_like(wanted)
        for begin, end, first, last in table.tolist():
            assert 0 <= end - begin <= block
            columns = found[:, begin:end]
            assert not columns.any()
            columns[first:last] = at[begin:end] <= at[first:last, None] if causal else True
        assert torch.equal(found, wanted)


def test_longest_work_first_and_empty_tiles_last():
    plan = prepare(torch.tensor([0, 64, 960, 1024]), causal=True, padded=True, query_blocks=(64,), key_blocks=(64,))
    begin, end, first, last, *_ = plan.queries[64].T.tolist()
    work = [(b - a) if e > s else -1 for s, e, a, b in zip(begin, end, first, last, strict=True)]
    assert work == sorted(work, reverse=True) and work[0] == 896 and work[-3:] == [-1, -1, -1]
    assert len(begin) == 1024 // 64 + 3  # the upper bound, which needs no value of the offsets


def test_padded_plans_depend_on_counts_only():
    one = prepare(torch.tensor([0, 10, 400]), causal=True, padded=True)
    other = prepare(torch.tensor([0, 399, 400]), causal=True, padded=True)
    assert {b: t.shape for b, t in one.queries.items()} == {b: t.shape for b, t in other.queries.items()}


def test_moves_and_refuses():
    plan = prepare(torch.tensor([0, 5]), causal=False)
    assert plan.to("meta").queries[64].device.type == "meta"
    with pytest.raises(ValueError, match="need causal=True"):
        prepare(torch.tensor([0, 5]), torch.tensor([-1]), causal=False)
    with pytest.raises(ValueError, match="used by no kernel"):
        prepare(torch.tensor([0, 5]), causal=True, query_blocks=(48,))
    with pytest.raises(RuntimeError, match="reads values of its arguments"):
        prepare(torch.zeros(2, dtype=torch.int32, device="meta"), causal=True)
