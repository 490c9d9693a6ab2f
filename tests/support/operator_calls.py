"""One small call of every public operator, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastvst_kernels
from fastvst_kernels.objectives import DAPO

OFFSETS = torch.tensor([0, 5, 12], dtype=torch.int32)
CLASSES = ("AttentionPlan", "LinearCrossEntropyLoss", "LinearLogProbs", "LinearPolicyLoss", "VocabularyShard")


def operator_names() -> list[str]:
    """Every public function of the package: a new one without a call here fails the tests."""
    return [name for name in fastvst_kernels.__all__ if name not in CLASSES]


def operator_call(name: str) -> dict[str, Any]:
    """The arguments of a call, all dense float32."""
    torch.manual_seed(0)
    call: dict[str, Any] = CALLS[name]()
    return call


def _attention() -> dict[str, Any]:
    return {
        "q": torch.randn(12, 4, 16),
        "k": torch.randn(12, 2, 16),
        "v": torch.randn(12, 2, 16),
        "cu_seqlens": OFFSETS.clone(),
        "groups": torch.tensor([-1, 0], dtype=torch.int32),
        "causal": True,
    }


def _decode() -> dict[str, Any]:
    return {
        "q": torch.randn(3, 4, 16),
        "k_pages": torch.randn(6, 4, 2, 16),
        "v_pages": torch.randn(6, 4, 2, 16),
        "page_table": torch.tensor([[1, 2], [3, 4], [5, 0]], dtype=torch.int32),
        "lengths": torch.tensor([6, 3, 8], dtype=torch.int32),
        "prefix_pages": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "prefix_lengths": torch.tensor([5, 7], dtype=torch.int32),
        "group_offsets": torch.tensor([0, 2, 3], dtype=torch.int32),
        "max_group": 2,
    }


def _head() -> dict[str, Any]:
    targets = torch.randint(0, 40, (12,))
    targets[3] = -100
    return {"hidden": torch.randn(12, 32), "weight": torch.randn(40, 32), "targets": targets}


def _policy() -> dict[str, Any]:
    names = ("advantages", "old_logprobs", "row_weights")
    return _head() | {"objective": DAPO()} | {name: torch.rand(12) for name in names}


def _sample() -> dict[str, Any]:
    return {
        "hidden": torch.randn(6, 32),
        "weight": torch.randn(40, 32),
        "seeds": torch.arange(6) * 7919,
        "steps": torch.arange(6),
        "temperature": torch.rand(6) + 0.5,
        "forbidden": torch.tensor([3, 9]),
        "penalty": torch.rand(6) + 1,
        "seen": torch.rand(6, 40) > 0.7,
        "filtered": torch.tensor([1, 4]),
        "top_k": torch.tensor([5, 40]),
        "top_p": torch.tensor([0.9, 0.8]),
        "min_p": torch.tensor([0.0, 0.1]),
    }


def _mrope() -> dict[str, Any]:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "sections": (2, 3, 3), "theta": 1e4}
    return {"qkv": torch.randn(12, 128), "bias": torch.randn(128), "positions": torch.randint(0, 99, (3, 12))} | sizes


def _vision() -> dict[str, Any]:
    sizes = {"positions": torch.randint(0, 50, (12, 2)), "num_heads": 2}
    return {"qkv": torch.randn(12, 96), "bias": torch.randn(96)} | sizes


def _rotary() -> dict[str, Any]:
    tables = {"cos": torch.randn(12, 8), "sin": torch.randn(12, 8)}
    return {"q": torch.randn(12, 4, 16), "k": torch.randn(12, 2, 16)} | tables | {"rotary_dim": 8}


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "add_rms_norm": lambda: {"x": torch.randn(12, 32), "residual": torch.randn(12, 32)} | _norm_weight(),
    "attention_reference": lambda: _attention() | {"scale": 0.25},
    "decode_attention": _decode,
    "linear_cross_entropy": lambda: _head() | {"row_weights": torch.rand(12)},
    "linear_logprobs": _head,
    "linear_policy_loss": _policy,
    "mrope": _mrope,
    "packed_attention": _attention,
    "packed_linear": lambda: {"x": torch.randn(12, 32), "weights": _list(5, 32), "biases": _list(5)},
    "prepare": lambda: {name: x for name, x in _attention().items() if name in ("cu_seqlens", "groups", "causal")},
    "rms_norm": lambda: {"x": torch.randn(12, 32)} | _norm_weight(),
    "rotary_embedding": _rotary,
    "sample_tokens": _sample,
    "swiglu": lambda: {"gate": torch.randn(12, 32), "up": torch.randn(12, 32)},
    "vision_rope": _vision,
    "window_attention": lambda: _vision() | {"cu_windows": OFFSETS.clone(), "max_window": 7},
}


def _norm_weight() -> dict[str, Any]:
    return {"weight": torch.randn(32), "eps": 1e-6}


def _list(*shape: int) -> list[Tensor]:
    return [torch.randn(shape), torch.randn(shape)]


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors in an operator's result."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, fastvst_kernels.AttentionPlan):
        return [*result.queries.values(), *result.keys.values()]
    values = result.values() if isinstance(result, dict) else result
    return [x for value in values for x in tensors_of(value)]


def _transposed(x: Tensor) -> Tensor:
    last = x.unsqueeze(-1) if x.dim() == 1 else x
    order = list(reversed(range(last.dim())))
    strided = last.permute(order).contiguous().permute(order)
    return strided.squeeze(-1) if x.dim() == 1 else strided


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_zeros([2 * size + 1 for size in x.shape])
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _offset(x: Tensor) -> Tensor:
    return x.new_zeros(x.numel() + 3)[3:].copy_(x.flatten()).view(x.shape)


def _rows_apart(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)[..., : x.shape[-1]].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "sliced": _sliced,
    "rows apart": _rows_apart,
    "negative step": lambda x: x.flip(0).contiguous()[torch.arange(len(x) - 1, -1, -1)],
    "storage offset": _offset,
}


def expanded(x: Tensor) -> Tensor:
    """All rows are the first one, with stride 0."""
    return x[:1].expand(x.shape)
