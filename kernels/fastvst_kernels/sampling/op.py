"""Next tokens from hidden states: LM head product, temperature, filters and Gumbel noise in one operator.

Adding independent Gumbel noise to the logits and taking the largest draws from their softmax (Gumbel 1954; Maddison et
al., NIPS 2014), so one pass over the vocabulary is enough and the logits need not be kept (arXiv 2603.15854 does the
same). The noise is a hash of (the row's seed, the row's step, token): a row draws the same token in any batch. The
operator has no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.sampling.reference import sample_tokens_reference
from fastvst_kernels.sampling.types import Sampled, SamplingInputs
from fastvst_kernels.shared.backend import uses_kernel
from fastvst_kernels.shared.boundary import public_operator
from fastvst_kernels.shared.checks import FLOATS

__all__ = ["sample_tokens", "sample_tokens_op"]


@public_operator(lower=("hidden", "weight"))
def sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    temperature: Tensor | None = None,
    forbidden: Tensor | None = None,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    filtered: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    backend: str = "auto",
) -> Sampled:
    """Draw one token for each row.

    Args:
        hidden: (B, H); weight: (V, H), one floating dtype. Logits are float32 sums (float64 for float64 inputs) and are
            never rounded to 16 bits.
        seeds: (B,) int64; steps: (B,) int64, the position of the token in its completion.
        temperature: (B,) float32, 0 = the most likely token; None = 1 everywhere.
        forbidden: (f,) int64 tokens that are never drawn. In rows without filters they keep their share of the softmax.
        penalty: (B,) float32 and seen: (B, V) bool: logits of seen tokens are divided by the penalty where positive and
            multiplied where negative (arXiv 1909.05858); both or none.
        filtered: (c,) int64 rows with filters, each at most once and of a temperature above 0. Their filters, applied
            in this order: top_k (c,) int64, 1..V (V = off); top_p (c,) float32 (1 = off); min_p (c,) float32 (0 = off).
            Of equal logits at the border all stay. All four or none.
        backend: "triton", "torch" (all logits at once), or "auto": Triton on CUDA, torch on the CPU.

    Returns:
        tokens (B,) int64; their log-probabilities under the sampling distribution; their log-probabilities under
        temperature 1 without penalty and filters. A row of temperature 0 has the latter for both. (B,) float32 (float64
        for float64 inputs).

    Raises:
        ValueError: bad shapes, dtypes, devices or an unknown backend; on the CPU also values out of range.
    """
    inputs = SamplingInputs(
        hidden, weight, seeds, steps, temperature, forbidden, penalty, seen, filtered, top_k, top_p, min_p
    )
    _check(inputs)
    return sample_tokens_op(
        hidden,
        weight,
        seeds,
        steps,
        temperature,
        forbidden,
        penalty,
        seen,
        filtered,
        top_k,
        top_p,
        min_p,
        uses_kernel("sample_tokens", hidden, backend),
    )


@torch.library.custom_op("fastvst::sample_tokens", mutates_args=(), device_types=("cpu", "cuda"))
def sample_tokens_op(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    steps: Tensor,
    temperature: Tensor | None,
    forbidden: Tensor | None,
    penalty: Tensor | None,
    seen: Tensor | None,
    filtered: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    kernel: bool,
) -> Sampled:
    """`sample_tokens` with the backend chosen."""
    inputs = SamplingInputs(
        hidden, weight, seeds, steps, temperature, forbidden, penalty, seen, filtered, top_k, top_p, min_p
    )
    if hidden.device.type == "cpu":
        _check_values(inputs)
    if kernel:
        from fastvst_kernels.sampling import kernels  # imported here: the package must work without Triton

        return kernels.sample(inputs)
    return sample_tokens_reference(inputs)


@sample_tokens_op.register_fake
def _(hidden, weight, seeds, steps, temperature, forbidden, penalty, seen, filtered, top_k, top_p, min_p, kernel):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.empty_like(seeds), *(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))


def _check(inputs: SamplingInputs) -> None:
    """Check shapes, dtypes and devices. The operator checks the values on the CPU."""
    hidden = inputs.hidden
    weight = inputs.weight
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected (B, H) and (V, H)")
    if hidden.dtype not in FLOATS or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden and weight are {hidden.dtype} and {weight.dtype}; expected one float type")
    if (inputs.penalty is None) != (inputs.seen is None):
        raise ValueError("penalty and seen go together: give both or none")
    given = [x is not None for x in (inputs.filtered, inputs.top_k, inputs.top_p, inputs.min_p)]
    if any(given) and not all(given):
        raise ValueError("filtered, top_k, top_p and min_p go together: give all or none")
    rows = hidden.shape[0]
    vocabulary = weight.shape[0]
    count = 0 if inputs.filtered is None else inputs.filtered.shape[0]
    forbidden_count = 0 if inputs.forbidden is None else inputs.forbidden.numel()
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "seeds": ((rows,), torch.int64),
        "steps": ((rows,), torch.int64),
        "temperature": ((rows,), torch.float32),
        "forbidden": ((forbidden_count,), torch.int64),
        "penalty": ((rows,), torch.float32),
        "seen": ((rows, vocabulary), torch.bool),
        "filtered": ((count,), torch.int64),
        "top_k": ((count,), torch.int64),
        "top_p": ((count,), torch.float32),
        "min_p": ((count,), torch.float32),
    }
    for name, (shape, dtype) in expected.items():
        x = getattr(inputs, name)
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != hidden.device):
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape} {dtype} on {hidden.device}"
            )
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and weight on {weight.device}; expected one device")


def _check_values(inputs: SamplingInputs) -> None:
    """Check that all values are in range. Reads them."""
    vocabulary = inputs.weight.shape[0]
    ranges: dict[str, tuple[float, float]] = {
        "temperature": (0, float("inf")),
        "forbidden": (0, vocabulary - 1),
        "filtered": (0, inputs.hidden.shape[0] - 1),
        "top_k": (1, vocabulary),
        "top_p": (torch.finfo(torch.float32).tiny, 1),
        "min_p": (0, 1),
    }
    for name, (least, most) in ranges.items():
        x = getattr(inputs, name)
        if x is not None and x.numel() and not least <= x.min().item() <= x.max().item() <= most:
            raise ValueError(f"{name} runs from {x.min().item()} to {x.max().item()}; expected {least} to {most}")
