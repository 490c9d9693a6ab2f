"""Next tokens from hidden states: lm_head product, temperature, filters and Gumbel noise in one operator.

Adding independent Gumbel noise to the logits and taking the largest draws from their softmax (Gumbel 1954; Maddison et
al., NIPS 2014), so one pass over the vocabulary is enough and the logits need not be kept (arXiv 2603.15854 does the
same). The noise is a hash of (row's seed, row's step, token): a row draws the same token whatever else is in the batch.
There is no backward: drawing does not differentiate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.shared.backend import uses_kernel
from fastvst_kernels.shared.checks import FLOATS

__all__ = ["cut_", "gumbel", "head_logits", "sample_tokens", "sample_tokens_op", "sample_tokens_reference"]

Found = tuple[Tensor, Tensor, Tensor]
MASK = 0xFFFFFFFF
SMALL = 2.0**-7  # below it the kernel takes four terms of the series of -log(1 - v): the rest is under 8e-10 of it


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
) -> Found:
    """Draw one token for each row.

    Args:
        hidden: (B, H); weight: (V, H), one floating dtype. Logits are float32 sums (float64 for float64 inputs) and are
            never rounded to 16 bits.
        seeds: (B,) int64; steps: (B,) int64, the place of the token in its row's answer.
        temperature: (B,) float32, 0 = the most likely token; None = 1 everywhere.
        forbidden: (f,) int64 tokens that are never drawn. In rows without filters they keep their share of the softmax.
        penalty: (B,) float32 and seen: (B, V) bool: logits of seen tokens are divided by it where positive and
            multiplied where negative (arXiv 1909.05858); both or none.
        filtered: (c,) int64 rows, each at most once and of a temperature above 0, with filters: top_k: (c,) int64, 1..V
            (V = off), top_p: (c,) float32 (1 = off), min_p: (c,) float32 (0 = off), in this order. Of equal logits at
            the border all stay. All four or none.
        backend: "triton", "torch" (all logits at once), or "auto": Triton on CUDA, torch on the CPU.

    Returns:
        tokens (B,) int64; their log-probabilities under the sampling distribution, and under temperature 1 without
        penalty and filters, which a row of temperature 0 has for both: (B,) float32 (float64 for float64 inputs).

    Raises:
        ValueError: bad shapes, dtypes, devices or an unknown backend; on the CPU also values out of range.
    """
    _check(hidden, weight, seeds, steps, temperature, forbidden, penalty, seen, filtered, top_k, top_p, min_p)
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
) -> Found:
    """As `sample_tokens`, with the backend chosen."""
    arguments = (hidden, weight, seeds, steps, temperature, forbidden, penalty, seen, filtered, top_k, top_p, min_p)
    if kernel:
        # the package also imports where there is no Triton
        from fastvst_kernels.sampling import kernels as sampling_triton

        return sampling_triton.sample(*arguments)
    return sample_tokens_reference(*arguments)


@sample_tokens_op.register_fake
def _(hidden, weight, seeds, steps, temperature, forbidden, penalty, seen, filtered, top_k, top_p, min_p, kernel):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.empty_like(seeds), *(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))


def sample_tokens_reference(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    steps: Tensor,
    temperature: Tensor | None = None,
    forbidden: Tensor | None = None,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    filtered: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Found:
    """The formula with all logits at once; arguments as in `sample_tokens`."""
    raw = head_logits(hidden, weight)
    own = raw
    dtype = raw.dtype
    if penalty is not None and seen is not None:
        factor = penalty.to(dtype)[:, None]
        own = torch.where(_without(seen, forbidden), torch.where(own > 0, own / factor, own * factor), own)
    greedy = None
    if temperature is not None:
        greedy = temperature == 0
        own = own * torch.where(greedy, 1.0, 1 / temperature).to(dtype)[:, None]
    possible = own
    if forbidden is not None:
        possible = own.index_fill(1, forbidden, float("-inf"))
    lse = torch.logsumexp(own, 1)
    if filtered is not None and top_k is not None and top_p is not None and min_p is not None:
        part = possible.index_select(0, filtered)
        cut_(part, top_k[:, None], top_p[:, None], min_p[:, None])
        possible = possible.index_copy(0, filtered, part)
        lse = lse.index_copy(0, filtered, torch.logsumexp(part, 1))
    noise = gumbel(seeds, steps, weight.shape[0], dtype)
    if greedy is not None:
        noise = torch.where(greedy[:, None], 0.0, noise)
    tokens = (possible + noise).argmax(1)
    at = tokens[:, None]
    plain = raw.gather(1, at).squeeze(1) - torch.logsumexp(raw, 1)
    logprobs = own.gather(1, at).squeeze(1) - lse
    return tokens, logprobs if greedy is None else torch.where(greedy, plain, logprobs), plain


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(B, V) in float32 (float64 stays): half-precision products keep the accumulator's precision on a GPU."""
    if hidden.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(hidden.float(), weight.float())


def cut_(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Set logits (c, V) outside each row's top_k, top_p and min_p sets to -inf, in place; the three are (c, 1).

    Of equal logits at the border all stay.
    """
    ordered = logits.sort(dim=1, descending=True).values
    place = torch.arange(ordered.shape[1], device=logits.device)
    kept = ordered.masked_fill(place >= top_k, float("-inf"))
    p = torch.softmax(kept, 1)
    before = p.cumsum(1) - p
    # The first token always stays: nothing lies before it. A top_p of 1 keeps what rounding would cut from the tail.
    inside = ((before < top_p) | (top_p >= 1)) & (kept >= ordered[:, :1] + torch.log(min_p)) & (kept > float("-inf"))
    border = ordered.gather(1, inside.sum(1, keepdim=True).clamp(min=1) - 1)
    logits.masked_fill_(logits < border, float("-inf"))


def gumbel(seeds: Tensor, steps: Tensor, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, V) of `dtype`: Gumbel noise of each row's int64 seed and step, for every token.

    v = (h + 1/2) / 2**32 of a 32-bit hash h gives -log(-log(1 - v)). Small v, which win, have all 32 bits: in float32 a
    uniform number near 1 has only 24, which would distort tokens less likely than 1e-6.
    """
    first, second = row_keys(seeds, steps)
    token = torch.arange(vocabulary, device=seeds.device)
    h = mix(first[:, None] + token * 0x9E3779B9 & MASK)
    h = mix(h ^ second[:, None])
    v = h.to(dtype) * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))  # a token that is alone must not get -inf


def row_keys(seeds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit numbers for each row, in int64, from all bits of its seed and the low 32 of its step."""
    low = seeds & MASK
    high = seeds >> 32 & MASK
    step = steps & MASK
    first = mix(low ^ mix(step ^ mix(high ^ 0x9E3779B9)))
    return first, mix(high ^ mix(step ^ mix(low ^ 0x85EBCA6B)))


def mix(x: Tensor) -> Tensor:
    """A bijective 32-bit hash on int64 of 0 .. 2**32 - 1: triple32 of C. Wellons' hash-prospector."""
    x = (x ^ x >> 17) * 0xED5AD4BB & MASK
    x = (x ^ x >> 11) * 0xAC4C1B51 & MASK
    x = (x ^ x >> 15) * 0x31848BAB & MASK
    return x ^ x >> 14


def _without(seen: Tensor, forbidden: Tensor | None) -> Tensor:
    return seen if forbidden is None else seen.index_fill(1, forbidden, False)


def _check(
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
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected (B, H) and (V, H)")
    if hidden.dtype not in FLOATS or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden and weight are {hidden.dtype} and {weight.dtype}; expected one float type")
    if (penalty is None) != (seen is None):
        raise ValueError("penalty and seen go together: give both or none")
    given = [x is not None for x in (filtered, top_k, top_p, min_p)]
    if any(given) and not all(given):
        raise ValueError("filtered, top_k, top_p and min_p go together: give all or none")
    rows = hidden.shape[0]
    vocabulary = weight.shape[0]
    count = 0 if filtered is None else filtered.shape[0]
    expected: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("seeds", seeds, (rows,), torch.int64),
        ("steps", steps, (rows,), torch.int64),
        ("temperature", temperature, (rows,), torch.float32),
        ("forbidden", forbidden, (0 if forbidden is None else forbidden.numel(),), torch.int64),
        ("penalty", penalty, (rows,), torch.float32),
        ("seen", seen, (rows, vocabulary), torch.bool),
        ("filtered", filtered, (count,), torch.int64),
        ("top_k", top_k, (count,), torch.int64),
        ("top_p", top_p, (count,), torch.float32),
        ("min_p", min_p, (count,), torch.float32),
    ]
    for name, x, shape, dtype in expected:
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != hidden.device):
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape} {dtype} on {hidden.device}"
            )
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and weight on {weight.device}; expected one device")
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ranges: list[tuple[str, Tensor | None, float, float]] = [
        ("temperature", temperature, 0, float("inf")),
        ("forbidden", forbidden, 0, vocabulary - 1),
        ("filtered", filtered, 0, rows - 1),
        ("top_k", top_k, 1, vocabulary),
        ("top_p", top_p, torch.finfo(torch.float32).tiny, 1),
        ("min_p", min_p, 0, 1),
    ]
    for name, x, least, most in ranges:
        if x is not None and x.numel() and not least <= x.min().item() <= x.max().item() <= most:
            raise ValueError(f"{name} runs from {x.min().item()} to {x.max().item()}; expected {least} to {most}")
