"""Teacher forcing: the trainer's log-probabilities of tokens that an engine sampled."""

from __future__ import annotations

import torch

from fastvst.batch import EncodedSample, completion_sample, pack_groups
from fastvst.model import Qwen25VL
from fastvst.rollout import Rollout
from fastvst_kernels import linear_logprobs


def teacher_forced(
    model: Qwen25VL, samples: list[EncodedSample], rollouts: list[list[Rollout]], *, shared: bool
) -> torch.Tensor:
    """(N,) log-probabilities of the tokens of all completions, in order, from one pack.

    Args:
        shared: whether the completions of a prompt share one copy of it, instead of each having its own.
    """
    groups = [
        (sample, [completion_sample(sample, torch.tensor(r.tokens)) for r in many])
        for sample, many in zip(samples, rollouts, strict=True)
    ]
    batch = pack_groups(groups, shared=shared).to(model.head_weight.device)
    hidden = model(batch)
    return linear_logprobs(hidden[batch.loss_rows], model.head_weight, batch.targets)[0]
