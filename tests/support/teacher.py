"""Teacher forcing: what the trainer says of tokens that an engine drew."""

from __future__ import annotations

import torch

from fastvst.batch import EncodedSample, completion_sample, pack_groups
from fastvst.model import Qwen25VL
from fastvst.rollout import Rollout
from fastvst_kernels import linear_logprobs


def teacher_forced(
    model: Qwen25VL, samples: list[EncodedSample], rollouts: list[list[Rollout]], *, shared: bool
) -> torch.Tensor:
    """The trainer's log-probabilities of all answers, in order, from one pack.

    shared: prompts once with their answers as groups, else each answer behind its own copy of the prompt.
    """
    groups = [
        (sample, [completion_sample(sample, torch.tensor(r.tokens)) for r in many])
        for sample, many in zip(samples, rollouts, strict=True)
    ]
    batch = pack_groups(groups, shared=shared).to(model.head_weight.device)
    hidden = model(batch)
    return linear_logprobs(hidden[batch.loss_rows], model.head_weight, batch.targets)[0]
