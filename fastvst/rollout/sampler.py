"""Draws the next token of each row: `fastvst_kernels.sample_tokens` on a GPU, the cumulative softmax on the CPU.

The random number of a row is a hash of its own seed and of the number of tokens drawn so far. So it does not depend on
the batch. The CPU needs one random number per row and a two-level sum over the vocabulary, instead of Gumbel noise for
every token: for 256 rows of 4,096 tokens 256 hashes instead of a million, and 3.5 times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst.rollout.request import SamplingParams
from fastvst_kernels import sample_tokens
from fastvst_kernels.sampling.reference import apply_filters_, head_logits
from fastvst_kernels.shared.tensors import send

BLOCK = 64  # entries of a block of the two-level sum
NOT_FINITE = -1  # in place of a token, so the host learns it from what it reads anyway


class Drawn(NamedTuple):
    """One token for each of B rows.

    Attributes:
        tokens: (B,) int64; where logits contain NaN or infinity NOT_FINITE, or log-probabilities that are not finite.
        logprobs, raw_logprobs: (B,) under the sampling distribution and under the model's own (see `Rollout`); None if
            no row asks for them.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    raw_logprobs: Tensor | None = None


class Reading:
    """The way of a step's tokens to the host, in one copy that nobody waits for until `values`.

    Logits that are not finite show in what is read: in a token, or in its log-probabilities.
    """

    def __init__(self, drawn: Drawn | Tensor) -> None:
        """`drawn`: of a step, or what `pack` made of it."""
        packed = pack(drawn) if isinstance(drawn, Drawn) else drawn
        self._copied: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            self._host = packed.to("cpu", non_blocking=True)  # into page-locked memory
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = packed.clone()

    def values(self) -> np.ndarray:
        """(3, B) float64: tokens (NOT_FINITE where logits are not), log-probabilities, raw ones; waits for the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        found: np.ndarray = self._host.numpy()
        found[0, ~np.isfinite(found).all(0)] = NOT_FINITE
        return found


def pack(drawn: Drawn, out: Tensor | None = None) -> Tensor:
    """(3, B) float64, in `out` if it is given: tokens and both log-probabilities, 0 if there are none.

    Tokens and float32 numbers are exact in float64.
    """
    tokens = drawn.tokens
    out = torch.zeros((3, len(tokens)), dtype=torch.float64, device=tokens.device) if out is None else out
    for row, values in zip(out, (tokens, drawn.logprobs, drawn.raw_logprobs), strict=True):
        if values is not None:
            row.copy_(values)
    return out


@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of B rows as tensors; None where no row needs one.

    Attributes:
        seeds: (B,) int64.
        greedy: (B,) bool.
        temperature: (B,) float32, 0 in greedy rows; scaled: whether any is neither 0 nor 1.
        filtered: (F,) int64, the rows with top_k, top_p or min_p; top_k, top_p, min_p: (F,) values of these rows.
        penalty: (B,) float32, the repetition penalties.
        allowed: (K, V) bool, the different sets of allowed tokens; the first one has all.
        allowed_at: (B, P) int64, which of these sets holds at each position; the last one holds for all further ones.
        all_greedy: no row draws at random.
        logprobs: whether any row asks for log-probabilities.
        common_temperature: the temperature of all rows, 0 if they differ.
    """

    seeds: Tensor
    greedy: Tensor | None
    temperature: Tensor | None
    scaled: bool
    filtered: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    penalty: Tensor | None
    allowed: Tensor | None
    allowed_at: Tensor | None
    all_greedy: bool
    logprobs: bool
    common_temperature: float

    @property
    def plain(self) -> bool:
        """The sampling distribution of every row is the model's own."""
        return not self.scaled and self.filtered is None and self.penalty is None and self.allowed is None


def make_rows(
    params: Sequence[SamplingParams], seeds: Sequence[int], vocabulary: int, device: torch.device
) -> SamplingRows:
    """The parameters of a batch, one row after the other."""

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return send(torch.tensor(values, dtype=dtype), device)

    greedy = [p.temperature == 0 for p in params]
    temperature = [p.temperature for p in params]
    penalty = [p.repetition_penalty for p in params]
    filtered = [i for i, p in enumerate(params) if p.filters]
    chosen = [params[i] for i in filtered]
    top_k = [min(p.top_k if p.top_k > 0 else vocabulary, vocabulary) for p in chosen]
    allowed, allowed_at = _allowed_sets([p.allowed for p in params], vocabulary)
    return SamplingRows(
        seeds=column(list(seeds), torch.int64),
        greedy=column(greedy, torch.bool) if any(greedy) else None,
        temperature=column(temperature) if any(x != 1 for x in temperature) else None,
        scaled=any(x not in (0, 1) for x in temperature),
        filtered=column(filtered, torch.int64) if filtered else None,
        top_k=column(top_k, torch.int64) if filtered else None,
        top_p=column([p.top_p for p in chosen]) if filtered else None,
        min_p=column([p.min_p for p in chosen]) if filtered else None,
        penalty=column(penalty) if any(x != 1 for x in penalty) else None,
        allowed=None if allowed is None else send(allowed, device),
        allowed_at=None if allowed_at is None else send(allowed_at, device),
        all_greedy=all(greedy),
        logprobs=any(p.logprobs for p in params),
        common_temperature=temperature[0] if len(set(temperature)) == 1 else 0.0,
    )


def _allowed_sets(each: Sequence[tuple[tuple[int, ...], ...]], vocabulary: int) -> tuple[Tensor | None, Tensor | None]:
    """`allowed` and `allowed_at` of SamplingRows. Equal sets are kept once: an action of 7 tokens needs 2, not 8."""
    if not any(each):
        return None, None
    numbers: dict[tuple[int, ...], int] = {(): 0}
    longest = max(map(len, each))
    places = []
    for sets in each:
        row = [numbers.setdefault(one, len(numbers)) for one in sets] or [0]
        places.append(row + row[-1:] * (longest - len(row)))
    allowed = torch.zeros((len(numbers), vocabulary), dtype=torch.bool)
    allowed[0] = True
    for one, number in numbers.items():
        allowed[number, list(one)] = True
    return allowed, torch.tensor(places)


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """(B,) float64 in [0, 1): the splitmix64 hash (Steele et al., OOPSLA 2014) of int64 seeds and steps."""
    x = seeds + (steps + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def next_tokens(
    hidden: Tensor, weight: Tensor, rows: SamplingRows, steps: Tensor, forbidden: Tensor, seen: Tensor | None = None
) -> Drawn:
    """As `sample`, from hidden states (B, H) and the LM head's weight (V, H)."""
    if hidden.is_cuda and rows.allowed is None:  # the kernel knows no allowed sets
        return sample_fused(hidden, weight, rows, steps, forbidden, seen)
    return sample(head_logits(hidden, weight), rows, steps, forbidden, seen)


def sample_fused(
    hidden: Tensor, weight: Tensor, rows: SamplingRows, steps: Tensor, forbidden: Tensor, seen: Tensor | None = None
) -> Drawn:
    """`next_tokens` by `fastvst_kernels.sample_tokens`; log-probabilities in float32.

    The token of a row whose logits are not finite may be any number: its log-probabilities are not finite either.
    Without log-probabilities it is NOT_FINITE.
    """
    tokens, logprobs, raw_logprobs = sample_tokens(
        hidden,
        weight,
        rows.seeds,
        steps,
        temperature=rows.temperature,
        forbidden=forbidden,
        penalty=rows.penalty,
        seen=None if rows.penalty is None else seen,
        filtered=rows.filtered,
        top_k=rows.top_k,
        top_p=rows.top_p,
        min_p=rows.min_p,
    )
    if rows.logprobs:
        return Drawn(tokens, logprobs, raw_logprobs)
    return Drawn(torch.where(torch.isfinite(logprobs) & torch.isfinite(raw_logprobs), tokens, NOT_FINITE))


def sample(logits: Tensor, rows: SamplingRows, steps: Tensor, forbidden: Tensor, seen: Tensor | None = None) -> Drawn:
    """Draw one token for each row of logits; log-probabilities in float64.

    Args:
        logits: (B, V) float32 (float64 in tests); overwritten.
        steps: (B,) int64, number of tokens that each row has drawn before.
        forbidden: (f,) int64 tokens that are never drawn.
        seen: (B, V) bool, tokens of prompt and completion, for the repetition penalty.
    """
    forbidden_logits = logits.index_select(1, forbidden).double()  # they keep their share of the softmax
    unscaled = forbidden_logits
    raw = None
    if rows.logprobs and not rows.plain:
        raw = logits.clone()
    if rows.penalty is not None and seen is not None:
        penalty = rows.penalty[:, None]
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits.index_fill_(1, forbidden, float("-inf"))
    if rows.allowed is not None and rows.allowed_at is not None:
        at = rows.allowed_at.gather(1, steps[:, None].clamp(max=rows.allowed_at.shape[1] - 1)).squeeze(1)
        logits = logits.masked_fill_(~rows.allowed[at], float("-inf"))
        forbidden_logits = forbidden_logits.masked_fill(at[:, None] > 0, float("-inf"))
    if rows.all_greedy:
        tokens = logits.argmax(1)  # of a NaN, if there is one
        found = _marked(tokens, logits.gather(1, tokens[:, None]), unscaled)
        if not rows.logprobs:
            return Drawn(found)
        own = _log_softmax_at(raw, tokens) if raw is not None else _log_softmax_at(logits, tokens, forbidden_logits)
        return Drawn(found, own, own)
    best = logits.argmax(1) if rows.greedy is not None else None
    if rows.scaled and rows.temperature is not None:
        scale = torch.where(rows.temperature == 0, 1.0, 1 / rows.temperature)[:, None]
        logits = logits * scale
        forbidden_logits = forbidden_logits * scale
    if rows.filtered is not None and rows.top_k is not None and rows.top_p is not None and rows.min_p is not None:
        part = logits.index_select(0, rows.filtered)
        apply_filters_(part, rows.top_k[:, None], rows.top_p[:, None], rows.min_p[:, None])
        logits.index_copy_(0, rows.filtered, part)
        forbidden_logits = forbidden_logits.index_fill(0, rows.filtered, float("-inf"))
    tokens, top, total = draw(logits, uniform(rows.seeds, steps))
    if best is not None and rows.greedy is not None:
        tokens = torch.where(rows.greedy, best, tokens)
    marked = _marked(tokens, top, unscaled)
    if not rows.logprobs:
        return Drawn(marked)
    lse = torch.logaddexp(torch.log(total) + top.squeeze(1), torch.logsumexp(forbidden_logits, 1))
    own = logits.gather(1, tokens[:, None]).squeeze(1).double() - lse
    if raw is None:
        return Drawn(marked, own, own)
    plain = _log_softmax_at(raw, tokens)
    return Drawn(marked, own if rows.greedy is None else torch.where(rows.greedy, plain, own), plain)


def _marked(tokens: Tensor, top: Tensor, forbidden_logits: Tensor) -> Tensor:
    """The tokens, NOT_FINITE where the largest logit (B, 1) or a forbidden one (B, f) is not finite."""
    finite = torch.isfinite(top).squeeze(1) & torch.isfinite(forbidden_logits).all(1)
    return torch.where(finite, tokens, NOT_FINITE)


def draw(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The token of each row at which the cumulative softmax exceeds u.

    Args:
        logits: (B, V), -inf = impossible; u: (B,) float64 in [0, 1).

    Returns:
        tokens (B,); the largest logit of each row (NaN if it has one), (B, 1) float64; the sum of
        exp(logit - largest), (B,) float64.
    """
    top = logits.amax(1, keepdim=True)
    weights = torch.exp_(logits - top)
    if weights.shape[1] % BLOCK:
        weights = F.pad(weights, (0, -weights.shape[1] % BLOCK))
    blocks = weights.view(weights.shape[0], -1, BLOCK)
    upper = blocks.sum(2).double().cumsum(1)
    total = upper[:, -1]
    # u * total may round up to total; no cumulative sum would exceed that.
    goal = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))[:, None]
    block = torch.searchsorted(upper, goal, right=True).clamp(max=upper.shape[1] - 1)  # beyond the last one for NaN
    lower = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK)).squeeze(1).double()
    below = torch.where(block > 0, upper.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = (lower.cumsum(1) <= goal - below).sum(1)
    # A block's float32 sum may exceed its float64 sum: then take the last possible entry.
    last = BLOCK - 1 - (lower > 0).flip(1).int().argmax(1)
    return block.squeeze(1) * BLOCK + torch.minimum(inside, last), top.double(), total


def _log_softmax_at(logits: Tensor, tokens: Tensor, removed: Tensor | None = None) -> Tensor:
    """(B,) float64 log-probabilities of tokens; `removed` (B, f) are logits that belong to the softmax but not to
    `logits`, which is overwritten."""
    top = logits.amax(1, keepdim=True)
    lse = torch.log(torch.exp_(logits - top).sum(1).double()) + top.squeeze(1).double()
    if removed is not None:
        lse = torch.logaddexp(lse, torch.logsumexp(removed, 1))
    return logits.gather(1, tokens[:, None]).squeeze(1).double() - lse
