"""Packed attention by the plain formula, and the comparison that every kernel must pass.

A pack is a list of sequence lengths with the index of the shared prompt of each, or -1. Every completion is computed as
its own (prompt + completion) sequence; autograd sums the gradients of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Lengths of the sequences of a packed row and the shared prompt of each (-1: none)."""

    lengths: tuple[int, ...]
    prompts: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def offsets(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)

    def groups(self, device: torch.device | str = "cpu") -> Tensor | None:
        return None if self.prompts is None else torch.tensor(self.prompts, dtype=torch.int32, device=device)


def group(prompt: int, *completions: int) -> Pack:
    """One shared prompt and its completions."""
    return Pack((prompt, *completions), (-1, *(0 for _ in completions)))


def join(*packs: Pack) -> Pack:
    """The packs one after the other in one row."""
    lengths: list[int] = []
    prompts: list[int] = []
    for pack in packs:
        own = pack.prompts or (-1,) * len(pack.lengths)
        prompts += [p if p < 0 else p + len(lengths) for p in own]
        lengths += pack.lengths
    return Pack(tuple(lengths), tuple(prompts))


# Groups whose parts end at tiles' edges, are empty, are one token long, or are more than a tile has rows.
GROUP_SHAPES = (
    group(64, 64),
    group(65, 63),
    group(130, *range(1, 9)),
    group(20, *(1 for _ in range(64))),
    group(0, 5, 7),
    group(33, 0, 0, 12, 0),
    group(9, 0),
    join(group(3, 70), group(70, 3), Pack((20,)), group(5, 5, 5)),
)


def formula(q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output and (T, Hq) logsumexp: product, softmax, product, all in q's dtype."""
    ends = [sum(pack.lengths[: i + 1]) for i in range(len(pack.lengths))]
    rows = [torch.arange(end - length, end, device=q.device) for end, length in zip(ends, pack.lengths, strict=True)]
    repeat = q.shape[1] // k.shape[1]
    outs = []
    lses = []
    for index, own in enumerate(rows):
        prompt = -1 if pack.prompts is None else pack.prompts[index]
        seen = own if prompt < 0 else torch.cat([rows[prompt], own])
        keys, values = (x[seen].repeat_interleave(repeat, 1).transpose(0, 1) for x in (k, v))
        scores = (q[own].transpose(0, 1) @ keys.transpose(1, 2)) * scale
        if causal:
            scores = scores.masked_fill(seen[None, None, :] > own[None, :, None], float("-inf"))
        outs.append((torch.softmax(scores, -1) @ values).transpose(0, 1))
        lses.append(torch.logsumexp(scores, -1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


@dataclass(frozen=True)
class Results:
    """Output, logsumexp and the three gradients, by name."""

    values: dict[str, Tensor]

    @staticmethod
    def of(compute, qkv: Tensor, heads: tuple[int, int], dout: Tensor, dlse: Tensor | None) -> Results:
        """Run compute(q, k, v) -> (out, lse) on views of qkv (T, Hq + 2 Hkv, D), and its backward."""
        qkv = qkv.detach().requires_grad_()
        q, k, v = qkv.split([heads[0], heads[1], heads[1]], dim=1)
        out, lse = compute(q, k, v)
        torch.autograd.backward(
            [out] if dlse is None else [out, lse], [dout.to(out)] if dlse is None else [dout.to(out), dlse.to(lse)]
        )
        dq, dk, dv = qkv.grad.split([heads[0], heads[1], heads[1]], dim=1)
        return Results({"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv})


def assert_as_good_as_plain(
    compute,
    pack: Pack,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    *,
    causal: bool,
    with_dlse: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Results:
    """compute(q, k, v) -> (out, lse (T, Hq)), forward and backward, against float64.

    The largest error may be twice that of the plain formula in the same dtype plus a floor, because on few values the
    plain formula may be exact by chance. The floor is 4 units of float32 of the largest value, half a unit for 16-bit
    types. Gradients are differences of products with dout, so its largest value counts for them too: dq of a sequence
    of one token is exactly 0.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (pack.tokens, heads[0] + 2 * heads[1], width)
    qkv = torch.randn(shape, generator=generator).to(dtype).to(device)
    dout = torch.randn((pack.tokens, heads[0], width), generator=generator).to(dtype).to(device)
    dlse = torch.randn((pack.tokens, heads[0]), generator=generator).to(device) if with_dlse else None

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return formula(q, k, v, pack, causal=causal, scale=width**-0.5)

    truth = Results.of(plain, qkv.double(), heads, dout, dlse)
    same = Results.of(plain, qkv, heads, dout, dlse)
    ours = Results.of(compute, qkv, heads, dout, dlse)
    for name, value in ours.values.items():
        expected = truth.values[name]
        assert value.shape == expected.shape, f"{name}: {tuple(value.shape)} instead of {tuple(expected.shape)}"
        if not expected.numel():
            continue
        largest = expected.abs().max().item()
        if name in ("dq", "dk"):
            largest = max(largest, dout.abs().max().item())
        error = (value.double() - expected).abs().max().item()
        allowed = (same.values[name].double() - expected).abs().max().item()
        floor = 4 * torch.finfo(torch.float32).eps * largest
        if dtype != torch.float32:  # the logsumexp is float32 in all dtypes: only the floor counts for it
            allowed, floor = (0.0, 4 * floor) if name == "lse" else (allowed, torch.finfo(dtype).eps / 2 * largest)
        assert error <= 2 * allowed + floor, (
            f"{name} of {pack}, heads {heads}, D {width}, {dtype}: error {error:.3g}, plain {allowed:.3g}, "
            f"largest value {largest:.3g}"
        )
    return ours
