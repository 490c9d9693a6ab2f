"""Bytes that a block keeps for the backward pass, counted by running it on tensors without memory.

The block runs on fake CPU tensors, and hooks on saved tensors count what autograd keeps. A storage counts once, however
often it is saved; parameters do not count. The kernels on a GPU keep the same, except for the logsumexp of the windows
(4 bytes a head).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvst.model.config import ModelConfig
from fastvst.model.decoder import DecoderLayer
from fastvst.model.layers import run_block
from fastvst.model.recompute import of_blocks
from fastvst.model.vision import VisionBlock
from fastvst_kernels import packed_attention

ROWS = (1024, 2048)  # the difference of two sizes contains only what grows with the rows


def decoder_bytes_per_token(config: ModelConfig, recompute: str, dtype: torch.dtype) -> float:
    """Bytes for each token that all layers of the decoder keep under its recompute policy."""
    return sum(layer_bytes(config, policy, dtype) for policy in of_blocks(recompute, config.num_hidden_layers))


def vision_bytes_per_patch(config: ModelConfig, recompute: str, dtype: torch.dtype) -> float:
    """Bytes for each patch that all blocks of the vision tower keep under its recompute policy."""
    full = set(config.vision.fullatt_block_indexes)
    policies = of_blocks(recompute, config.vision.depth)
    return sum(block_bytes(config, p, dtype, windowed=i not in full) for i, p in enumerate(policies))


@functools.cache
def layer_bytes(config: ModelConfig, policy: str, dtype: torch.dtype) -> float:
    """Bytes for each token that one layer of the decoder keeps under "none", "light" or "full"."""

    def run(rows: int) -> int:
        with torch.device("meta"):
            layer = DecoderLayer(config, 0)

        def forward(x: Tensor) -> Tensor:
            positions = torch.zeros(3, rows, dtype=torch.int32)
            offsets = torch.zeros(2, dtype=torch.int32)

            def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return packed_attention(q, k, v, offsets, causal=True, max_seqlen=rows)

            known.extend((positions, offsets))
            return run_block(layer, policy, x, positions, attend)

        known: list[Tensor] = []  # tensors of the batch, not of a layer
        return _kept(layer, forward, rows, config.hidden_size, dtype, known)

    return _slope(run)


@functools.cache
def block_bytes(config: ModelConfig, policy: str, dtype: torch.dtype, *, windowed: bool) -> float:
    """Bytes for each patch that one block of the vision tower keeps under "none", "light" or "full"."""
    v = config.vision

    def run(rows: int) -> int:
        with torch.device("meta"):
            block = VisionBlock(v, windowed=windowed)
        longest = 64 if windowed else rows

        def forward(x: Tensor) -> Tensor:
            positions = torch.zeros(rows, 2, dtype=torch.int32)
            offsets = torch.zeros(rows // longest + 1, dtype=torch.int32)
            known.extend((positions, offsets))
            return run_block(block, policy, x, positions, offsets, longest)

        known: list[Tensor] = []
        return _kept(block, forward, rows, v.hidden_size, dtype, known)

    return _slope(run)


def _slope(run: Callable[[int], int]) -> float:
    few, many = ROWS
    return (run(many) - run(few)) / (many - few)


def _kept(
    block: nn.Module,
    forward: Callable[[Tensor], Tensor],
    rows: int,
    width: int,
    dtype: torch.dtype,
    known: list[Tensor],
) -> int:
    """Bytes of the storages that `forward` saves: its input counts, `known` tensors and parameters do not."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # the reference keeps the storage alive and its key unique
        return tensor

    with FakeTensorMode():
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=dtype)
                setattr(module, name, nn.Parameter(fake))
        x = torch.empty(rows, width, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(x)
    excluded = {t.untyped_storage()._cdata for t in (*block.parameters(), *known)}
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in excluded)
