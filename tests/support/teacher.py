"""Teacher forcing: what the trainer says of tokens that an engine drew."""

from __future__ import annotations

import dataclasses

import torch

from fastvst.data.batch import Cost, EncodedSample, pack
from fastvst.model import Qwen25VL
from fastvst.rollout import Rollout
from fastvst_kernels import linear_logprobs


def answer_sample(tokens: list[int], position: int) -> EncodedSample:
    """An answer as a sequence of its own behind a shared prompt, as RL packs it."""
    ids, empty = torch.tensor(tokens, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    return EncodedSample(
        tokens=ids, labels=ids, positions=(position + torch.arange(len(tokens))).expand(3, -1).int(),
        patches=torch.zeros(0, 1176), grid=empty.view(0, 3), vision_slots=empty, window_order=empty,
        window_lengths=empty, image_lengths=empty, vision_positions=empty.view(0, 2), cost=Cost(len(tokens), 0, 0.0),
    )  # fmt: skip


def teacher_forced(
    model: Qwen25VL, samples: list[EncodedSample], rollouts: list[list[Rollout]], *, shared: bool
) -> torch.Tensor:
    """The trainer's log-probabilities of all answers, in order, from one pack.

    shared: prompts once with their answers as groups, else each answer behind its own copy of the prompt.
    """
    sequences, groups = [], []
    for sample, many in zip(samples, rollouts, strict=True):
        prompt = dataclasses.replace(sample, labels=torch.full_like(sample.labels, -100))
        position = int(sample.positions.max()) + 1
        answers = [answer_sample(r.tokens, position) for r in many]
        if shared:
            groups += [-1] + [len(sequences)] * len(answers)
            sequences += [prompt, *answers]
            continue
        for answer in answers:
            joined = {
                name: torch.cat([getattr(prompt, name), getattr(answer, name)], dim=-1)
                for name in ("tokens", "labels", "positions")
            }
            sequences.append(dataclasses.replace(prompt, **joined))
    batch = pack(sequences, groups=groups if shared else None).to(model.head_weight.device)
    hidden = model(batch)
    return linear_logprobs(hidden[batch.loss_rows], model.head_weight, batch.targets)[0]
