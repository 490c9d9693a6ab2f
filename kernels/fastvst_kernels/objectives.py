"""Policy objectives for `linear_policy_loss`: the loss of one token, in plain PyTorch on vectors.

An objective takes log-probabilities, never logits. The fused LM head differentiates it on the vectors of a chunk and
applies the chain rule through the softmax. A new objective takes a few lines:

    @dataclass(frozen=True)
    class Tempered(Objective):
        power: float = 0.5

        def surrogate(self, ratio, logprobs, advantages):
            return -advantages * ratio.pow(self.power) / self.power

KL, entropy and importance weights come from `Objective.loss`; override `loss` itself to have none of them.

Published objectives and their classes; the caller computes the advantages (group mean and deviation, leave-one-out):

| paper | class | what differs |
| --- | --- | --- |
| GRPO, arXiv 2402.03300 | `GRPO` | clipped ratio, mean over the tokens of a completion, then over completions |
| DAPO, arXiv 2503.14476 | `DAPO` | clip_high 0.28, mean over all tokens of the global batch |
| Dr.GRPO, arXiv 2503.20783 | `DrGRPO` | sum over tokens / (completions * max_length) |
| GSPO, arXiv 2507.18071 | `GSPO` | ratio of the whole completion, normalised by length; sequence_ids and two passes |
| CISPO, arXiv 2506.13585 | `CISPO` | truncated ratio as a constant weight of -A log p: no token loses its gradient |
| SAPO, arXiv 2511.20347 | `SAPO` | a sigmoid gate instead of a clip, steeper for negative advantages |
| RLOO, arXiv 2402.14740 | `Reinforce` | -A log p, with leave-one-out advantages |
| REINFORCE++, arXiv 2501.03262 | `GRPO(normalise="token")` | with advantages normalised over the global batch |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastvst_kernels.shared.sequence_sums import dense_ids, sequence_mean, sequence_sum

LOG_LIMIT = 20.0  # bound of log-ratios before exp, as in verl: exp(1e4) is inf, which turns a KL term into 0 * inf
KL_ESTIMATORS = ("none", "k1", "k2", "k3")
NORMALISATIONS = ("token", "sequence", "constant")


@dataclass(frozen=True)
class Importance:
    """Weights for completions from a rollout engine whose probabilities differ from the trainer's.

    w = exp(old - sampler), detached, multiplies the policy term (not KL or entropy). A sampler log-probability that is
    NaN (the engine did not return it) counts as no difference.

    Attributes:
        level: "token"; "sequence": the sum of the log-ratios over the completion; "geometric": their mean.
        mode: "truncate" clamps w to [low, high]; "mask" sets w to 0 outside of [low, high].
        low, high: the bounds.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        _choose("level", self.level, ("token", "sequence", "geometric"))
        _choose("mode", self.mode, ("truncate", "mask"))
        if not 0 <= self.low < self.high:
            raise ValueError(f"importance bounds are {self.low} and {self.high}; expected 0 <= low < high")

    def weights(self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_ids: Tensor | None) -> Tensor:
        """(m,) detached weights; the levels "sequence" and "geometric" need `sequence_ids` (m,)."""
        difference = (old_logprobs - sampler_logprobs).detach()
        difference = torch.where(difference.isnan(), 0.0, difference)
        if self.level != "token":
            assert sequence_ids is not None
            reduce = sequence_sum if self.level == "sequence" else sequence_mean
            difference = reduce(difference, sequence_ids)
        weights = _bounded(difference).exp()
        if self.mode == "truncate":
            return weights.clamp(self.low, self.high)
        return torch.where((weights >= self.low) & (weights <= self.high), weights, 0.0)


@dataclass(frozen=True)
class Objective:
    """What all objectives share. The base class itself is PPO's clipped ratio (arXiv 1707.06347 eq. 7).

    Attributes:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: for A < 0 the loss is at most dual_clip * |A| (arXiv 1912.09729); None = no bound.
        kl: "none", "k1", "k2", "k3": the estimator of KL(policy || reference) that is added to the loss (J. Schulman,
            "Approximating KL divergence", 2020). On samples from the policy the gradient of k1 has expectation zero and
            that of k2 is the gradient of the KL.
        kl_coef: factor of the KL term, used when kl is not "none".
        entropy_coef: adds -entropy_coef * entropy to the loss: above 0 a bonus, below 0 a penalty; its gradient is
            exact.
        normalise: the normaliser that `row_weights` computes: "token", "sequence" or "constant".
        max_length: the longest completion, which "constant" divides by.
        importance: importance weights that correct for the rollout engine's probabilities, or None.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl: str = "none"
    kl_coef: float = 0.01
    entropy_coef: float = 0.0
    normalise: str = "token"
    max_length: int | None = None
    importance: Importance | None = None

    # True: `log_ratio` mixes the tokens of a sequence, so the head needs sequence_ids and computes logits twice.
    sequence_level: ClassVar[bool] = False
    # True: where the advantage is 0 the surrogate and its gradient are 0 for any policy, so the head may skip such rows
    # before any product. False by default: a new objective has to state it.
    skips_zero_advantage: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _choose("kl", self.kl, KL_ESTIMATORS)
        _choose("normalise", self.normalise, NORMALISATIONS)
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(f"clip_low is {self.clip_low}, clip_high {self.clip_high}; expected both >= 0")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(f"dual_clip is {self.dual_clip}; expected more than 1 + clip_high = {1 + self.clip_high}")
        if self.normalise == "constant" and not self.max_length:
            raise ValueError("normalise='constant' divides by max_length; give max_length, the longest completion")

    @property
    def uses_entropy(self) -> bool:
        """Whether the loss depends on the entropy (the head then computes its gradient)."""
        return self.entropy_coef != 0

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the reference policy's log-probabilities."""
        return self.kl != "none" and self.kl_coef != 0

    def log_ratio(self, logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor | None) -> Tensor:
        """(m,) log of the ratio of current and old policy, bounded to +-LOG_LIMIT."""
        return _bounded(logprobs - old_logprobs)

    def surrogate(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """The policy term of each token, (m,), which training minimises."""
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        if self.dual_clip is None:
            return loss
        return torch.where(advantages < 0, torch.minimum(loss, -advantages * self.dual_clip), loss)

    def clipped(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(m,) bools for the statistics: clipped below, clipped above, at the dual clip."""
        low = (ratio < 1 - self.clip_low) & (advantages < 0)
        high = (ratio > 1 + self.clip_high) & (advantages > 0)
        if self.dual_clip is None:
            return low, high, torch.zeros_like(low)
        return low, high, (ratio > self.dual_clip) & (advantages < 0)

    def loss(
        self,
        logprobs: Tensor,
        *,
        old_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        advantages: Tensor,
        entropy: Tensor,
        importance: Tensor | None,
        sequence_ids: Tensor | None,
    ) -> Tensor:
        """Loss of each token.

        Args:
            logprobs: (m,) of the current policy, differentiable.
            old_logprobs, ref_logprobs, advantages: (m,) constants; old_logprobs is `logprobs.detach()` on the first
                update.
            entropy: (m,), differentiable when `uses_entropy`.
            importance: (m,) constant weights or None.
            sequence_ids: (m,) or None.

        Returns:
            (m,); the head sums row_weights * loss. The loss of a token must not depend on other tokens unless
            `sequence_level` is True, because the head computes it for one chunk at a time.
        """
        ratio = self.log_ratio(logprobs, old_logprobs, sequence_ids).exp()
        loss = self.surrogate(ratio, logprobs, advantages)
        if importance is not None:
            loss = loss * importance
        if self.uses_reference:
            assert ref_logprobs is not None
            loss = loss + self.kl_coef * kl_estimate(logprobs, ref_logprobs, self.kl)
        if self.uses_entropy:
            loss = loss - self.entropy_coef * entropy
        return loss

    def row_weights(
        self,
        mask: Tensor,
        sequence_ids: Tensor | None = None,
        *,
        tokens: float | Tensor | None = None,
        sequences: float | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The normaliser of this objective as `row_weights` for the head.

        Args:
            mask: (M,) bool, the tokens of completions.
            sequence_ids: (M,) integers, needed by "sequence".
            tokens, sequences: completion tokens and completions of the *global* batch (all ranks and micro-steps).
                None: those of this call; `sequences` is then counted from sequence_ids.

        Returns:
            (M,) of `dtype`, 0 outside the mask. Their sum over ranks and micro-steps is 1, except for "constant".
        """
        weights = mask.to(dtype)
        if self.normalise == "token":
            return weights / (weights.sum().clamp(min=1) if tokens is None else tokens)
        if sequences is None or self.normalise == "sequence":
            if sequence_ids is None:
                raise ValueError(f"normalise={self.normalise!r} needs sequence_ids")
            share = weights / sequence_sum(weights, dense_ids(sequence_ids)).clamp(min=1)
            sequences = share.sum().round().clamp(min=1) if sequences is None else sequences
        if self.normalise == "sequence":
            return share / sequences
        assert self.max_length is not None
        return weights / (sequences * self.max_length)


@dataclass(frozen=True)
class GRPO(Objective):
    """Group-relative policy optimisation, arXiv 2402.03300."""

    normalise: str = "sequence"
    skips_zero_advantage: ClassVar[bool] = True


@dataclass(frozen=True)
class DAPO(Objective):
    """GRPO with a higher upper clip and the mean over tokens, arXiv 2503.14476."""

    clip_high: float = 0.28
    skips_zero_advantage: ClassVar[bool] = True


@dataclass(frozen=True)
class DrGRPO(Objective):
    """GRPO without its length bias, arXiv 2503.20783: sum over tokens / (completions * max_length)."""

    normalise: str = "constant"
    max_length: int | None = 2048
    skips_zero_advantage: ClassVar[bool] = True


@dataclass(frozen=True)
class GSPO(Objective):
    """The ratio of a sequence: exp(mean over its tokens of log p - log p_old), arXiv 2507.18071.

    The clip range is the paper's. A token's gradient depends on all tokens of its completion, so the head makes two
    passes: the log-probabilities of all rows first, then logits again with the gradients (8 M H V operations).
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    normalise: str = "sequence"
    sequence_level: ClassVar[bool] = True
    skips_zero_advantage: ClassVar[bool] = True

    def log_ratio(self, logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor | None) -> Tensor:
        assert sequence_ids is not None
        return _bounded(sequence_mean(logprobs - old_logprobs, sequence_ids))


@dataclass(frozen=True)
class CISPO(Objective):
    """-sg(clip(ratio)) A log p, arXiv 2506.13585. TRL's `epsilon_high` is 1 + clip_high; no lower bound."""

    clip_low: float = 1.0
    clip_high: float = 4.0
    skips_zero_advantage: ClassVar[bool] = True

    def surrogate(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return -ratio.clamp(1 - self.clip_low, 1 + self.clip_high).detach() * advantages * logprobs

    def clipped(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = ratio < 1 - self.clip_low
        high = ratio > 1 + self.clip_high
        return low, high, torch.zeros_like(low)


@dataclass(frozen=True)
class SAPO(Objective):
    """-A * 4/t * sigmoid(t * (ratio - 1)), arXiv 2511.20347; t depends on the sign of A. Nothing is clipped."""

    temperature_positive: float = 1.0
    temperature_negative: float = 1.05
    normalise: str = "sequence"
    skips_zero_advantage: ClassVar[bool] = True

    def surrogate(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        positive, negative = (torch.full_like(ratio, t) for t in (self.temperature_positive, self.temperature_negative))
        steep = torch.where(advantages > 0, positive, negative)
        return -advantages * torch.sigmoid(steep * (ratio - 1)) * (4 / steep)

    def clipped(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros_like(ratio, dtype=torch.bool)
        return none, none, none


@dataclass(frozen=True)
class Reinforce(Objective):
    """-A log p: RLOO and other on-policy gradients (arXiv 2402.14740). The ratio enters only the statistics."""

    skips_zero_advantage: ClassVar[bool] = True

    def surrogate(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return -advantages * logprobs

    def clipped(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros_like(ratio, dtype=torch.bool)
        return none, none, none


def kl_estimate(logprobs: Tensor, other: Tensor, kind: str) -> Tensor:
    """(m,) estimate of KL(p || other) on samples of p: k1 = log p - log o, k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1.

    Only the k3 estimate takes an exponential, so only its log-ratio is bounded to +-LOG_LIMIT. verl also bounds the
    result of k3 to +-10; TRL bounds nothing.
    """
    difference = other - logprobs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        difference = _bounded(difference)
        return difference.exp() - difference - 1
    raise ValueError(f"kl estimator is {kind!r}; expected one of {KL_ESTIMATORS[1:]}")


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT)


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {choices}")
