"""Recompute policies: what each block keeps for the backward pass.

    none    the saved tensors of every operator
    light   for each block its input, q, k, v and the attention output, and in the decoder the two MLP projections gate
            and up; the rest is computed again (`fastvst_kernels.recompute`)
    full    the input of every block (`torch.utils.checkpoint`)

All give the same gradients, bit for bit: they run the same operators on the same numbers. The tower keeps no gate and
up under `light`: with them all 32 blocks would keep 0.85 MB for each patch instead of 0.41 (bfloat16), and to compute
them again costs 15 % of a training step of the tower.

A policy is one for both towers, "light", or one for each of them, {vision = "full", decoder = "light"}. A tower's
policy may change once or more with depth: "light:12,full" is light in the first 12 blocks and full in the others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

POLICIES = ("none", "light", "full")  # from the most bytes kept to the fewest
AUTO = "auto"  # chosen before the run by `fastvst.train.recompute`
TOWERS = ("vision", "decoder")

Recompute = str | Mapping[str, str]


def of_tower(recompute: Recompute, tower: str) -> str:
    """The policy of a tower.

    Raises:
        ValueError: the mapping has other keys than TOWERS; the message has the allowed ones.
    """
    if isinstance(recompute, str):
        return recompute
    unknown = sorted(set(recompute) - set(TOWERS))
    if unknown:
        raise ValueError(f"recompute names {unknown}; the towers are {list(TOWERS)}")
    return recompute.get(tower, AUTO)


@functools.cache
def of_blocks(policy: str, depth: int) -> tuple[str, ...]:
    """The policy of each of `depth` blocks.

    Raises:
        ValueError: the text is no policy, or names more blocks than there are.
    """
    counted, rest = _parse(policy)
    found = [name for name, count in counted for _ in range(min(count, depth + 1))]
    if len(found) > depth:
        raise ValueError(f"recompute is {policy!r}, which names more blocks than the {depth} of the tower")
    return (*found, *[rest] * (depth - len(found)))


def check(recompute: Recompute) -> None:
    """Raise ValueError for a policy that no model has; "auto" is one."""
    for tower in TOWERS:
        policy = of_tower(recompute, tower)
        if policy != AUTO:
            _parse(policy)


def describe(recompute: Recompute) -> str:
    """One word if both towers have the same policy, else both: "vision full, decoder light:12,full"."""
    vision, decoder = (of_tower(recompute, tower) for tower in TOWERS)
    return vision if vision == decoder else f"vision {vision}, decoder {decoder}"


def _parse(policy: str) -> tuple[list[tuple[str, int]], str]:
    """[(policy, number of blocks)] of the first blocks, and the policy of the others."""
    *counted, rest = policy.split(",")
    parts = [part.partition(":") for part in counted]
    names = [name for name, _, _ in parts] + [rest]
    if not all(name in POLICIES for name in names) or not all(n.isascii() and n.isdigit() for _, _, n in parts):
        raise ValueError(
            f"recompute is {policy!r}; expected one of {POLICIES}, 'auto', or a text such as 'light:12,full' (light "
            "in the first 12 blocks, full in the others)"
        )
    return [(name, int(count)) for name, _, count in parts], rest
