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
from fastvst.rollout.decode import DecodeBatch, forward_tables, seen_tokens
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.prefill import ChunkAttention, fast_chunk_attention, run_chunks
from fastvst.rollout.sampler import Drawn, SamplingRows, make_rows, next_tokens
from fastvst.rollout.scheduler import DecodeWork, PrefillWork, Work
from fastvst.rollout.vision_cache import VisionCache, embed_prompts


@dataclass(frozen=True)
class Numerics:
    """The parts of a step that differ between fast and bitwise numerics.

    Attributes:
        context: a context manager around every computation.
        chunk_attention: attention of prompt chunks.
        forward: (model, batch) -> (B, hidden) of one decode step.
        next_tokens: as `sampler.next_tokens`.
        graphs: whether decode steps may be replayed as CUDA graphs.
    """

    context: Callable[[], Any]
    chunk_attention: ChunkAttention
    forward: Callable[[Qwen25VL, DecodeBatch], Tensor]
    next_tokens: Callable[[Tensor, Tensor, SamplingRows, Tensor, Tensor, Tensor | None], Drawn]
    graphs: bool


def fast_forward(model: Qwen25VL, batch: DecodeBatch) -> Tensor:
    """(B, hidden) of one decode step."""
    return forward_tables(model, batch.pool, batch.tables, batch.decode_pieces())


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
        self.graphs: DecodeGraphs | None = None
        if cuda_graphs and self.numerics.graphs and self.device.type == "cuda":
            self.graphs = DecodeGraphs(model, pool)
        placeholders = [model.config.image_token_id, model.config.video_token_id]
        self.forbidden = torch.tensor(placeholders, device=self.device)

    def run(self, work: Work) -> Drawn | None:
        """The next token of each of `work.completions`; None if there are none."""
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
        seen = None if rows.penalty is None else seen_tokens(completions, vocabulary).to(self.device)
        steps = torch.zeros(len(completions), dtype=torch.int64, device=self.device)
        return self._draw(hidden, rows, steps, seen)

    def _decode(self, work: DecodeWork) -> Drawn:
        batch = work.batch
        if self.graphs is None:
            hidden = self.numerics.forward(self.model, batch)
        else:
            if batch.age == 0:
                self.graphs.check_addresses()
            hidden = self.graphs.forward(batch.tables)
        return self._draw(hidden, batch.rows, batch.steps, batch.seen)

    def _draw(self, hidden: Tensor, rows: SamplingRows, steps: Tensor, seen: Tensor | None) -> Drawn:
        return self.numerics.next_tokens(hidden, self.model.head_weight, rows, steps, self.forbidden, seen)
