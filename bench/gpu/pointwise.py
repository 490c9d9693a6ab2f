"""Norms, SwiGLU, M-RoPE and windows on a GPU, with their peers: `python -m bench.gpu.pointwise --out FILE`.

Every contender of a case runs in one process, on the same tensors, in turns.
"""

from __future__ import annotations

import sys

from bench.cases.pointwise import GPU_CASES, TINY_CASES, Case
from bench.gpu.block import Cases, Figures, Options, command
from bench.gpu.ceilings import copy_tbps
from bench.gpu.clock import forward_backward


def measure(case: Case, options: Options) -> dict[str, Figures]:
    """{contender: milliseconds, TB/s and share of the copy bandwidth}; one that cannot run has the reason."""
    inputs, contenders = case.make(options.device, options.dtype)
    if not options.full:
        contenders.pop("torch.compile", None)
    times, failures = forward_backward(options.chosen(contenders), inputs, options.clock)
    ceiling = copy_tbps(options)
    figures: dict[str, Figures] = {name: {"not_measured": why} for name, why in failures.items()}
    for (way, found), size in zip(times.items(), (case.bytes_forward, case.bytes_backward), strict=True):
        for name, ms in found.items():
            speed = size / ms * 1e-9
            more = {f"{way}_ms": ms, f"{way}_tbps": speed, f"{way}_share": speed / ceiling}
            figures.setdefault(name, {}).update(more)
    figures["goal"] = {"forward": case.goal_forward, "backward": case.goal_backward}
    return figures


def cases(options: Options) -> Cases:
    """Every operator at the sizes of the models."""
    for case in TINY_CASES if options.dry else GPU_CASES:
        yield case.name, lambda case=case: measure(case, options)


if __name__ == "__main__":
    sys.exit(command("pointwise", cases, __doc__))
