"""The engine on every rank of an FSDP2 model: parameters gathered once for a rollout phase, prompts shared out by work.

Between phases each rank holds its shard only. For a phase every parameter is gathered once into a plain model (FSDP2's
own unsharded buffers move with every all-gather, and decoding calls each layer thousands of times); afterwards it is
given back. With `keep=True` the plain model stays and later phases copy into the same memory, so that its addresses,
and with them captured CUDA graphs, survive optimizer steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastvst.batch import EncodedSample
from fastvst.data.sample import Sample
from fastvst.model import Qwen25VL
from fastvst.rollout.engine import Engine, EngineConfig
from fastvst.rollout.request import Rollout, RolloutError, SamplingParams

if TYPE_CHECKING:
    from fastvst.data.processor import Processor


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes before a phase, while the parameters are gathered, and after it.

    On CUDA what torch has allocated on the device; on the CPU the bytes of the gathered parameters.
    """

    before: int
    gathered: int
    after: int


def is_sharded(model: Qwen25VL) -> bool:
    """Whether the parameters are DTensors, as `fastvst.train.distributed.place` leaves them with a mesh."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@torch.no_grad()
def gather(model: Qwen25VL, into: Qwen25VL | None = None, dtype: torch.dtype | None = None) -> Qwen25VL:
    """A plain model with the whole parameters of a sharded one. A collective: every rank calls it.

    Args:
        into: a plain model of an earlier call, whose memory is written in place.
        dtype: of the plain model (the dtype that the sharded one computes in); default the parameters' own.
    """
    if into is None:
        with torch.device("meta"):
            into = Qwen25VL(model.config)
    targets = dict(into.named_parameters())
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        target = targets[name]
        if target.is_meta:
            whole[name] = full.to(dtype or full.dtype, copy=full.data_ptr() == parameter.data_ptr())
        else:
            target.copy_(full)
    if whole:
        into.load_state_dict(whole, assign=True)
        into.requires_grad_(False)
    return into


def share(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices for each rank: the largest first, each to the rank with the least work so far (Graham 1969)."""
    heap = [(0.0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, rank = heapq.heappop(heap)
        shares[rank].append(index)
        heapq.heappush(heap, (load + work[index], rank))
    return [sorted(s) for s in shares]


class ParallelEngine:
    """`generate` as `Engine` has it, over all ranks of the default process group (or alone without one).

    Attributes:
        memory: of the last phase. stats: of this rank's engine in the last phase.
    """

    def __init__(
        self,
        model: Qwen25VL,
        processor: Processor | None = None,
        config: EngineConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        keep: bool = False,
    ) -> None:
        """
        Args:
            dtype: of the gathered parameters, if the model is sharded. keep: see the module's text.
        """
        self.model = model
        self.processor = processor
        self.config = config or EngineConfig()
        self.dtype = dtype
        self.keep = keep
        self.memory = PhaseMemory(0, 0, 0)
        self._engine: Engine | None = None

    def generate(
        self,
        prompts: Sequence[Sample | EncodedSample],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, list[Rollout]], None] | None = None,
    ) -> list[list[Rollout]]:
        """Answers to all prompts, on every rank. Every rank gives the same prompts and params.

        Args:
            progress: called with this rank's prompts as they end.

        Raises:
            RolloutError: on every rank, where any rank's part failed; names the rank and its error.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        many = dist.is_initialized() and dist.get_world_size() > 1
        rank, size = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        before = self._allocated()
        engine = self._gathered()
        gathered = self._allocated()
        made: dict[int, list[Rollout]] = {}
        problem = ""
        try:
            mine = share([self._work(p, q) for p, q in zip(prompts, each, strict=True)], size)[rank]

            def relay(index: int, rollouts: list[Rollout]) -> None:
                if progress is not None:
                    progress(mine[index], rollouts)

            found = engine.generate([prompts[i] for i in mine], [each[i] for i in mine], progress=relay)
            made = dict(zip(mine, found, strict=True))
        except Exception as error:
            if not many:
                raise
            problem = f"rank {rank}: {type(error).__name__}: {error}"
        finally:
            self._give_back()
            self.memory = PhaseMemory(before, gathered, self._allocated())
        if not many:
            return [made[i] for i in range(len(prompts))]
        # Every rank comes here, also after an error: the others would wait for it until their time is over.
        everything: list[Any] = [None] * size
        dist.all_gather_object(everything, (problem, made))
        problems = [p for p, _ in everything if p]
        if problems:
            raise RolloutError("; ".join(problems))
        together = {index: rollouts for _, part in everything for index, rollouts in part.items()}
        return [together[i] for i in range(len(prompts))]

    def _work(self, prompt: Sample | EncodedSample, params: SamplingParams) -> float:
        """Expected work in tokens: a prompt token is computed once, an answer may go to its limit."""
        if isinstance(prompt, EncodedSample):
            tokens = len(prompt)
        elif self.processor is None:
            raise ValueError(f"{prompt.source}/{prompt.id} is a Sample; without a processor prompts are EncodedSamples")
        else:
            tokens = self.processor.measure(prompt, add_generation_prompt=True).tokens
        return tokens + params.n * params.max_tokens

    def _gathered(self) -> Engine:
        if not is_sharded(self.model):
            self._engine = self._engine or Engine(self.model, self.processor, self.config)
            return self._engine
        plain = gather(self.model, None if self._engine is None else self._engine.model, self.dtype)
        self._engine = self._engine or Engine(plain, self.processor, self.config)
        return self._engine

    def _give_back(self) -> None:
        if self._engine is None:
            return
        self._engine.release()
        if is_sharded(self.model) and not self.keep:
            self._engine = None

    def _allocated(self) -> int:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device)
        if self._engine is None or not is_sharded(self.model):
            return 0
        return sum(p.numel() * p.element_size() for p in self._engine.model.parameters())
