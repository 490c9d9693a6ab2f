"""Interleaved timing: contenders take turns in one process, so that a busy neighbour slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def interleaved(
    contenders: dict[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Best seconds of each contender over `rounds` turns. On a GPU each call is bracketed by synchronisation.

    Args:
        clock: `time.process_time` leaves out what other processes do; with one thread on a CPU only.
    """
    best = dict.fromkeys(contenders, float("inf"))
    names = list(contenders)
    for turn in range(warmup + rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:  # each round begins with the next one
            _synchronise()
            begin = clock()
            contenders[name]()
            _synchronise()
            if turn >= warmup:
                best[name] = min(best[name], clock() - begin)
    return best


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
