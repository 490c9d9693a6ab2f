"""Decode attention over pages on the CPU against plain softmax attention over all keys of each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_case import assert_close, make_case
from fastvst_kernels import decode_attention
from fastvst_kernels.decode import pieces
from fastvst_kernels.decode.op import decode_attention_op
from fastvst_kernels.decode.pieces import DecodePieces, own_pieces, prefix_pieces

GROUPS = [(40, [3, 17, 0]), (0, [5]), (7, [1, 1]), (130, [33] * 5)]


def run(case, backend="auto", **options):
    return decode_attention(
        case.q,
        case.k_pages,
        case.v_pages,
        case.page_table,
        case.lengths,
        return_lse=True,
        backend=backend,
        **(case.options() | options),
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_groups(backend, dtype):
    case = make_case(GROUPS, (6, 2), 32, dtype)
    assert_close(case, run(case, backend))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_row_without_any_key_among_rows_with_both_kinds(backend):
    """A padding row of a batch: its output must be 0, not NaN, or it spoils the page that it writes."""
    case = make_case([(9, [2, 0]), (0, [0, 3, 0])], (4, 2), 16, torch.float32, page_size=4)
    out, lse = run(case, backend)
    assert_close(case, (out, lse))
    assert not out[2].any() and (lse[2] == -torch.inf).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.lists(st.integers(0, 40), min_size=1, max_size=5)), min_size=1, max_size=6
    ),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 99),
)
def test_any_lengths(groups, page_size, seed):
    case = make_case(groups, (4, 2), 16, torch.float32, page_size=page_size, seed=seed)
    assert_close(case, run(case))


def test_long_lists_are_cut_into_pieces_of_similar_length(monkeypatch):
    """Several pieces avoid padding, and their result is that of one piece."""
    case = make_case([(n, [n, 2 * n]) for n in (3, 9, 40, 41, 130)], (4, 2), 16, torch.float32)
    one = run(case)
    monkeypatch.setattr(pieces, "ONE_PIECE", 0)
    made = own_pieces(case.page_table.numpy(), case.lengths.numpy(), 16, torch.float32)
    assert len(made) > 3 and sorted(r for p in made for r in p.place.tolist()) == list(range(10))
    assert sum(p.groups * p.length for p in made) < 1.35 * int(case.lengths.sum())
    assert_close(case, run(case))
    torch.testing.assert_close(run(case)[0], one[0])


def test_prepared_pieces_give_the_same_bits_and_no_groups_are_one_empty_prompt():
    case = make_case(GROUPS, (6, 2), 32, torch.float32)
    prefix = (case.prefix_pages.numpy(), case.prefix_lengths.numpy(), case.group_offsets.numpy())
    prepared = DecodePieces(
        prefix_pieces(*prefix, 16, torch.float32),
        own_pieces(case.page_table.numpy(), case.lengths.numpy(), 16, torch.float32),
    )
    for a, b in zip(run(case), run(case, plan=prepared), strict=True):
        assert torch.equal(a, b)
    alone = make_case([(0, [3, 17, 60, 1])], (4, 4), 16, torch.float32)
    found = decode_attention(alone.q, alone.k_pages, alone.v_pages, alone.page_table, alone.lengths, return_lse=True)
    assert_close(alone, found)


def test_operator():
    case = make_case([(9, [2, 0]), (3, [5])], (2, 1), 16, torch.float32, page_size=4)
    tables = (case.page_table, case.lengths, case.prefix_pages, case.prefix_lengths, case.group_offsets)
    torch.library.opcheck(decode_attention_op, (case.q, case.k_pages, case.v_pages, *tables, 2, 0.25, False))

    def step(q):
        return decode_attention(q, case.k_pages, case.v_pages, case.page_table, case.lengths, **case.options()).tanh()

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(case.q), step(case.q))


def test_wrong_arguments_are_named():
    case = make_case([(9, [2, 1])], (2, 1), 16, torch.float32, page_size=4)
    with pytest.raises(ValueError, match="go together"):
        run(case, prefix_pages=None)
    with pytest.raises(ValueError, match="a group has 2 rows and max_group is 1"):
        run(case, max_group=1)
    with pytest.raises(ValueError, match="lengths of prefix_pages run from 13 to 13; it holds 0..12"):
        run(case, prefix_lengths=torch.tensor([13]))
    with pytest.raises(ValueError, match="names pages 0..99"):
        run(case, prefix_pages=torch.tensor([[99, 0, 1]]))
    with pytest.raises(ValueError, match="must rise from 0 to 2"):
        run(case, group_offsets=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="not a multiple of 3 KV heads"):
        pages = case.k_pages.expand(-1, -1, 3, -1)
        decode_attention(case.q, pages, pages, case.page_table, case.lengths)
    with pytest.raises(ValueError, match="unknown decode attention backend"):
        run(case, backend="flash")
    with pytest.raises(ValueError, match="no kernels for 'cpu'"):
        run(case, backend="triton")
