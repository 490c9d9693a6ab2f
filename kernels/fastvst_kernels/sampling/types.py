"""The arguments of `sample_tokens` as one object, and what its kernels read and write."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Sampled = tuple[Tensor, Tensor, Tensor]  # what `sample_tokens` returns


@dataclass(frozen=True)
class Filters:
    """The rows (c,) int64 that have filters, and their top_k (c,) int64, top_p (c,) and min_p (c,) float32."""

    rows: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True)
class SamplingInputs:
    """The tensors of `sample_tokens`, under its names."""

    hidden: Tensor
    weight: Tensor
    seeds: Tensor
    steps: Tensor
    temperature: Tensor | None
    forbidden: Tensor | None
    penalty: Tensor | None
    seen: Tensor | None
    filtered: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None

    @property
    def filters(self) -> Filters | None:
        """None where no row has filters."""
        if self.filtered is None or self.top_k is None or self.top_p is None or self.min_p is None:
            return None
        return Filters(self.filtered, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class KernelInputs:
    """Contiguous inputs as the kernels read them. An input that was not given is a pointer that no kernel reads."""

    hidden: Tensor
    weight: Tensor
    seeds: Tensor
    steps: Tensor
    temperature: Tensor
    forbidden: Tensor
    penalty: Tensor
    seen: Tensor
    stride_seen: int
    flags: dict[str, int | bool]


@dataclass(frozen=True)
class KernelResults:
    """tokens (B,) int64; own, raw log-probabilities and logsumexp of the logits as they are, (B,) float32."""

    tokens: Tensor
    own: Tensor
    raw: Tensor
    lse: Tensor
