"""Norms, SwiGLU, M-RoPE and windows on a GPU, with their peers: `python -m bench.gpu.pointwise --out FILE`.

Every contender of a case runs in one process, on the same tensors, in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from bench.cases.pointwise import GPU_CASES, TINY_CASES, Case
from bench.gpu.block import Cases, Figures, Options, command
from bench.gpu.ceilings import copy_tbps
from bench.gpu.clock import clock_of, milliseconds


def measure(case: Case, options: Options) -> dict[str, Figures]:
    """{contender: milliseconds, TB/s and share of the copy bandwidth}; one that cannot run has the reason."""
    inputs, contenders = case.make(options.device, options.dtype)
    figures: dict[str, Figures] = {}
    runs: dict[str, Callable[[], object]] = {}
    backwards: dict[str, Callable[[], object]] = {}
    for name, run in contenders.items():
        try:
            out = run()
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            grads = [torch.randn_like(x) for x in outs]
            torch.autograd.grad(outs, inputs, grads, retain_graph=True)
        except Exception as error:  # a peer without this case must not end the run; the reason is written
            figures[name] = {"not_measured": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        runs[name] = torch.no_grad()(run)
        backwards[name] = lambda outs=outs, grads=grads: torch.autograd.grad(outs, inputs, grads, retain_graph=True)
    clock = clock_of(options.device)
    ceiling = copy_tbps(options)
    times = {"forward": milliseconds(runs, clock), "backward": milliseconds(backwards, clock)}
    sizes = {"forward": case.bytes_forward, "backward": case.bytes_backward}
    for name in runs:
        figures[name] = {}
        for way in times:
            speed = sizes[way] / times[way][name] * 1e-9
            figures[name] |= {
                f"{way}_ms": times[way][name],
                f"{way}_tbps": speed,
                f"{way}_share": speed / ceiling,
            }
    figures["goal"] = {"forward": case.goal_forward, "backward": case.goal_backward}
    return figures


def cases(options: Options) -> Cases:
    """Every operator at the sizes of the models."""
    for case in TINY_CASES if options.dry else GPU_CASES:
        yield case.name, lambda case=case: measure(case, options)


if __name__ == "__main__":
    sys.exit(command("pointwise", cases, __doc__))
