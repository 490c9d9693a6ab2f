"""From rollouts to packs: groups of answers, each with its prompt once, and what every target token carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvst.batch import EncodedSample, PackedBatch, answer_sample, pack, pack_groups
from fastvst.data.loader import empty_sample
from fastvst.model.config import ModelConfig
from fastvst.model.flops import TRAINING, decoder_flops, head_flops


@dataclass(frozen=True)
class Answer:
    """One answer of a group.

    Attributes:
        tokens: (R,) int32, the end token included where the model wrote one. Empty answers have no gradient.
        logprobs: (R,) float32 of the sampler, under the distribution that it sampled from.
        advantage: of the whole answer.
    """

    tokens: Tensor
    logprobs: Tensor
    advantage: float = 0.0


@dataclass(frozen=True)
class Group:
    """A prompt, encoded with its pictures, and the answers that were sampled for it."""

    prompt: EncodedSample
    answers: tuple[Answer, ...]

    @property
    def answer_tokens(self) -> int:
        return sum(a.tokens.shape[0] for a in self.answers)

    @property
    def is_flat(self) -> bool:
        """No answer has an advantage, so the group has no policy gradient."""
        return all(a.advantage == 0.0 for a in self.answers)


@dataclass(frozen=True)
class PolicyPack:
    """A pack and, for each of its M targets, what the loss needs.

    Attributes:
        batch: the packed row.
        advantages, sampler_logprobs: (M,) float32.
        answer_ids: (M,) int64, 0..A-1, the answer that a target belongs to.
        groups: how many groups (or pieces of groups) it holds.
        row_weights: (M,) float32, the share of each target in the loss of the whole minibatch.
        old_logprobs, ref_logprobs: (M,) float32 or None.
        vision: merged vision tokens kept from an earlier pass, when the tower is frozen.
    """

    batch: PackedBatch
    advantages: Tensor
    sampler_logprobs: Tensor
    answer_ids: Tensor
    groups: int
    row_weights: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    vision: Tensor | None = None

    def to(self, device: torch.device | str) -> PolicyPack:
        """The same pack on a device."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | PackedBatch)}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Sharing:
    """How much computing was saved by sharing prompts; adds up over packs.

    Attributes:
        shared, repeated: tokens of the packs as they are, and as they would be with every prompt repeated.
        pieces, groups: prompts in the packs, and groups that they came from.
        split: groups that did not fit into a pack, so that their prompt is computed more than once.
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


def plan(groups: Sequence[Group], budget: int, *, shared: bool = True) -> tuple[list[list[Group]], Sharing]:
    """Divide groups over packs of at most `budget` tokens: first fit, longest first.

    A group that does not fit into a pack is cut into pieces, each with the prompt. A single answer with its prompt that
    is longer than the budget gets a pack of its own. Empty answers are left out, and groups without any other.

    Returns:
        (packs, each a list of groups or pieces; what sharing saves).
    """
    counted = count_groups = split = repeated = 0
    pieces: list[Group] = []
    for group in groups:
        answers = [a for a in group.answers if a.tokens.shape[0]]
        if not answers:
            continue
        cut = _cut(len(group.prompt), answers, budget if shared else 0)
        pieces += [Group(group.prompt, tuple(part)) for part in cut]
        count_groups += 1
        split += shared and len(cut) > 1
        repeated += sum(len(group.prompt) + a.tokens.shape[0] for a in answers)
    order = sorted(range(len(pieces)), key=lambda i: (-_size(pieces[i]), i))
    packs: list[list[int]] = []
    room: list[int] = []
    for index in order:
        size = _size(pieces[index])
        place = next((p for p, free in enumerate(room) if free >= size), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place].append(index)
        room[place] -= size
        counted += size
    return [[pieces[i] for i in sorted(members)] for members in packs], Sharing(
        counted, repeated, len(pieces), count_groups, split, len(packs)
    )


def _size(group: Group) -> int:
    return len(group.prompt) + group.answer_tokens


def _cut(prompt: int, answers: Sequence[Answer], budget: int) -> list[list[Answer]]:
    """Answers in order, in runs that fit into a pack with the prompt (a run has at least one)."""
    runs: list[list[Answer]] = []
    used = 0
    for answer in answers:
        length = answer.tokens.shape[0]
        if not runs or prompt + used + length > budget:
            runs.append([])
            used = 0
        runs[-1].append(answer)
        used += length
    return runs


def make_pack(groups: Sequence[Group], config: ModelConfig, *, shared: bool = True) -> PolicyPack:
    """The pack of some groups, on the CPU; without groups one unsupervised token, which keeps ranks in step."""
    if not groups:
        none = torch.zeros(0)
        return PolicyPack(pack([empty_sample()]), none, none, none.long(), 0)
    encoded = [
        (g.prompt, [answer_sample(g.prompt, a.tokens, flops=answer_flops(config, g.prompt, a)) for a in g.answers])
        for g in groups
    ]
    answers = [a for g in groups for a in g.answers]
    lengths = torch.tensor([a.tokens.shape[0] for a in answers])
    return PolicyPack(
        batch=pack_groups(encoded, shared=shared),
        advantages=torch.repeat_interleave(torch.tensor([a.advantage for a in answers]), lengths),
        sampler_logprobs=torch.cat([a.logprobs.float() for a in answers]),
        answer_ids=torch.repeat_interleave(torch.arange(len(answers)), lengths),
        groups=len(groups),
    )


def answer_flops(config: ModelConfig, prompt: EncodedSample, answer: Answer) -> float:
    """Training FLOPs of an answer behind a prompt that is computed anyway: causal attention over both, and the head."""
    length = answer.tokens.shape[0]
    return TRAINING * (decoder_flops(config, [length], [len(prompt)]) + head_flops(config, length))
