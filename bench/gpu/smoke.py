"""Every kernel once at the models' shapes against its plain formula: `python -m bench.gpu.smoke --out FILE`.

A case runs the kernel twice on memory that is filled with NaN before. `worst` is the largest error of an output or
gradient, divided by that of the plain path in the same dtype; `repeats` says that both runs have the same bits; `ok`
that worst is at most 2, values are finite and bits repeat. The tests in `tests/kernels/gpu` ask more and take longer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.block import Cases, Figures, Options, command
from fastvst_kernels import (
    add_rms_norm,
    decode_attention,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    mrope,
    packed_attention,
    prepare,
    rms_norm,
    sample_tokens,
    swiglu,
    vision_rope,
    window_attention,
)
from fastvst_kernels.attention.gluon_backend import gluon_lacks
from fastvst_kernels.invariant.op import invariant_mm
from fastvst_kernels.lm_head.cross_entropy import linear_cross_entropy_reference
from fastvst_kernels.lm_head.logprobs import linear_logprobs_reference
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss_reference
from fastvst_kernels.objectives import DAPO
from fastvst_kernels.paged_rope.op import paged_mrope

Function = Callable[..., Any]
Lengths = tuple[int, ...]
FLOOR = {torch.bfloat16: 1.5e-3, torch.float16: 2e-4, torch.float32: 2e-6}  # the plain path may be exact by chance


class Comparison:
    """A kernel against its plain path; tensors of the run's device and dtype."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.pick = options.pick
        self.heads = {"7b": options.pick((28, 4), (4, 2)), "3b": options.pick((16, 2), (2, 1))}
        self.head = {"7b": options.pick((3584, 152_064), (64, 500)), "3b": options.pick((2048, 151_936), (64, 300))}

    def randn(self, *size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, device=self.options.device, dtype=self.options.dtype)

    def integers(self, high: int, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(0, high, size, device=self.options.device, dtype=dtype)

    def offsets(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def compare(self, ours: Function, plain: Function, given: dict[str, Tensor], *, wide: torch.dtype) -> Figures:
        """`ours` twice, `plain` in the inputs' dtype and in `wide`: outputs and gradients of all inputs."""
        upstream: list[Tensor] = []
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills fresh memory with NaN
        try:
            first, second = (self.values(ours, given, upstream) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        if not self.options.compares:
            return {"ran": True}
        theirs = self.values(plain, given, upstream)
        exact = self.values(plain, {n: x.to(wide) for n, x in given.items()}, upstream)
        floor = FLOOR[self.options.dtype]
        errors = [[_error(x, true) for x in pair] for *pair, true in zip(first, theirs, exact, strict=True)]
        worst = max(a / max(b, floor) if math.isfinite(a) else math.inf for a, b in errors)
        repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        finite = all(bool(torch.isfinite(x).all()) for x in first)
        return {"ok": repeats and finite and worst <= 2, "worst": round(worst, 2), "repeats": repeats, "finite": finite}

    def values(self, function: Function, given: dict[str, Tensor], upstream: list[Tensor]) -> list[Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
        out = function(**leaves)
        outs = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
        if not upstream:
            upstream.extend(torch.randn_like(x, dtype=torch.float32) for x in outs)
        pairs = [(x, g.to(x.dtype)) for x, g in zip(outs, upstream, strict=True) if x.requires_grad]
        found = [x.detach() for x in outs]
        if pairs:
            found += torch.autograd.grad([x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs])
        return found

    def both(self, run: Function, given: dict[str, Tensor]) -> Figures:
        """`compare` of run("triton", ...) with run("torch", ...), which computes in the inputs' dtype."""
        return self.compare(lambda **x: run("triton", **x), lambda **x: run("torch", **x), given, wide=torch.float64)


class Smoke(Comparison):
    """The cases of one run."""

    def attention(
        self,
        heads: tuple[int, int],
        width: int,
        lengths: tuple[int, ...],
        prompts: tuple[int, ...] | None,
        causal: bool,
        ours: str = "triton",
    ) -> Figures:
        """One case of packed attention; `ours` is the backend."""
        host = self.offsets(lengths)
        named = None if prompts is None else torch.tensor(prompts, dtype=torch.int32)
        plan = prepare(host, named, causal=causal).to(self.options.device)
        cu = host.to(self.options.device)
        groups = None if named is None else named.to(self.options.device)

        def run(backend: str, qkv: Tensor) -> Any:
            q, k, v = qkv.split([heads[0], heads[1], heads[1]], 1)
            return packed_attention(
                q,
                k,
                v,
                cu,
                causal=causal,
                groups=groups,
                backend=backend,
                return_lse=True,
                plan=None if backend == "reference" else plan,
            )

        qkv = self.randn(sum(lengths), heads[0] + 2 * heads[1], width)
        return self.compare(
            lambda qkv: run(ours, qkv), lambda qkv: run("reference", qkv), {"qkv": qkv}, wide=torch.float64
        )

    def norm(self, width: int, add: bool) -> Figures:
        rows = self.pick(3001, 19)
        given = {"x": self.randn(rows, width), "w": self.randn(width)}
        if not add:
            return self.both(lambda backend, x, w: rms_norm(x, w, 1e-6, backend=backend), given)
        given["r"] = self.randn(rows, width)
        return self.both(lambda backend, x, w, r: add_rms_norm(x, r, w, 1e-6, backend=backend), given)

    def swiglu(self, width: int) -> Figures:
        rows = self.pick(1031, 5)
        given = {"gate": self.randn(rows, width), "up": self.randn(rows, width)}
        return self.both(lambda backend, gate, up: swiglu(gate, up, backend=backend), given)

    def rope(self, preset: str) -> Figures:
        heads, kv = self.heads[preset]
        tokens = self.pick(2051, 37)
        given = {"x": self.randn(tokens, (heads + 2 * kv) * 128), "b": self.randn((heads + 2 * kv) * 128)}
        positions = self.integers(9000, 3, tokens)
        same: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv, "head_dim": 128}
        same |= {"sections": (16, 24, 24), "theta": 1e6}
        return self.both(lambda backend, x, b: mrope(x, b, positions, **same, backend=backend), given)

    def paged_rope(self, preset: str) -> Figures:
        heads, kv = self.heads[preset]
        rows = self.pick(67, 5)
        table = torch.arange(1, rows + 1, device=self.options.device)[:, None]
        lengths = 1 + self.integers(16, rows)
        positions = self.integers(9000, 1, rows).expand(3, rows)
        given = {"x": self.randn(rows, (heads + 2 * kv) * 128), "b": self.randn((heads + 2 * kv) * 128)}
        given["pages"] = self.randn(rows + 1, 16, kv, 128)
        same: dict[str, Any] = {"sections": (16, 24, 24), "theta": 1e6, "rope_dtype": torch.float32}

        def run(backend: str, x: Tensor, b: Tensor, pages: Tensor) -> Any:
            with torch.no_grad():
                keys = pages.clone()
                values = pages.clone()
                q = paged_mrope(x, b, positions, keys, values, table, lengths, **same, backend=backend)
                return q, keys, values

        return self.both(run, given)

    def tower(self, name: str) -> Figures:
        heads = self.pick(16, 2)
        lengths = (64,) * self.pick(300, 2) + (32, 64, 16, 4, 48)
        given = {"x": self.randn(sum(lengths), 3 * heads * 80), "b": self.randn(3 * heads * 80)}
        positions = self.integers(90, sum(lengths), 2)
        cu = self.offsets(lengths).to(self.options.device)
        if name == "vision_rope":
            return self.both(
                lambda backend, x, b: vision_rope(x, b, positions, num_heads=heads, backend=backend), given
            )

        def run(backend: str, x: Tensor, b: Tensor) -> Tensor:
            backend = "reference" if backend == "torch" else backend
            return window_attention(x, b, positions, cu, num_heads=heads, max_window=64, backend=backend)

        return self.both(run, given)

    def loss(self, name: str, preset: str) -> Figures:
        """An LM head function; float32 is the wide dtype, because float64 logits of 152,064 tokens take 5 GB."""
        width, vocabulary = self.head[preset]
        rows = self.pick(4096, 24)
        targets = self.integers(vocabulary, rows, dtype=torch.int64)
        given = {"hidden": self.randn(rows, width), "weight": self.randn(vocabulary, width, scale=width**-0.5)}
        if name == "policy loss":
            old = -math.log(vocabulary) - 0.5 + 0.3 * torch.randn(rows, device=self.options.device)
            rest = {"advantages": torch.randn(rows, device=self.options.device), "old_logprobs": old}
            rest["row_weights"] = torch.full((rows,), 1 / rows, device=self.options.device)
            rest["sequence_ids"] = torch.arange(rows, device=self.options.device) // 64

            def policy(hidden: Tensor, weight: Tensor) -> Tensor:
                return linear_policy_loss(hidden, weight, targets, DAPO(), **rest)[0]

            return self.compare(
                policy,
                lambda hidden, weight: linear_policy_loss_reference(hidden, weight, targets, DAPO(), **rest),
                given,
                wide=torch.float32,
            )
        targets[: rows // 20] = -100
        ours, plain = {
            "cross entropy": (linear_cross_entropy, linear_cross_entropy_reference),
            "logprobs": (linear_logprobs, linear_logprobs_reference),
        }[name]
        return self.compare(
            lambda hidden, weight: ours(hidden, weight, targets),
            lambda hidden, weight: plain(hidden, weight, targets),
            given,
            wide=torch.float32,
        )

    def decode(self, preset: str, shared: bool) -> Figures:
        heads, kv = self.heads[preset]
        page = 16
        groups, each, prompt, own = self.pick((6, 8, 1600, 400), (2, 2, 40, 20))
        rows = groups * each
        pages = [-(-n // page) for n in (prompt, own)]
        order = torch.randperm(groups * pages[0] + rows * pages[1], device=self.options.device).int() + 1
        tables = order.split([groups * pages[0], rows * pages[1]])
        size = (len(order) + 1, page, kv, 128)
        lengths = own - self.integers(own // 2, rows)
        options: dict[str, Any] = {}
        if shared:
            options = {
                "prefix_pages": tables[0].view(groups, -1),
                "prefix_lengths": prompt - self.integers(prompt // 3, groups),
                "group_offsets": torch.arange(0, rows + 1, each, device=self.options.device, dtype=torch.int32),
                "max_group": each,
            }

        def run(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Any:
            with torch.no_grad():
                return decode_attention(
                    q, k, v, tables[1].view(rows, -1), lengths, **options, backend=backend, return_lse=True
                )

        given = {"q": self.randn(rows, heads, 128), "k": self.randn(*size), "v": self.randn(*size)}
        return self.compare(
            lambda **x: run("triton", **x), lambda **x: run("reference", **x), given, wide=torch.float64
        )

    def sampling(self, preset: str, filters: bool) -> Figures:
        width, vocabulary = self.head[preset]
        rows = self.pick(64, 4)
        device = self.options.device
        hidden = self.randn(rows, width, scale=2.0)
        weight = self.randn(vocabulary, width, scale=width**-0.5)
        seeds = torch.arange(rows, device=device)
        more: dict[str, Any] = {"temperature": torch.full((rows,), 0.7, device=device)}
        if filters:
            some = seeds[: rows // 2]
            more |= {"filtered": some, "top_k": torch.full_like(some, 50)}
            more |= {n: torch.full((len(some),), x, device=device) for n, x in (("top_p", 0.9), ("min_p", 0.01))}
        ours, again, plain = (
            sample_tokens(hidden, weight, seeds, seeds, backend=backend, **more)
            for backend in ("triton", "triton", "torch")
        )
        if not self.options.compares:
            return {"ran": True}
        same = ours[0] == plain[0]
        gap = max(float(torch.where(same, a - b, 0.0).abs().max()) for a, b in zip(ours[1:], plain[1:], strict=True))
        repeats = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        equal = float(same.float().mean())
        return {"ok": repeats and equal > 0.95 and gap < 2e-3, "repeats": repeats, "same_tokens": equal, "gap": gap}

    def invariant(self) -> Figures:
        rows, k, n = self.pick((300, 3584, 4608), (20, 64, 48))
        a = self.randn(rows, k)
        b = self.randn(n, k, scale=k**-0.5).t()
        out = invariant_mm(a, b, backend="triton")
        alone = invariant_mm(a[7:8], b, backend="triton")
        if not self.options.compares:
            return {"ran": True}
        error = _error(out, a.double() @ b.double())
        same = torch.equal(out[7:8], alone)
        return {"ok": same and error < 6e-3, "same_bits_alone": same, "relative_error": error}


def _error(x: Tensor, true: Tensor) -> float:
    wide = true.double()
    return float((x.double() - wide).norm() / wide.norm().clamp(min=1e-30))


def cases(options: Options) -> Cases:
    """Attention first: it has the most kernels."""
    run = Smoke(options)
    causal = options.pick((1500, 1, 64, 700, 1031), (20, 1, 9))
    shared = options.pick((700, 300, 64, 1, 500, 1600, 512, 512, 128), (20, 7, 3, 10))
    prompts = options.pick((-1, 0, 0, 0, -1, -1, 5, 5, 5), (-1, 0, 0, -1))
    for preset, heads in run.heads.items():
        yield f"attention causal {preset}", lambda heads=heads: run.attention(heads, 128, causal, None, True)
        yield f"attention groups {preset}", lambda heads=heads: run.attention(heads, 128, shared, prompts, True)
    full = options.pick((1024, 1000, 4, 340, 2000), (20, 4))
    tower = options.pick((16, 16), (2, 2))
    yield "attention full tower", lambda: run.attention(tower, 80, full, None, False)
    if gluon_lacks(run.randn(1, 1, 128)) is None:  # a Hopper GPU
        heads = run.heads["7b"]
        yield "attention gluon causal 7b", lambda: run.attention(heads, 128, causal, None, True, "gluon")
        yield "attention gluon groups 7b", lambda: run.attention(heads, 128, shared, prompts, True, "gluon")
        yield "attention gluon full tower", lambda: run.attention(tower, 80, full, None, False, "gluon")
    for name in ("window_attention", "vision_rope"):
        yield name, lambda name=name: run.tower(name)
    for width in options.pick((3584, 2048, 1280), (96,)):
        yield f"rms_norm {width}", lambda width=width: run.norm(width, False)
        yield f"add_rms_norm {width}", lambda width=width: run.norm(width, True)
    for width in options.pick((3456, 3420, 18_944, 11_008), (60,)):
        yield f"swiglu {width}", lambda width=width: run.swiglu(width)
    for preset in run.heads:
        yield f"mrope {preset}", lambda preset=preset: run.rope(preset)
        yield f"paged_mrope {preset}", lambda preset=preset: run.paged_rope(preset)
        for name in ("cross entropy", "logprobs", "policy loss"):
            yield f"{name} {preset}", lambda name=name, preset=preset: run.loss(name, preset)
        for words in (True, False):
            what = "shared" if words else "own"
            yield f"decode {what} {preset}", lambda preset=preset, words=words: run.decode(preset, words)
            what = "filtered" if words else "plain"
            yield f"sampling {what} {preset}", lambda preset=preset, words=words: run.sampling(preset, words)
    yield "invariant product", run.invariant


if __name__ == "__main__":
    sys.exit(command("smoke", cases, __doc__))
