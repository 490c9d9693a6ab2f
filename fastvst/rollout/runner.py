"""Computes what the scheduler has decided: prompts into pages, and one token for every completion of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.rollout.batch_invariant import (
    batch_invariant,
    bitwise_chunk_attention,
    bitwise_forward,
    bitwise_next_tokens,
)
from fastvst.rollout.cuda_graphs import DecodeGraphs
from fastvst.rollout.decode import DecodeState, NextTokens, decode_step, forward_tables
from fastvst.rollout.decode_batch import DecodeBatch, seen_tokens
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.prefill import ChunkAttention, fast_chunk_attention, run_chunks
from fastvst.rollout.sampler import Drawn, make_rows, next_tokens
from fastvst.rollout.scheduler import DecodeWork, PrefillWork, Work
from fastvst.rollout.vision_cache import VisionCache, embed_prompts
from fastvst_kernels.shared.tensors import send


@dataclass(frozen=True)
class Numerics:
    """The parts of a step that differ between fast and bitwise numerics.

    Attributes:
        context: a context manager around every computation.
        chunk_attention: attention of prompt chunks.
        forward: (model, batch) -> (B, hidden) of one decode step of a batch that has been placed.
        next_tokens: as `sampler.next_tokens`.
        graphs: whether decode steps may be replayed as CUDA graphs.
    """

    context: Callable[[], Any]
    chunk_attention: ChunkAttention
    forward: Callable[[Qwen25VL, DecodeBatch], Tensor]
    next_tokens: NextTokens
    graphs: bool


def fast_forward(model: Qwen25VL, batch: DecodeBatch) -> Tensor:
    """(B, hidden) of one decode step."""
    assert batch.state is not None
    return forward_tables(model, batch.pool, batch.state.tables, batch.decode_pieces())


NUMERICS = {
    "fast": Numerics(contextlib.nullcontext, fast_chunk_attention, fast_forward, next_tokens, graphs=True),
    "bitwise": Numerics(batch_invariant, bitwise_chunk_attention, bitwise_forward, bitwise_next_tokens, graphs=False),
}


class Runner:
    """Runs the steps of one model on one page pool. It changes prompts and pages, but no completion."""

    def __init__(
        self, model: Qwen25VL, pool: PagePool, vision: VisionCache, numerics: str = "fast", cuda_graphs: bool = True
    ) -> None:
        """
        Args:
            numerics: a key of NUMERICS.
            cuda_graphs: use CUDA graphs if device and numerics allow it.
        """
        self.model = model
        self.pool = pool
        self.numerics = NUMERICS[numerics]
        self.vision = vision
        self.device = pool.keys.device
        placeholders = [model.config.image_token_id, model.config.video_token_id]
        self.forbidden = torch.tensor(placeholders, device=self.device)
        self.graphs: DecodeGraphs | None = None
        if cuda_graphs and self.numerics.graphs and self.device.type == "cuda":
            self.graphs = DecodeGraphs(model, pool, self.forbidden)

    def run(self, work: Work) -> Drawn | Tensor | None:
        """The next token of each of `work.completions`, on the device (a decode step's as `DecodeState.out`).

        None if there are none.
        """
        with self.numerics.context(), torch.no_grad():
            return self._decode(work) if isinstance(work, DecodeWork) else self._prefill(work)

    def _prefill(self, work: PrefillWork) -> Drawn | None:
        if work.chunks:
            embed_prompts(self.model, [c.prompt for c in work.chunks if c.prompt.embedded is None], self.vision)
            run_chunks(self.model, self.pool, work.chunks, self.numerics.chunk_attention)
        completions = work.completions
        if not completions:
            return None
        vocabulary = self.model.config.vocab_size
        hidden = torch.stack([c.prompt.last_hidden for c in completions])  # type: ignore[misc]
        rows = make_rows([c.params for c in completions], [c.seed for c in completions], vocabulary, self.device)
        seen = None if rows.penalty is None else send(seen_tokens(completions, vocabulary), self.device)
        steps = torch.zeros(len(completions), dtype=torch.int64, device=self.device)
        return self.numerics.next_tokens(hidden, self.model.head_weight, rows, steps, self.forbidden, seen)

    def _decode(self, work: DecodeWork) -> Tensor:
        batch = work.batch
        if batch.state is None:
            self._place(batch)
        state = batch.state
        assert state is not None
        if batch.table_changed:
            state.write_pages(batch.host_table)
            batch.table_changed = False
        if self.graphs is not None:
            self.graphs.replay(batch)
        else:
            hidden = self.numerics.forward(self.model, batch)
            decode_step(self.model, self.pool, state, self.forbidden, hidden, self.numerics.next_tokens)
        return state.out

    def _place(self, batch: DecodeBatch) -> None:
        """Load a batch into a state on the device."""
        if self.graphs is not None:
            self.graphs.place(batch)
        else:
            batch.place(DecodeState(batch.sizes, self.model.config.vocab_size, self.device, batch.rows))
