"""From groups to packs: each prompt is packed once for all of its completions, with the inputs of the policy loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvst.batch import EncodedSample, PackedBatch, completion_sample, empty_sample, pack, pack_groups
from fastvst.model.config import ModelConfig
from fastvst.model.flops import TRAINING, decoder_flops, head_flops
from fastvst_kernels.shared.tensors import send


@dataclass(frozen=True)
class Answer:
    """One completion of a group.

    Attributes:
        tokens: (R,) int32, with the EOS token if the model produced one. An empty completion has no gradient.
        logprobs: (R,) float32, the sampler's log-probabilities under the distribution that it sampled from.
        advantage: of the whole completion.
    """

    tokens: Tensor
    logprobs: Tensor
    advantage: float = 0.0

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Group:
    """An encoded prompt with its images, and the completions that were sampled for it.

    Attributes:
        number: of the prompt in the order of the data; minibatches are dealt by it.
    """

    prompt: EncodedSample
    answers: tuple[Answer, ...]
    number: int = 0

    @property
    def completion_tokens(self) -> int:
        return sum(len(c) for c in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens of the group in a pack: the prompt once, and all completions."""
        return len(self.prompt) + self.completion_tokens

    @property
    def is_zero_variance(self) -> bool:
        """Every advantage is 0, so the group has no policy gradient."""
        return all(c.advantage == 0.0 for c in self.answers)


@dataclass(frozen=True)
class PolicyPack:
    """A packed batch and the loss inputs of its M target tokens.

    Attributes:
        batch: the packed row.
        advantages: (M,) float32.
        rollout_logprobs: (M,) float32, of the sampler.
        sequence_ids: (M,) int64, 0..A-1, the completion that a target belongs to.
        groups: number of groups (or pieces of groups) in the pack.
        row_weights: (M,) float32, the weight of each target in the loss of the whole minibatch.
        old_logprobs: (M,) float32 or None, of the trainer's weights before the first optimizer step.
        ref_logprobs: (M,) float32 or None, of the reference model.
        vision: merged vision tokens of an earlier pass, if the vision tower is frozen.
    """

    batch: PackedBatch
    advantages: Tensor
    rollout_logprobs: Tensor
    sequence_ids: Tensor
    groups: int
    row_weights: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    vision: Tensor | None = None

    def to(self, device: torch.device | str) -> PolicyPack:
        """The same pack on a device; no copy to a GPU waits for its queued work."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: send(x, device) for name, x in values.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, batch=send(self.batch, device), **moved)


@dataclass(frozen=True)
class Sharing:
    """Counts of packs with shared prompts; instances can be added.

    Attributes:
        shared: tokens of the packs.
        repeated: tokens that the packs would have with each prompt repeated for every completion.
        pieces: groups and pieces of groups in the packs.
        groups: groups that the pieces come from.
        split: groups that did not fit into one pack, so that their prompt is computed more than once.
        packs: number of packs.
    """

    shared: int = 0
    repeated: int = 0
    pieces: int = 0
    groups: int = 0
    split: int = 0
    packs: int = 0

    def __add__(self, other: Sharing) -> Sharing:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Sharing(*(a + b for a, b in pairs))


def divide_into_packs(
    groups: Sequence[Group], budget: int, *, shared: bool = True
) -> tuple[list[list[Group]], Sharing]:
    """Divide groups into packs of at most `budget` tokens.

    1. Empty completions are left out, and groups that have no other.
    2. A group that does not fit into a pack is split into pieces, each with the prompt. With `shared=False` each
       completion is a piece of its own.
    3. First fit, longest first. A completion that is longer than the budget with its prompt gets its own pack.

    Returns:
        (packs, each a list of groups or pieces; what sharing saves).
    """
    pieces, sharing = divide_into_pieces(groups, budget, shared=shared)
    packs = pack_pieces(pieces, budget)
    return packs, dataclasses.replace(sharing, packs=len(packs))


def divide_into_pieces(groups: Sequence[Group], budget: int, *, shared: bool = True) -> tuple[list[Group], Sharing]:
    """The groups, split where they do not fit into a pack: the first two points of `divide_into_packs`.

    Returns:
        (pieces; what sharing saves, with 0 packs).
    """
    pieces: list[Group] = []
    used = 0
    split = 0
    repeated = 0
    for group in groups:
        completions = [c for c in group.answers if len(c)]
        if not completions:
            continue
        parts = _split(group, completions, budget if shared else 0)
        pieces += parts
        used += 1
        split += shared and len(parts) > 1
        repeated += sum(len(group.prompt) + len(c) for c in completions)
    tokens = sum(piece.tokens for piece in pieces)
    return pieces, Sharing(tokens, repeated, pieces=len(pieces), groups=used, split=split)


def pack_pieces(pieces: Sequence[Group], budget: int) -> list[list[Group]]:
    """Packs of pieces: first fit, longest first."""
    members = _first_fit([piece.tokens for piece in pieces], budget)
    return [[pieces[i] for i in sorted(chosen)] for chosen in members]


def _split(group: Group, completions: Sequence[Answer], budget: int) -> list[Group]:
    """Pieces of consecutive completions that fit into `budget` tokens with the prompt; each has at least one."""
    prompt = group.prompt
    runs: list[list[Answer]] = []
    used = 0
    for completion in completions:
        length = len(completion)
        if not runs or len(prompt) + used + length > budget:
            runs.append([])
            used = 0
        runs[-1].append(completion)
        used += length
    return [dataclasses.replace(group, answers=tuple(run)) for run in runs]


def _first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices for each pack: the largest first, each into the first pack with enough room, else into a new one."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((p for p, free in enumerate(room) if free >= sizes[index]), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place].append(index)
        room[place] -= sizes[index]
    return packs


def make_pack(groups: Sequence[Group], config: ModelConfig, *, shared: bool = True) -> PolicyPack:
    """The pack of some groups, on the CPU.

    Without groups the pack has one unsupervised token: a rank with fewer packs than the others computes it, so that
    every rank joins every collective.
    """
    if not groups:
        none = torch.zeros(0)
        return PolicyPack(pack([empty_sample()]), none, none, none.long(), 0)
    encoded = [(g.prompt, [_encode(g.prompt, c, config) for c in g.answers]) for g in groups]
    completions = [c for g in groups for c in g.answers]
    lengths = torch.tensor([len(c) for c in completions])
    return PolicyPack(
        batch=pack_groups(encoded, shared=shared),
        advantages=torch.repeat_interleave(torch.tensor([c.advantage for c in completions]), lengths),
        rollout_logprobs=torch.cat([c.logprobs.float() for c in completions]),
        sequence_ids=torch.repeat_interleave(torch.arange(len(completions)), lengths),
        groups=len(groups),
    )


def _encode(prompt: EncodedSample, completion: Answer, config: ModelConfig) -> EncodedSample:
    """A completion as a sequence of its own.

    Its FLOPs are the training FLOPs that it adds to its prompt: causal attention over both, and the LM head.
    """
    length = len(completion)
    flops = TRAINING * (decoder_flops(config, [length], [len(prompt)]) + head_flops(config, length))
    return completion_sample(prompt, completion.tokens, flops=flops)
