"""Sampling by plain formulas in float64: the hash in NumPy's uint32, one row at a time, filters by definition.

These checks also run on GPU machines without transformers; tests/rollout/test_sampler.py compares the filters with
those of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingCase:
    """Arguments of `sample_tokens`; filters as (row, top_k, top_p, min_p)."""

    hidden: Tensor
    weight: Tensor
    seeds: Tensor
    steps: Tensor
    temperature: Tensor | None = None
    forbidden: Tensor | None = None
    penalty: Tensor | None = None
    seen: Tensor | None = None
    filters: tuple[tuple[int, int, float, float], ...] = ()

    def options(self, device: str = "cpu") -> dict[str, Tensor]:
        """The keyword arguments."""
        found = {n: getattr(self, n) for n in ("temperature", "forbidden", "penalty", "seen")}
        if self.filters:
            row, k, p, m = (list(x) for x in zip(*self.filters, strict=True))
            found |= {"filtered": torch.tensor(row), "top_k": torch.tensor(k)}
            found |= {"top_p": torch.tensor(p), "min_p": torch.tensor(m)}
        return {name: x.to(device) for name, x in found.items() if x is not None}

    def arguments(self, device: str = "cpu") -> tuple[Tensor, ...]:
        return tuple(x.to(device) for x in (self.hidden, self.weight, self.seeds, self.steps))

    def row(self, index: int) -> SamplingCase:
        """One row alone."""
        part = slice(index, index + 1)
        names = ("hidden", "seeds", "steps", "temperature", "penalty", "seen")
        some = {n: getattr(self, n)[part] for n in names if getattr(self, n) is not None}
        return replace(self, **some, filters=tuple((0, *f[1:]) for f in self.filters if f[0] == index))


def make_case(
    rows: int,
    vocabulary: int,
    width: int = 48,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 2.0,
    mixed: bool = False,
    filters: bool = False,
    penalty: bool = False,
) -> SamplingCase:
    """Random rows. mixed: temperatures 0.5, 1, 0, 2 in turn; filters: five kinds, in every row that is not greedy."""
    g = torch.Generator().manual_seed(seed)
    temperature = torch.tensor([0.5, 1.0, 0.0, 2.0])[torch.arange(rows) % 4] if mixed else None
    kinds = ((5, 1.0, 0.0), (vocabulary, 0.7, 0.0), (vocabulary, 1.0, 0.1), (40, 0.9, 0.02), (1, 1.0, 0.0))
    chosen = [i for i in range(rows) if filters and (temperature is None or temperature[i] > 0)]
    return SamplingCase(
        hidden=torch.randn(rows, width, generator=g).to(dtype),
        weight=(torch.randn(vocabulary, width, generator=g) * spread * width**-0.5).to(dtype),
        seeds=torch.randint(-(2**62), 2**62, (rows,), generator=g),
        steps=torch.randint(0, 3000, (rows,), generator=g),
        temperature=temperature,
        forbidden=torch.randperm(vocabulary, generator=g)[:2] if vocabulary > 2 else None,
        penalty=torch.tensor([1.3, 1.0])[torch.arange(rows) % 2] if penalty else None,
        seen=torch.rand(rows, vocabulary, generator=g) < 0.3 if penalty else None,
        filters=tuple((row, min(kinds[i % 5][0], vocabulary), *kinds[i % 5][1:]) for i, row in enumerate(chosen)),
    )


def noise(seeds: Tensor, steps: Tensor, vocabulary: int) -> np.ndarray:
    """(B, V) float64 Gumbel noise of the documented hash, in wrapping uint32 arithmetic."""

    def mix(x: np.ndarray) -> np.ndarray:
        for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(14))

    wide = seeds.numpy().view(np.uint64)
    low = (wide & np.uint64(2**32 - 1)).astype(np.uint32)
    high = (wide >> np.uint64(32)).astype(np.uint32)
    step = steps.numpy().astype(np.uint32)
    first = mix(low ^ mix(step ^ mix(high ^ np.uint32(0x9E3779B9))))
    second = mix(high ^ mix(step ^ mix(low ^ np.uint32(0x85EBCA6B))))
    token = np.arange(vocabulary, dtype=np.uint32) * np.uint32(0x9E3779B9)
    h = mix(mix(first[:, None] + token) ^ second[:, None])
    v = np.minimum((h + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -np.log(-np.log1p(-v))


def _filtered(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The top_k likeliest tokens; of these the fewest with a mass of top_p; of these all above min_p of the best."""
    order = logits.argsort(descending=True)[:top_k]
    mass = logits[order].softmax(0)
    kept = [i for i in range(len(order)) if mass[:i].sum() < top_p and mass[i] >= min_p * mass[0]]
    return torch.full_like(logits, -torch.inf).index_copy(0, order[kept], logits[order[kept]])


@dataclass(frozen=True)
class Expected:
    """Tokens (B,), their lead over the second best (B,), noise included, and both kinds of log-probabilities (B, V)."""

    tokens: Tensor
    gap: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor


def expected(case: SamplingCase) -> Expected:
    """What `sample_tokens` must return, in float64."""
    raw = case.hidden.double() @ case.weight.double().t()
    shares = []
    scores = []
    gumbel = torch.from_numpy(noise(case.seeds, case.steps, raw.shape[1]))
    forbidden = torch.zeros(0, dtype=torch.int64) if case.forbidden is None else case.forbidden
    for i, logits in enumerate(raw):
        temperature = 1.0 if case.temperature is None else float(case.temperature[i])
        own = logits.clone()
        if case.penalty is not None and case.seen is not None:
            marked = case.seen[i].clone()
            marked[forbidden] = False
            own[marked] *= torch.where(own[marked] > 0, 1 / case.penalty[i].double(), case.penalty[i].double())
        own = own / (temperature or 1.0)
        possible = own.index_fill(0, forbidden, -torch.inf)
        share = logits if temperature == 0 else own
        for row, k, p, m in case.filters:
            if row == i:
                share = possible = _filtered(possible, k, p, m)
        shares.append(share.log_softmax(0))
        scores.append(possible if temperature == 0 else possible + gumbel[i])
    best = torch.stack(scores).topk(min(2, raw.shape[1]), dim=1)
    gap = best.values[:, 0] - best.values[:, 1] if raw.shape[1] > 1 else torch.full((len(raw),), torch.inf)
    return Expected(best.indices[:, 0], gap.double(), torch.stack(shares), raw.log_softmax(1))


def assert_drawn(case: SamplingCase, found: tuple[Tensor, ...], plain: tuple[Tensor, ...] | None = None) -> None:
    """The same tokens where the gap exceeds rounding; at most twice the plain path's error of the log-probabilities."""
    tokens, own, raw = (x.cpu() for x in found)
    want = expected(case)
    rounding = 1e-12 if own.dtype == torch.float64 else 2e-5
    sure = want.gap > rounding
    assert sure.float().mean() > 0.9 or len(sure) < 10
    assert torch.equal(tokens[sure], want.tokens[sure])
    for name, value, full in (("own", own, want.logprobs), ("raw", raw, want.raw_logprobs)):
        exact = full.gather(1, tokens[:, None]).squeeze(1)
        error = (value.double() - exact).abs()
        allowed = rounding / 5
        if plain is not None:
            values = plain[1 if name == "own" else 2].double().cpu()
            spot = full.gather(1, plain[0].cpu()[:, None]).squeeze(1)
            allowed = max(2 * float((values - spot).abs().max()), 2e-6)  # 2e-6: two roundings of a sum near 16
        assert float(error.max()) <= allowed, f"{name}: {float(error.max()):.2e} above {allowed:.2e}"
