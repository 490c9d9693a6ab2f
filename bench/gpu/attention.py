"""Attention on a GPU compared with its peers: `python -m bench.gpu.attention --out FILE`.

Needs torch and triton only. All contenders of a case run in one process on the same tensors and take turns. `--record`
writes which one was fastest into the table that `backend="auto"` reads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases.attention import CASES, TINY_CASES, Case
from bench.gpu.block import Cases, Figures, Options, command
from bench.gpu.ceilings import matmul_tflops
from bench.gpu.clock import forward_backward
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention.backends import AttentionCall, library_attention
from fastvst_kernels.attention.choice import GLUON, TRITON, record
from fastvst_kernels.attention.choice import Case as Call
from fastvst_kernels.attention.gluon_backend import gluon_lacks
from fastvst_kernels.attention.libraries import LIBRARIES, installed

Contender = Callable[[], Tensor]


def contenders(case: Case, q: Tensor, k: Tensor, v: Tensor, *, full: bool = False) -> dict[str, Contender]:
    """Functions that compute one case: ours (Triton, and Gluon on Hopper), every installed
    library and, without groups, torch's other ways.

    `full`: FlexAttention too, which is compiled.

    Each returns the output.
    """
    offsets = case.offsets(q.device)
    plan = prepare(case.offsets("cpu"), case.groups("cpu"), causal=case.causal).to(q.device)
    groups = case.groups(q.device)
    backend = "triton" if q.is_cuda else "auto"
    found: dict[str, Contender] = {
        "fastvst": lambda: packed_attention(
            q, k, v, offsets, causal=case.causal, groups=groups, backend=backend, plan=plan
        )
    }
    if gluon_lacks(q) is None:
        found["fastvst-gluon"] = lambda: packed_attention(
            q, k, v, offsets, causal=case.causal, groups=groups, backend="gluon", plan=plan
        )
    call = AttentionCall(q, k, v, offsets, groups, plan, None, case.causal, q.shape[-1] ** -0.5)
    for name in installed() if q.is_cuda else ():
        found[name] = lambda name=name: library_attention(call, name)[0]
    if case.prompts is not None or not q.is_cuda:
        return found
    if len(set(case.lengths)) == 1:
        found["cudnn"] = lambda: _cudnn(q, k, v, case)
    if full:
        found["flex"] = _flex(q, k, v, case)
    return found


def _cudnn(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = [x.unflatten(0, (len(case.lengths), -1)).transpose(1, 2) for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*rows, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)


def _flex(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(case.lengths, device="cuda")
    document = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)

    def seen(_batch, _head, row, column):
        same = document[row] == document[column]
        return same & (row >= column) if case.causal else same

    state: dict[str, Any] = {}

    def run() -> Tensor:  # compiled at the first call, so that a failure counts for this contender only
        if not state:
            state["mask"] = create_block_mask(seen, None, None, case.tokens, case.tokens, device="cuda")
            state["call"] = torch.compile(flex_attention)
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return state["call"](*rows, block_mask=state["mask"], enable_gqa=case.heads != case.kv_heads)

    return run


def measure(case: Case, options: Options) -> dict[str, Figures]:
    """{contender: figures}; a contender that cannot run has the reason instead."""
    q, k, v = case.tensors(options.device, options.dtype)
    runs = options.chosen(contenders(case, q, k, v, full=options.full))
    times, failures = forward_backward(runs, (q, k, v), options.clock)
    ceiling = matmul_tflops(options)
    figures: dict[str, Figures] = {name: {"not_measured": why} for name, why in failures.items()}
    for (way, found), flops in zip(times.items(), case.flops(), strict=True):
        for name, ms in found.items():
            speed = flops / ms * 1e-9
            more = {f"{way}_ms": ms, f"{way}_tflops": speed, f"{way}_share": speed / ceiling}
            figures.setdefault(name, {}).update(more)
    return figures


def group_ratio(case: Case, options: Options) -> Figures:
    """Forward + backward with groups compared with the best contender on the repeated-prompt layout."""
    figures = measure(case, options)
    peers = measure(case.repeated(), options)
    ours = {n: f["forward_ms"] + f["backward_ms"] for n, f in figures.items() if "forward_ms" in f}
    times = {n: f["forward_ms"] + f["backward_ms"] for n, f in peers.items() if "forward_ms" in f}
    if not ours or not times:
        return {"groups": figures, "repeated": peers}
    best = min(times, key=times.__getitem__)
    return {
        "groups": figures,
        "repeated": peers,
        "best_repeated": best,
        "ratio": times[best] / min(ours.values()),
        "goal_ratio": 2.5,
    }


def record_choice(case: Case, figures: dict[str, Figures]) -> None:
    """Write which contender was fastest into the table that `backend="auto"` reads, for inference and for training."""
    names = {"fastvst": TRITON, "fastvst-gluon": GLUON, **{name: name for name in LIBRARIES}}
    timed = {names[n]: f for n, f in figures.items() if n in names and "forward_ms" in f}
    if TRITON not in timed:
        return
    capability = torch.cuda.get_device_capability()
    source = f"measured by python -m bench.gpu.attention, {time.strftime('%Y-%m-%d')}, {case.name}"
    for training in (False, True):
        key = Call(
            capability,
            torch.cuda.get_device_name(),
            case.width,
            training,
            case.prompts is not None,
            case.tokens // len(case.lengths),
        )
        record(key, {n: f["forward_ms"] + training * f["backward_ms"] for n, f in timed.items()}, source)


def cases(options: Options, *, save: bool = False) -> Cases:
    """Every case; with `save` the fastest contender goes into the table of `backend="auto"`."""

    def work(case: Case) -> Figures:
        found = measure(case, options) if case.prompts is None else group_ratio(case, options)
        if save:
            record_choice(case, found if case.prompts is None else found["groups"])
        return found

    for case in TINY_CASES if options.dry else CASES:
        yield case.name, lambda case=case: work(case)


def main(argv: list[str]) -> int:
    """The command line; --record as well as those of every block."""
    save = "--record" in argv
    return command("attention", lambda o: cases(o, save=save), __doc__, [word for word in argv if word != "--record"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
