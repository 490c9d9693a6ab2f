"""CUDA graphs of whole decode steps, one for each bucket of sizes.

A graph replays kernels on fixed addresses: those of the parameters (optimizers write in place, so graphs survive their
steps), of the KV pages and of the `DecodeState` of its bucket. Tokens, positions and lengths of the next step are
written inside the graph, so a batch is loaded into the state once, and then its steps follow each other without the
host.

The prompts have a bucket of their own: shared-prompt attention divides its keys by the number of prompts, and with one
prompt for each row of padding it would not divide them at all (3B, 256 completions of 32 prompts: 64 programs on 132
multiprocessors, and 320 with the number of prompts in the key).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.rollout.decode import DecodeState, Sizes, decode_step
from fastvst.rollout.decode_batch import DecodeBatch
from fastvst.rollout.kv_cache import PagePool

# Rows of a graph: doubling up to 16, then in steps of 8, 16 and 32. Padding stays below half of the rows, and below 1/5
# from 64 rows on.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128)
STEP = 32
PROMPT_STEP = 8  # of prompts, up to 64 of them; few prompts are divided into splits, so padding costs programs

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # a function -> what does the same again


def bucket(rows: int) -> int:
    """The smallest bucket that holds that many rows."""
    return next((b for b in BUCKETS if b >= rows), -(-rows // STEP) * STEP)


def prompt_bucket(prompts: int) -> int:
    """The same for prompts: a power of two up to 8, multiples of 8 up to 64, then as rows."""
    if prompts <= PROMPT_STEP:
        return power_of_two(prompts)
    return -(-prompts // PROMPT_STEP) * PROMPT_STEP if prompts <= 64 else bucket(prompts)


def power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def bucketed(sizes: Sizes) -> Sizes:
    """The sizes of the bucket of a batch: at least as large, and few different ones.

    There is a row of padding for each filter of padding, and a group for every `most` rows of padding.
    """
    filtered = sizes.filtered
    rows = bucket(sizes.rows)
    if filtered == sizes.rows:
        filtered = rows
    elif filtered:
        filtered = power_of_two(filtered)
        rows = bucket(sizes.rows + filtered - sizes.filtered)
    most = min(rows, power_of_two(sizes.most))
    return Sizes(
        rows=rows,
        own=power_of_two(sizes.own),
        groups=prompt_bucket(sizes.groups - (sizes.rows - rows) // most),
        prompt=power_of_two(sizes.prompt),
        most=most,
        filtered=filtered,
        allowed=power_of_two(sizes.allowed) if sizes.allowed else 0,
        places=power_of_two(sizes.places) if sizes.places else 0,
        flags=sizes.flags,
    )


class CudaCapture:
    """Captures functions as CUDA graphs that share a memory pool and one stream.

    Warm-up and capture run on the same stream. A stream of its own for each capture would cost a workspace of cuBLAS
    (32 MiB on Hopper) that nobody frees, for up to 32 streams.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run the function twice, which compiles kernels and creates library handles, then capture it."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (which encode prompts) may allocate page-locked memory during a capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay


class DecodeGraphs:
    """Graphs of one model on one page pool, captured at the first batch of each bucket.

    Attributes:
        captures: number of graphs captured so far.
    """

    def __init__(
        self,
        model: Qwen25VL,
        pool: PagePool,
        forbidden: Tensor,
        make_capture: Callable[[], Capture] = CudaCapture,
    ) -> None:
        """
        Args:
            forbidden: (f,) int64 tokens that are never drawn.
            make_capture: of a new pool of memory. Without a GPU `lambda: lambda function: function` runs the same
                function on the same states.
        """
        self.model = model
        self.pool = pool
        self.forbidden = forbidden
        self.captures = 0
        self._make_capture = make_capture
        self._capture: Capture | None = None
        self._graphs: dict[Sizes, tuple[DecodeState, Callable[[], None]]] = {}
        self._addresses: tuple[int, ...] = ()

    def place(self, batch: DecodeBatch) -> None:
        """Load a batch into the state of its bucket, whose graph is captured if there is none."""
        self._check_addresses()
        sizes = bucketed(batch.sizes)
        if sizes not in self._graphs:
            self._graphs[sizes] = self._captured(sizes, batch)
        batch.place(self._graphs[sizes][0])

    def replay(self, batch: DecodeBatch) -> None:
        """One step of a batch that has been placed."""
        assert batch.state is not None
        self._graphs[batch.state.sizes][1]()

    def _check_addresses(self) -> None:
        """Drop all graphs if a parameter has a new address.

        The next ones get a new pool: torch asserts that a pool is in use when it is captured into again, and the
        workspace of cuBLAS that was allocated in the old one keeps it alive.
        """
        now = tuple(p.data_ptr() for p in self.model.parameters())
        if now != self._addresses:
            self._graphs.clear()
            self._addresses = now
            self._capture = None

    def _captured(self, sizes: Sizes, batch: DecodeBatch) -> tuple[DecodeState, Callable[[], None]]:
        self._capture = self._capture or self._make_capture()
        state = DecodeState(sizes, self.model.config.vocab_size, self.pool.keys.device, batch.rows)

        def step() -> None:
            decode_step(self.model, self.pool, state, self.forbidden)

        replay = self._capture(step)  # of padding only, which writes page 0
        self.captures += 1
        return state, replay
