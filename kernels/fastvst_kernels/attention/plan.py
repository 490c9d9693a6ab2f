"""The tile tables of packed attention: which rows of the pack each program works on, longest work first.

The tables depend on the sequence boundaries only, so one plan serves all layers, forward and backward. The loader makes
it on the CPU and moves it with the batch. Made on a device it takes a few small kernels and never waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastvst_kernels.attention.fingerprint import Seen, fingerprint
from fastvst_kernels.attention.shared_prompts import SharedPrompts, find_shared_prompts
from fastvst_kernels.shared.boundary import public_operator
from fastvst_kernels.shared.tile_tables import PLAIN, Tile, config, shape_class

BLOCKS = (16, 32, 64, 128)  # every number of rows that a tile of a shipped or tunable configuration has


class KernelTiles(NamedTuple):
    """The configurations of the forward, the dQ and the dK/dV kernel."""

    forward: Tile
    queries: Tile
    keys: Tile


def kernel_tiles(q: Tensor, *, shared: bool = True) -> KernelTiles:
    """The configurations of the three kernels for q (T, Hq, D) on q's device, with shared prompts or without."""
    shape = shape_class(q.shape[-1], q.dtype)
    variant = "" if shared else PLAIN
    return KernelTiles(
        Tile(*config("attention_forward", shape, q.device, variant)),
        Tile(*config("attention_backward_queries", shape, q.device, variant)),
        Tile(*config("attention_backward_keys", shape, q.device, variant)),
    )


class ForwardState(NamedTuple):
    """What the forward leaves for the backward: q, out (T, Hq, D), k, v (T, Hkv, D) and the logsumexp (Hq, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Tile tables of one packed row.

    Attributes:
        num_tokens: T, the rows of the pack.
        causal: whether the mask is causal.
        shared: whether there are shared-prompt groups.
        queries: for each block size an (n, 6) int32 table with one row per tile of queries: first row, end row, first
            key, end key, first and end key of the shared prompt (equal where there is none).
        keys: for each block size an (n, 4) int32 table with one row per tile of keys: first row, end row, first query,
            end query. The queries of a shared prompt run to the end of its last completion.
        longest: the longest sequence, where the offsets were on the CPU.
        prompts: the shared prompts as one more call of plain attention, where groups and offsets were on the CPU.
        fingerprint: of the offsets and groups; an int where they were on the CPU, else a scalar on their device.
        seen: the offsets and groups that were compared with the fingerprint.
    """

    num_tokens: int
    causal: bool
    shared: bool
    queries: dict[int, Tensor]
    keys: dict[int, Tensor]
    longest: int | None = None
    prompts: SharedPrompts | None = None
    fingerprint: int | Tensor | None = None
    seen: Seen | None = field(default_factory=Seen, repr=False, compare=False)

    def check(
        self, q: Tensor, cu_seqlens: Tensor, groups: Tensor | None, causal: bool, *, validate: bool = False
    ) -> None:
        """Check that the plan was made for this call.

        Where the plan was made from CPU offsets and the call's are on a GPU, the comparison runs on the GPU
        (`torch._assert_async`), once for all layers; no call waits for it. A plan that was made on a device is compared
        with `validate` only.

        Raises:
            ValueError: other tokens, mask, offsets or groups.
        """
        shared = groups is not None
        if (self.num_tokens, self.causal, self.shared) != (q.shape[0], causal, shared):
            raise ValueError(
                f"the plan is for {self.num_tokens} tokens, causal={self.causal}, groups={self.shared}; the call has "
                f"{q.shape[0]}, {causal}, {shared}: make the plan with prepare() from the same offsets and groups"
            )
        if self.fingerprint is None or self.seen is None or torch.compiler.is_compiling() or cu_seqlens.is_meta:
            return
        if self.seen.knows(cu_seqlens, groups) or (isinstance(self.fingerprint, Tensor) and not validate):
            return
        found = fingerprint(cu_seqlens, groups)
        wrong = "the plan was made for other offsets or groups: make it with prepare() from those of this call"
        if validate or not found.is_cuda:
            if int(found) != int(self.fingerprint):
                raise ValueError(wrong)
        else:
            torch._assert_async(found == self.fingerprint, wrong)
        self.seen.add(cu_seqlens, groups)

    def trust(self, cu_seqlens: Tensor, groups: Tensor | None = None) -> None:
        """Calls with these tensors need no comparison: the caller made the plan from them or from their copies."""
        if self.seen is not None:
            self.seen.add(cu_seqlens, groups)

    def tables(self, tiles: KernelTiles, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The tables that the three kernels read with these configurations.

        Raises:
            ValueError: the plan has no table of that block size, or is on another device.
        """
        missing = [t.block_m for t in (tiles.forward, tiles.queries) if t.block_m not in self.queries]
        missing += [tiles.keys.block_n] if tiles.keys.block_n not in self.keys else []
        if missing:
            raise ValueError(f"the plan has no tables for tiles of {missing} rows; prepare() makes all by default")
        forward = self.queries[tiles.forward.block_m]
        if forward.device != device:
            raise ValueError(f"the plan is on {forward.device}, q on {device}; move it with plan.to({str(device)!r})")
        return forward, self.queries[tiles.queries.block_m], self.keys[tiles.keys.block_n]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> AttentionPlan:
        """The same plan on `device`; asynchronous where the memory is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AttentionPlan:
        """The same plan in page-locked memory."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> AttentionPlan:
        queries = {block: fn(table) for block, table in self.queries.items()}
        keys = {block: fn(table) for block, table in self.keys.items()}
        mark = fn(self.fingerprint) if isinstance(self.fingerprint, Tensor) else self.fingerprint
        prompts = None if self.prompts is None else self.prompts.map(fn)
        return AttentionPlan(self.num_tokens, self.causal, self.shared, queries, keys, self.longest, prompts, mark)


@public_operator(reads_values=True)
def prepare(
    cu_seqlens: Tensor,
    groups: Tensor | None = None,
    *,
    causal: bool,
    num_tokens: int | None = None,
    padded: bool | None = None,
    query_blocks: Sequence[int] = BLOCKS,
    key_blocks: Sequence[int] = BLOCKS,
) -> AttentionPlan:
    """The plan of `packed_attention` for one packed row.

    Args:
        cu_seqlens: (S + 1,) offsets from 0 to T.
        groups: (S,) index of the sequence that is the shared prompt of each, or -1; see `packed_attention`.
        causal: as given to `packed_attention` later.
        num_tokens: T. Needed when `cu_seqlens` is on a device, because reading it there would stop the device.
        padded: give every table its upper bound of rows, T // block + S; the surplus rows are empty tiles at the end.
            Shapes then depend on T and S only (CUDA graphs) and the host needs no value. Default: on a device only.
        query_blocks, key_blocks: tile sizes to make tables for; by default every one that a kernel may use.

    Returns:
        The plan, on `cu_seqlens`' device.

    Raises:
        ValueError: no `num_tokens` for offsets on a device, groups without causal, a block size that no kernel uses.
    """
    return make_plan(
        cu_seqlens,
        groups,
        causal=causal,
        num_tokens=num_tokens,
        padded=padded,
        query_blocks=query_blocks,
        key_blocks=key_blocks,
    )


def make_plan(
    cu_seqlens: Tensor,
    groups: Tensor | None,
    *,
    causal: bool,
    num_tokens: int | None = None,
    padded: bool | None = None,
    query_blocks: Sequence[int] = BLOCKS,
    key_blocks: Sequence[int] = BLOCKS,
) -> AttentionPlan:
    """`prepare`, which torch.compile can trace where the offsets are on a device."""
    if groups is not None and not causal:
        raise ValueError("groups (shared prompts) need causal=True")
    if unknown := sorted((set(query_blocks) | set(key_blocks)) - set(BLOCKS)):
        raise ValueError(f"tile sizes {unknown} are used by no kernel; expected some of {BLOCKS}")
    padded = cu_seqlens.device.type != "cpu" if padded is None else padded
    if num_tokens is None:
        if cu_seqlens.device.type != "cpu":
            raise ValueError(f"prepare() needs num_tokens (an int) for cu_seqlens on {cu_seqlens.device}")
        num_tokens = int(cu_seqlens[-1])
    # Wrong offsets and groups must not become addresses outside the tensors. Clamping costs no synchronisation;
    # `validate=True` of packed_attention reports wrong values.
    if cu_seqlens.is_cuda:
        whole = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
        torch._assert_async(whole, "cu_seqlens must run from 0 to the number of rows: no sequence covers some rows")
    offsets = cu_seqlens.long().clamp(0, num_tokens).cummax(0).values
    starts = offsets[:-1]
    ends = offsets[1:]
    sequence = torch.arange(len(starts), device=offsets.device)
    prompts = torch.full_like(sequence, -1) if groups is None else groups.long()
    prompts = torch.where((prompts >= 0) & (prompts < sequence), prompts, -1)
    # The last row that attends to a sequence: its own end, or the end of the last completion of a shared prompt.
    owner = torch.where(prompts >= 0, prompts, sequence)
    group_ends = ends.scatter_reduce(0, owner, ends, "amax") if causal else ends
    prompt_starts = torch.where(prompts >= 0, starts[prompts], 0)
    prompt_ends = torch.where(prompts >= 0, ends[prompts], 0)

    queries = {}
    keys = {}
    for block in sorted(set(query_blocks) | set(key_blocks)):
        begin, end, owner = _tiles(starts, ends, num_tokens, block, padded)
        if block in query_blocks:
            first = starts[owner]
            last = end if causal else ends[owner]
            table = torch.stack([begin, end, first, last, prompt_starts[owner], prompt_ends[owner]], 1)
            queries[block] = _longest_first(table, last - first + prompt_ends[owner] - prompt_starts[owner])
        if block in key_blocks:
            first = begin if causal else starts[owner]
            last = group_ends[owner]
            keys[block] = _longest_first(torch.stack([begin, end, first, last], 1), last - first)
    if torch.compiler.is_compiling():  # this plan serves the one call that makes it
        return AttentionPlan(num_tokens, causal, groups is not None, queries, keys, seen=None)
    mark = fingerprint(cu_seqlens, groups)
    if cu_seqlens.device.type != "cpu":
        return AttentionPlan(num_tokens, causal, groups is not None, queries, keys, fingerprint=mark)
    longest = int((ends - starts).max()) if len(starts) else 0
    shared = None if groups is None else find_shared_prompts(offsets, prompts)
    return AttentionPlan(num_tokens, causal, groups is not None, queries, keys, longest, shared, int(mark))


def _tiles(starts: Tensor, ends: Tensor, num_tokens: int, block: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """First row, end row and sequence of every tile; with `padded` the most that there can be, some of them empty."""
    if len(starts) == 0:
        nothing = starts.new_zeros(0)
        return nothing, nothing, nothing
    counts = (ends - starts + block - 1) // block
    cumulative = counts.cumsum(0)
    total = num_tokens // block + len(starts) if padded else int(cumulative[-1])
    tile = torch.arange(total, device=starts.device)
    owner = torch.searchsorted(cumulative, tile, right=True).clamp(max=len(starts) - 1)
    begin = starts[owner] + (tile - (cumulative - counts)[owner]) * block
    begin = torch.minimum(begin, ends[owner])  # a surplus tile begins where it ends
    return begin, torch.minimum(begin + block, ends[owner]), owner


def _longest_first(table: Tensor, work: Tensor) -> Tensor:
    """The rows of a table as int32 in falling order of `work`, empty tiles last."""
    work = torch.where(table[:, 1] > table[:, 0], work, -1)
    order = torch.sort(work, descending=True, stable=True).indices
    return table[order].to(torch.int32).contiguous()
