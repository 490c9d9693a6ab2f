"""Bytes that a block keeps for the backward pass and needs in it, counted by running it on tensors without memory.

The block runs on fake CPU tensors, and hooks on saved tensors count what autograd keeps. A storage counts once, however
often it is saved; parameters do not count. The kernels on a GPU keep the same, except for the logsumexp of the windows
(4 bytes a head).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvst.model.config import ModelConfig
from fastvst.model.decoder import DecoderLayer
from fastvst.model.layers import run_block
from fastvst.model.live_bytes import LiveBytes
from fastvst.model.recompute import of_blocks
from fastvst.model.vision import VisionBlock
from fastvst_kernels import packed_attention

ROWS = (1024, 2048)  # the difference of two sizes contains only what grows with the rows
WINDOW = 64  # patches in a window of the published models


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
    return _slope(lambda rows: _kept(_layer(config, policy, rows, dtype)))


@functools.cache
def block_bytes(config: ModelConfig, policy: str, dtype: torch.dtype, *, windowed: bool) -> float:
    """Bytes for each patch that one block of the vision tower keeps under "none", "light" or "full"."""
    return _slope(lambda rows: _kept(_block(config, policy, rows, dtype, windowed)))


@functools.cache
def layer_work(config: ModelConfig, policy: str, dtype: torch.dtype, tokens: int, *, trained: bool = True) -> int:
    """The most bytes that the backward pass of a decoder layer holds beyond what it keeps.

    Gradients of the output and of the parameters count, and with "full" what the layer computes again.

    Args:
        trained: False = the parameters have no gradients.
    """
    return _work(_layer(config, policy, tokens, dtype), trained)


@functools.cache
def block_work(config: ModelConfig, policy: str, dtype: torch.dtype, patches: int, *, trained: bool = True) -> int:
    """`layer_work` of a block of the vision tower with attention in whole frames, which holds the most."""
    return _work(_block(config, policy, patches, dtype, False), trained)


class _Subject(NamedTuple):
    """A block on tensors without memory.

    Attributes:
        forward: runs the block on its input under a policy.
        x: (rows, width), the input.
        known: tensors of the batch, which are no part of the block.
    """

    mode: FakeTensorMode
    block: nn.Module
    forward: Callable[[Tensor], Tensor]
    x: Tensor
    known: tuple[Tensor, ...]


def _layer(config: ModelConfig, policy: str, rows: int, dtype: torch.dtype) -> _Subject:
    """A layer of the decoder."""
    with torch.device("meta"):
        layer = DecoderLayer(config, 0)
    with FakeTensorMode() as mode:
        positions = torch.zeros(3, rows, dtype=torch.int32)
        offsets = torch.zeros(2, dtype=torch.int32)
        x = torch.empty(rows, config.hidden_size, dtype=dtype, requires_grad=True)
        _fake_parameters(layer, dtype)

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, offsets, causal=True, max_seqlen=rows)

    def forward(x: Tensor) -> Tensor:
        return run_block(layer, policy, x, positions, attend)

    return _Subject(mode, layer, forward, x, (positions, offsets))


def _block(config: ModelConfig, policy: str, rows: int, dtype: torch.dtype, windowed: bool) -> _Subject:
    """A block of the vision tower."""
    longest = WINDOW if windowed else rows
    with torch.device("meta"):
        block = VisionBlock(config.vision, windowed=windowed)
    with FakeTensorMode() as mode:
        positions = torch.zeros(rows, 2, dtype=torch.int32)
        offsets = torch.zeros(rows // longest + 1, dtype=torch.int32)
        x = torch.empty(rows, config.vision.hidden_size, dtype=dtype, requires_grad=True)
        _fake_parameters(block, dtype)

    def forward(x: Tensor) -> Tensor:
        return run_block(block, policy, x, positions, offsets, longest)

    return _Subject(mode, block, forward, x, (positions, offsets))


def _fake_parameters(block: nn.Module, dtype: torch.dtype) -> None:
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))


def _slope(run: Callable[[int], int]) -> float:
    few, many = ROWS
    return (run(many) - run(few)) / (many - few)


def _kept(subject: _Subject) -> int:
    """Bytes of the storages that the forward pass saves: its input counts, known tensors and parameters do not."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # the reference keeps the storage alive and its key unique
        return tensor

    with subject.mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        subject.forward(subject.x)
    excluded = {t.untyped_storage()._cdata for t in (*subject.block.parameters(), *subject.known)}
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in excluded)


def _work(subject: _Subject, trained: bool) -> int:
    subject.block.requires_grad_(trained)
    with subject.mode, LiveBytes() as live:
        live.see(subject.x, *subject.block.parameters(), *subject.known)
        y = subject.forward(subject.x)
        before = live.reset()
        y.backward(torch.empty_like(y))
    return live.peak - before  # y counts in both: the block above has freed it by then
