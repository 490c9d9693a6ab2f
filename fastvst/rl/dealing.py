"""Groups are dealt again over the ranks before an update, so that every rank computes about the same FLOPs.

Dynamic sampling leaves each rank with other groups: one may have kept 40 and another 24, some with videos. The ranks
exchange the sizes of all groups, agree on the rank of each, and exchange the bytes of those that move, all at once.
Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastvst.batch import Cost, EncodedSample
from fastvst.model.config import ModelConfig
from fastvst.model.flops import TRAINING, decoder_flops, head_flops
from fastvst.rl.packing import Answer, Group
from fastvst.rollout.fsdp_engine import divide_by_work
from fastvst.train.distributed import World

LENGTH = struct.Struct("<q")


def group_flops(group: Group, config: ModelConfig) -> float:
    """Training FLOPs of a group in the update: the prompt once with its images, and its completions."""
    lengths = [len(c) for c in group.answers]
    added = decoder_flops(config, lengths, [len(group.prompt)] * len(lengths)) + head_flops(config, sum(lengths))
    return group.prompt.cost.flops + TRAINING * added


def global_order(groups: Sequence[Group], world: World) -> list[int]:
    """The place of each of this rank's groups among those of all ranks, by their numbers. Every rank calls it."""
    table = gather_rows(torch.tensor([[float(group.number)] for group in groups]).view(-1, 1), world)
    order = sorted(range(len(table)), key=lambda i: (table[i][1], i))
    place = {row: position for position, row in enumerate(order)}
    return [place[row] for row, (rank, _) in enumerate(table) if rank == world.rank]


def gather_rows(rows: Tensor, world: World) -> list[list[float]]:
    """[rank, values...] for each row of all ranks, rank after rank. Every rank calls it.

    Args:
        rows: (n, c) floats; n may differ between ranks.
    """
    if world.size == 1:  # nothing for the device to sum, and no wait for it
        return [[0.0, *row] for row in rows.double().tolist()]
    counts = torch.zeros(world.size, dtype=torch.float64)
    counts[world.rank] = rows.shape[0]
    sizes = [int(n) for n in world.sum(counts.to(world.device)).tolist()]
    table = torch.zeros(sum(sizes), 1 + rows.shape[1], dtype=torch.float64)
    begin = sum(sizes[: world.rank])
    table[begin : begin + rows.shape[0], 1:] = rows
    table[begin : begin + rows.shape[0], 0] = world.rank
    return world.sum(table.to(world.device)).tolist()


def deal(parts: Sequence[Sequence[Group]], config: ModelConfig, world: World) -> list[list[Group]]:
    """The groups of each minibatch that this rank computes. Every rank calls it, and all groups go to some rank.

    Each minibatch is dealt by itself: the largest group first, each to the rank with the least FLOPs so far (Graham,
    1969). So a rank has no group only if no rank has two. Then the shares go to ranks so that few bytes move.

    Args:
        parts: this rank's groups of each minibatch.
    """
    if world.size == 1:
        return [list(part) for part in parts]
    mine = [(k, group) for k, part in enumerate(parts) for group in part]
    data = [encoded(group) for _, group in mine]
    rows = [
        [k, group.number, group_flops(group, config), sum(len(piece) for piece in pieces)]
        for (k, group), pieces in zip(mine, data, strict=True)
    ]
    table = gather_rows(torch.tensor(rows, dtype=torch.float64).view(-1, 4), world)
    owners: dict[int, int] = {}
    for k in range(len(parts)):
        members = [i for i, row in enumerate(table) if row[1] == k]
        owners |= choose_ranks(members, table, world.size)
    first = next((i for i, row in enumerate(table) if row[0] == world.rank), 0)
    outgoing: list[list[bytes | memoryview]] = [[] for _ in range(world.size)]
    for index, pieces in enumerate(data):
        target = owners[first + index]
        if target != world.rank:
            outgoing[target] += pieces
    arrived = _exchange(outgoing, _expected(table, owners, world))
    dealt: list[list[tuple[float, int, Group]]] = [[] for _ in parts]
    for index, (rank, part, number, _, size) in enumerate(table):
        if owners[index] != world.rank:
            continue
        source = int(rank)
        if source == world.rank:
            group = mine[index - first][1]
        else:
            group = decoded(arrived[source][: int(size)])
            arrived[source] = arrived[source][int(size) :]
        dealt[int(part)].append((number, index, group))
    return [[group for _, _, group in sorted(entries, key=lambda entry: entry[:2])] for entries in dealt]


def choose_ranks(members: Sequence[int], table: Sequence[Sequence[float]], size: int) -> dict[int, int]:
    """The rank of each group of one minibatch.

    Args:
        members: rows of `table` that belong to the minibatch.
        table: [rank, minibatch, number, FLOPs, bytes] of each group of all ranks.
        size: number of ranks.
    """
    shares = divide_by_work([1.0 + table[i][3] for i in members], size)
    stays = [[0.0] * size for _ in range(size)]  # bytes of a share that a rank has already
    for share, chosen in enumerate(shares):
        for place in chosen:
            row = table[members[place]]
            stays[share][int(row[0])] += row[4]
    pairs = sorted(((stays[s][r], s, r) for s in range(size) for r in range(size)), key=lambda p: (-p[0], p[1], p[2]))
    rank_of: dict[int, int] = {}
    taken: set[int] = set()
    for _, share, rank in pairs:
        if share not in rank_of and rank not in taken:
            rank_of[share] = rank
            taken.add(rank)
    return {members[place]: rank_of[share] for share, chosen in enumerate(shares) for place in chosen}


def _expected(table: Sequence[Sequence[float]], owners: dict[int, int], world: World) -> list[int]:
    """Bytes that each rank sends to this one."""
    sizes = [0] * world.size
    for index, row in enumerate(table):
        if owners[index] == world.rank and int(row[0]) != world.rank:
            sizes[int(row[0])] += int(row[4])
    return sizes


def _exchange(outgoing: Sequence[Sequence[bytes | memoryview]], expected: Sequence[int]) -> list[memoryview]:
    """What every rank sends to this one; one collective, through host memory."""
    sizes = [sum(len(piece) for piece in pieces) for pieces in outgoing]
    sent = np.frombuffer(bytearray().join(piece for pieces in outgoing for piece in pieces), dtype=np.uint8)
    received = np.empty(sum(expected), dtype=np.uint8)
    dist.all_to_all_single(torch.from_numpy(received), torch.from_numpy(sent), list(expected), sizes)
    view = received.data
    ends = np.cumsum(expected).tolist()
    return [view[end - size : end] for end, size in zip(ends, expected, strict=True)]


# ---------------------------------------------------------------------------------------------------- groups as bytes


def encoded(group: Group) -> list[bytes | memoryview]:
    """A group as the length of a JSON object, the object, and the bytes of its tensors, which are not copied."""
    sample = group.prompt
    values = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)}
    tensors: list[tuple[str, Tensor]] = [(name, v) for name, v in values.items() if isinstance(v, Tensor)]
    tensors += [(name, getattr(answer, name)) for answer in group.answers for name in ("tokens", "logprobs")]
    plain = {name: v for name, v in values.items() if not isinstance(v, Tensor)}
    head = {
        "number": group.number,
        "advantages": [answer.advantage for answer in group.answers],
        "plain": plain | {"cost": dataclasses.asdict(sample.cost)},
        "tensors": [[name, str(v.dtype).removeprefix("torch."), list(v.shape)] for name, v in tensors],
    }
    line = json.dumps(head).encode()
    return [LENGTH.pack(len(line)), line, *(v.numpy().ravel().view(np.uint8).data for _, v in tensors)]


def decoded(data: bytes | memoryview) -> Group:
    """Inverse of `encoded`; the tensors own their memory."""
    place = LENGTH.size + LENGTH.unpack(data[: LENGTH.size])[0]
    head = json.loads(bytes(data[LENGTH.size : place]))
    tensors: list[tuple[str, Tensor]] = []
    for name, dtype, shape in head["tensors"]:
        kind = np.dtype(dtype)
        count = int(np.prod(shape))
        value = np.frombuffer(data, kind, count, place).reshape(shape)
        tensors.append((name, torch.from_numpy(value.copy())))
        place += count * kind.itemsize
    answers = head["advantages"]
    cut = len(tensors) - 2 * len(answers)
    fields: dict[str, Any] = {**dict(tensors[:cut]), **head["plain"]}
    for name in ("source_sizes", "sizes"):
        fields[name] = tuple(tuple(size) for size in fields[name])
    fields["notes"] = tuple(fields["notes"])
    fields["cost"] = Cost(**fields["cost"])
    pairs = [tensors[cut + 2 * i : cut + 2 * i + 2] for i in range(len(answers))]
    made = [Answer(tokens[1], logprobs[1], a) for (tokens, logprobs), a in zip(pairs, answers, strict=True)]
    return Group(EncodedSample(**fields), tuple(made), head["number"])
