"""On-line packing: fills packs of a fixed token budget from a bounded buffer, equal in FLOPs and in vision patches.

A *step* is all the packs that the ranks process between two optimizer updates (world size x accumulation). The packs of
a step are planned together, because the slowest rank sets the pace: packing by tokens alone leaves the vision tower
unbalanced (a pack of text waits for a pack of images), packing by images alone leaves attention unbalanced. No sample
is ever cut, and no separate pass over the data counts tokens.

The plan of a step, in three parts:
1. bulk: the oldest samples, 80 to 97 % of the step's tokens, heaviest first, each to the pack that it unbalances least;
2. targets: every pack should end with the same patches and FLOPs (those of the buffer's average, or of the heaviest
   pack if one sample alone is above it);
3. refinement: the worst pack drops at most one sample and takes at most one from the buffer, with the move that brings
   it nearest to the targets, until all packs are within tolerance.

Taking the bulk in order of arrival keeps waiting short; the refinement corrects it. The oldest `packs_per_step` samples
are always placed and never dropped, so with n samples in the buffer none waits longer than n / packs_per_step steps.
One imbalance remains: a sample that fills a pack alone has more attention FLOPs than a pack of short samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastvst.batch import Cost
from fastvst.config import check_at_least

BULK_SAMPLES = 4  # the bulk leaves room for this many average samples in every pack ...
BULK_ROOM = (0.03, 0.2)  # ... but at least and at most these shares of the budget
FILL_TOLERANCE = 0.005  # a pack is within tolerance if at most this share of its budget is empty ...
BALANCE_TOLERANCE = 0.02  # ... and its patches and FLOPs are this close to the step's targets
WINDOW = 256  # oldest waiting samples that a move considers (or 8 per pack); 512 improve balance by less than 0.2 %
UNIT_PATCHES = 4  # patches merged into one LLM token (2 x 2)


@dataclass(frozen=True)
class PackingConfig:
    """How packs are made.

    Attributes:
        tokens_per_pack: most LLM tokens in one pack; a longer sample is rejected ("too_long").
        buffer_samples: least number of samples from which a step is chosen.
        buffer_steps: least number of steps' tokens from which a step is chosen.
    """

    tokens_per_pack: int = 16384
    buffer_samples: int = 512
    buffer_steps: float = 3.0

    def __post_init__(self) -> None:
        check_at_least(
            1,
            tokens_per_pack=self.tokens_per_pack,
            buffer_samples=self.buffer_samples,
            buffer_steps=self.buffer_steps,
        )


@dataclass
class Packer:
    """A bounded buffer of items with their costs, and steps planned from it. Deterministic: the buffer is the state."""

    config: PackingConfig
    packs_per_step: int
    items: list[Any] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    tokens: int = 0  # of all items in the buffer

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Any, cost: Cost) -> None:
        """Add one sample to the buffer. Raises ValueError if it is longer than a pack."""
        if cost.tokens > self.config.tokens_per_pack:
            raise ValueError(f"a sample of {cost.tokens} tokens cannot fit a pack of {self.config.tokens_per_pack}")
        self.items.append(item)
        self.costs.append(cost)
        self.tokens += cost.tokens

    @property
    def needs_samples(self) -> bool:
        """True while the buffer is too small to plan a step from."""
        step = self.config.tokens_per_pack * self.packs_per_step
        return len(self.items) < self.config.buffer_samples or self.tokens < self.config.buffer_steps * step

    def plan(self) -> tuple[list[list[Any]], np.ndarray]:
        """Plan one step and remove its samples from the buffer.

        At the end of a stream the buffer holds less than a step; its samples are spread evenly, and packs may be empty.

        Returns:
            `packs_per_step` lists of items, in order of arrival inside a pack, and the packs' loads, a
            (packs_per_step, 3) float64 array of tokens, patches and FLOPs.
        """
        costs = np.array([(c.tokens, c.patches, c.flops) for c in self.costs], dtype=np.float64).reshape(-1, 3)
        packs = plan_step(costs, self.packs_per_step, self.config.tokens_per_pack)
        loads = np.array([costs[pack].sum(axis=0) for pack in packs])
        taken = {index for pack in packs for index in pack}
        chosen = [[self.items[index] for index in pack] for pack in packs]
        self.tokens -= int(loads[:, 0].sum())
        self.items = [item for index, item in enumerate(self.items) if index not in taken]
        self.costs = [cost for index, cost in enumerate(self.costs) if index not in taken]
        return chosen, loads


def plan_step(costs: np.ndarray, packs: int, budget: int) -> list[list[int]]:
    """Choose the samples of one step and distribute them.

    Args:
        costs: (N, 3) float64 tokens, patches, FLOPs of the samples in order of arrival; every one has tokens <= budget.
        packs: packs to make.
        budget: LLM tokens that a pack may hold.

    Returns:
        `packs` disjoint lists of ascending indices into `costs`. They contain all N samples if these are too few to
        fill the step.
    """
    if not len(costs):
        return [[] for _ in range(packs)]
    shares = _shares_of_average_pack(costs, budget)
    bulk = packs * (1 - float(np.clip(BULK_SAMPLES * shares[:, 0].mean(), *BULK_ROOM)))
    is_last = shares[:, 0].sum() <= bulk or len(shares) <= packs
    count = len(shares) if is_last else max(packs, int(np.searchsorted(np.cumsum(shares[:, 0]), bulk)))
    owner, load = _place_bulk(shares, packs, count)
    if not is_last:
        target = np.maximum(load.max(axis=0), 1.0)
        target[0] = 1.0
        _refine(shares, owner, load, target)
    return [np.flatnonzero(owner == pack).tolist() for pack in range(packs)]


def _shares_of_average_pack(costs: np.ndarray, budget: int) -> np.ndarray:
    """(N, 3) costs in units of a full pack with the buffer's average patches and FLOPs per token."""
    totals = costs.sum(axis=0)
    shares = costs / (np.where(totals > 0, totals, 1.0) / max(totals[0], 1.0) * budget)
    shares[:, totals == 0] = shares[:, :1]  # nothing to balance (e.g. text only): use the tokens
    return shares


def _place_bulk(shares: np.ndarray, packs: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Place the first `count` samples: the `packs` oldest first, then the heaviest, each where the pack stays lightest.

    Returns:
        (N,) pack of each sample, or -1, and the (packs, 3) loads of the packs.
    """
    load = np.zeros((packs, 3))
    owner = np.full(len(shares), -1)
    heaviest = np.argsort(-shares[packs:count].max(axis=1), kind="stable") + packs
    for index in [*range(min(packs, count)), *heaviest.tolist()]:
        after = load + shares[index]
        worst = after.max(axis=1)
        worst[after[:, 0] > 1 + 1e-9] = np.inf
        pack = int(np.argmin(worst))
        if worst[pack] < np.inf:
            owner[index] = pack
            load[pack] = after[pack]
    return owner, load


def _refine(shares: np.ndarray, owner: np.ndarray, load: np.ndarray, target: np.ndarray) -> None:
    """Exchange samples with the buffer until every pack is near `target`. Changes `owner` and `load` in place."""
    packs = len(load)
    stuck = np.zeros(packs, dtype=bool)
    nothing = np.zeros((1, 3))
    for _ in range(8 * packs + 64):
        error = _error(load, target)
        error[stuck] = 0.0
        pack = int(np.argmax(error))
        if error[pack] <= 0:
            break
        inside = np.flatnonzero(owner == pack)
        inside = inside[inside >= packs]  # the oldest samples stay, so that none waits for ever
        waiting = np.flatnonzero(owner < 0)[: max(WINDOW, 8 * packs)]
        leave = np.concatenate([nothing, shares[inside]])
        enter = np.concatenate([nothing, shares[waiting]])
        after = load[pack] - leave[:, None, :] + enter[None, :, :]
        scores = _error(after, target)
        scores[after[..., 0] > 1 + 1e-9] = np.inf
        i, j = divmod(int(np.argmin(scores)), len(enter))
        if scores[i, j] >= error[pack] - 1e-4:
            stuck[pack] = True
            continue
        if i:
            owner[inside[i - 1]] = -1
        if j:
            owner[waiting[j - 1]] = pack
        load[pack] = after[i, j]


def _error(load: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Distance of the loads (..., 3) from full and balanced packs; 0 within tolerance."""
    off = np.abs(load / target - 1)
    empty = np.maximum(off[..., 0] - FILL_TOLERANCE, 0)
    return empty + np.maximum(off[..., 1] - BALANCE_TOLERANCE, 0) + np.maximum(off[..., 2] - BALANCE_TOLERANCE, 0)


@dataclass
class PackingReport:
    """How well the packs were filled and balanced so far. `str()` is the line that the training script prints.

    Attributes:
        steps, packs, samples: how many there were.
        tokens, capacity: LLM tokens in the packs, and the most that the packs can hold.
        patches: vision patches in the packs.
        patch_imbalance, flop_imbalance: sum over steps of max / mean over the packs of the step.
        worst_patch_imbalance, worst_flop_imbalance: the largest max / mean of a single step.
    """

    steps: int = 0
    packs: int = 0
    samples: int = 0
    tokens: int = 0
    capacity: int = 0
    patches: int = 0
    patch_imbalance: float = 0.0
    flop_imbalance: float = 0.0
    worst_patch_imbalance: float = 1.0
    worst_flop_imbalance: float = 1.0

    def add(self, loads: np.ndarray, samples: int, budget: int) -> None:
        """Count one step: loads (packs, 3) of tokens, patches, FLOPs, as `Packer.plan` returns them."""
        tokens, patches, _ = loads.sum(axis=0)
        patch_imbalance = imbalance(loads[:, 1])
        flop_imbalance = imbalance(loads[:, 2])
        self.steps += 1
        self.packs += len(loads)
        self.samples += samples
        self.tokens += int(tokens)
        self.patches += int(patches)
        self.capacity += len(loads) * budget
        self.patch_imbalance += patch_imbalance
        self.flop_imbalance += flop_imbalance
        self.worst_patch_imbalance = max(self.worst_patch_imbalance, patch_imbalance)
        self.worst_flop_imbalance = max(self.worst_flop_imbalance, flop_imbalance)

    @property
    def fill(self) -> float:
        """Share of the token budget that holds tokens."""
        return self.tokens / max(self.capacity, 1)

    @property
    def vision_share(self) -> float:
        """Share of the LLM tokens that are vision tokens."""
        return self.patches / UNIT_PATCHES / max(self.tokens, 1)

    def __str__(self) -> str:
        steps = max(self.steps, 1)
        return (
            f"packing: fill {self.fill:.1%}, vision {self.vision_share:.0%} of tokens, "
            f"{self.samples / max(self.packs, 1):.1f} samples/pack, max/mean over packs of a step: "
            f"patches {self.patch_imbalance / steps:.3f} (worst {self.worst_patch_imbalance:.3f}), "
            f"FLOPs {self.flop_imbalance / steps:.3f} (worst {self.worst_flop_imbalance:.3f})"
        )


def imbalance(values: Sequence[float] | np.ndarray) -> float:
    """max / mean; 1.0 where all are zero."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.max() / array.mean()) if array.size and array.mean() > 0 else 1.0
