"""Layers that take the place of a transformers model's own: same parameters, same names in the state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvst_kernels.activation.op import swiglu
from fastvst_kernels.lm_head.cross_entropy import linear_cross_entropy
from fastvst_kernels.norm.op import rms_norm

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))


class Replacement(nn.Module):
    """A layer that shares the parameters and submodules of the layer that it replaces.

    `original` keeps that layer out of the module tree, so that parameters and the state dict do not change. Hooks of
    that layer are hooks of this one.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._kept = [original]  # a list: nn.Module would register a module
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in original.named_children():
            self.add_module(name, child)
        vars(self).update({name: vars(original)[name] for name in HOOKS})  # the same dicts: handles still remove
        self.train(original.training)

    def restored(self) -> nn.Module:
        """The original layer with the parameters and submodules that this one has now."""
        (original,) = self._kept
        for name, parameter in self.named_parameters(recurse=False):
            original.register_parameter(name, parameter)
        for name, child in self.named_children():
            original.add_module(name, child)
        return original.train(self.training)


class RMSNorm(Replacement):
    """`weight * x / sqrt(mean(x^2) + eps)` in float32."""

    weight: Tensor

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.variance_epsilon = original.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GatedMLP(Replacement):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`; the backward pass keeps no activation."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FusedHead(Replacement):
    """The LM head. In a training step with labels it passes hidden states on to `loss`, which computes no logits.

    Attributes:
        skips: whether the product is left out; hooks of the model set it for the time of one call.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original)
        if original.bias is None:
            self.bias = None
        self.skips = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.skips else nn.functional.linear(hidden_states, self.weight, self.bias)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """transformers' `ForCausalLMLoss`; `logits` are the hidden states (B, T, H) while `skips` is set."""
        if not self.skips:
            from transformers.loss.loss_utils import ForCausalLMLoss

            count: Any = num_items_in_batch  # an int, too, whatever the host's annotation says
            plain: Tensor = ForCausalLMLoss(logits, labels, vocab_size, count, ignore_index, shift_labels, **others)
            return plain
        if shift_labels is None:
            if labels is None:
                raise ValueError("the loss got neither labels nor shift_labels")
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.flatten().to(logits.device)
        targets = targets.masked_fill(targets == ignore_index, -100)
        weights = None
        if num_items_in_batch is not None:
            weights = torch.ones(targets.shape, device=logits.device) / num_items_in_batch
        return linear_cross_entropy(
            logits.reshape(-1, logits.shape[-1]), self.weight, targets, bias=self.bias, row_weights=weights
        )
