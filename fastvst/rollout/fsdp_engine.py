"""The engine on every rank of an FSDP2 model: parameters gathered once per rollout phase, prompts divided by work.

Between phases each rank holds only its shard. At the start of a phase every parameter is gathered once into a plain
model, because FSDP2's own unsharded buffers move with every all-gather, and decoding calls each layer thousands of
times. The plain model is freed at the end. With `keep=True` it stays with the KV cache, and later phases copy into the
same memory: then its addresses, and the CUDA graphs captured on them, survive optimizer steps.
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
from fastvst.rollout.engine import Engine, EngineConfig, prompt_tokens
from fastvst.rollout.request import Rollout, RolloutError, SamplingParams, params_of_each

if TYPE_CHECKING:
    from fastvst.data.processor import Processor


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes before a phase, while the parameters are gathered, and after the phase.

    On CUDA: what torch has allocated on the device. On the CPU: the bytes of the gathered parameters.
    """

    before: int
    gathered: int
    after: int


def is_sharded(model: Qwen25VL) -> bool:
    """Whether the parameters are DTensors, as `fastvst.train.distributed.place` leaves them with a mesh."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@torch.no_grad()
def gather_parameters(model: Qwen25VL, into: Qwen25VL | None = None, dtype: torch.dtype | None = None) -> Qwen25VL:
    """A plain model with the full parameters of a sharded one. This is a collective: every rank calls it.

    Args:
        into: the plain model of an earlier call; its memory is overwritten in place.
        dtype: of the plain model (the dtype in which the sharded one computes); default: that of the parameters.
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


def divide_by_work(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices for each rank: the largest item first, each to the rank with the least work so far (Graham, 1969)."""
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
        memory: of the last phase.
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
            dtype: of the gathered parameters, if the model is sharded.
            keep: keep the gathered parameters and the KV cache between phases, see the module's docstring.
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
        """Completions of all prompts, on every rank. Every rank passes the same prompts and params.

        Args:
            progress: called for this rank's prompts as they finish.

        Raises:
            RolloutError: on every rank, if any rank failed; names the ranks and their errors.
        """
        each = params_of_each(params, len(prompts))
        many = dist.is_initialized() and dist.get_world_size() > 1
        rank, size = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        before = self._allocated()
        engine = self._gathered()
        gathered = self._allocated()
        made: dict[int, list[Rollout]] = {}
        problem = ""
        try:
            mine = divide_by_work([self._work(p, q) for p, q in zip(prompts, each, strict=True)], size)[rank]

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
            self._free()
            self.memory = PhaseMemory(before, gathered, self._allocated())
        if not many:
            return [made[i] for i in range(len(prompts))]
        # Every rank gets here, even after an error: the others would wait for it until their timeout.
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, (problem, made))
        problems = [p for p, _ in parts if p]
        if problems:
            raise RolloutError("; ".join(problems))
        together = {index: rollouts for _, part in parts for index, rollouts in part.items()}
        return [together[i] for i in range(len(prompts))]

    def _work(self, prompt: Sample | EncodedSample, params: SamplingParams) -> float:
        """Expected work in tokens: a prompt is computed once, each completion may reach its limit."""
        return prompt_tokens(prompt, self.processor) + params.n * params.max_tokens

    def _gathered(self) -> Engine:
        if not is_sharded(self.model):
            self._engine = self._engine or Engine(self.model, self.processor, self.config)
            return self._engine
        plain = gather_parameters(self.model, None if self._engine is None else self._engine.model, self.dtype)
        self._engine = self._engine or Engine(plain, self.processor, self.config)
        return self._engine

    def _free(self) -> None:
        if self._engine is None:
            return
        self._engine.release(keep=self.keep)
        if is_sharded(self.model) and not self.keep:
            self._engine = None

    def _allocated(self) -> int:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device)
        if self._engine is None or not is_sharded(self.model):
            return 0
        return sum(p.numel() * p.element_size() for p in self._engine.model.parameters())
