"""What the emulator reports."""

from __future__ import annotations

KINDS = {
    "deadlock": "all partitions wait and nothing is in flight",
    "unordered read": "a read that nothing orders after the write of the same shared memory",
    "overwrite": "a write to shared memory that nothing orders after its earlier readers or writers",
    "uninitialised read": "a read of shared memory that nobody wrote",
    "missing fence": "an asynchronous read of what ordinary stores wrote, without fence_async_shared() between them",
    "tma box": "a TMA box outside the tensor, at an unaligned column, or of another shape than the shared memory",
    "expect bytes": "the bytes that arrive at a barrier are not those that were expected",
    "barrier count": "more arrivals in one phase than the barrier's count",
    "barrier initialised twice": "mbarrier.init() of a barrier that is in use",
    "barrier not initialised": "use of a barrier before mbarrier.init() or after mbarrier.invalidate()",
    "shared memory": "more shared memory than the device has",
    "accumulator in flight": "use of an accumulator before the wait that completes its wgmma",
    "in flight at the end": "the program ends before a wait for an asynchronous operation",
    "global memory": "a load or store outside the tensor's memory",
    "integer overflow": "a 32-bit integer that does not hold its value",
    "layout": "operands of different layouts, or an operand that wgmma cannot read",
    "index": "an index outside a shared memory buffer",
}


class Hazard(AssertionError):
    """A fault of a kernel. `kind` is one of `KINDS`; the message says where."""

    def __init__(self, kind: str, message: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of hazard {kind!r}; expected one of {sorted(KINDS)}")
        super().__init__(f"{kind}: {message}")
        self.kind = kind
