"""FlashAttention libraries behind one interface: flash-attn 4, 3 and 2, and the copy inside torch.

Each class calls the library's own forward and backward functions, because a shared prompt needs a backward with another
output and logsumexp than those of its forward (`library_op.py`). The signatures are those of Dao-AILab/flash-attention
at commit 0251105a (`flash_attn/cute/interface.py`, `hopper/flash_attn_interface.py`,
`flash_attn/flash_attn_interface.py`) and of torch 2.11's `aten::_flash_attention_forward`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvst_kernels.attention.plan import ForwardState

logger = logging.getLogger("fastvst_kernels")
Gradients = tuple[Tensor, Tensor, Tensor]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ranges:
    """Which queries see which keys in one call of a library: pair i of the offsets.

    Attributes:
        queries, keys: (n + 1,) int32 offsets on the device.
        longest_queries, longest_keys: the longest sequences, or an upper bound.
        causal: token i of the queries sees tokens 0..i of the keys; else all of them.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    causal: bool


class Library(Protocol):
    """One library: q (Tq, Hq, D), k and v (Tk, Hkv, D), output (Tq, Hq, D), logsumexp (Hq, Tq) float32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
        """Output and logsumexp."""
        ...

    def backward(self, dout: Tensor, state: ForwardState, ranges: Ranges, scale: float) -> Gradients:
        """dq, dk, dv, contiguous."""
        ...


class FlashAttention4:
    """`flash_attn.cute` (CuTe DSL): Hopper and Blackwell."""

    def __init__(self) -> None:
        self.functions: Any = importlib.import_module("flash_attn.cute.interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions._flash_attn_fwd(
            q, k, v, **_offsets(ranges), softmax_scale=scale, causal=ranges.causal, return_lse=True
        )
        return out, lse

    def backward(self, dout: Tensor, state: ForwardState, ranges: Ranges, scale: float) -> Gradients:
        dq, dk, dv, *_ = self.functions._flash_attn_bwd(
            *state[:4],
            dout,
            state.lse,
            softmax_scale=scale,
            causal=ranges.causal,
            **_offsets(ranges),
            deterministic=True,
        )
        return dq, dk, dv


class FlashAttention3:
    """`flash_attn_interface` (CUTLASS): Hopper."""

    def __init__(self) -> None:
        self.functions: Any = importlib.import_module("flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions._flash_attn_forward(
            q, k, v, **_offsets(ranges), softmax_scale=scale, causal=ranges.causal
        )
        return out, lse

    def backward(self, dout: Tensor, state: ForwardState, ranges: Ranges, scale: float) -> Gradients:
        grads = _new_gradients(state)
        self.functions._flash_attn_backward(
            dout,
            *state,
            **_offsets(ranges),
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
            softmax_scale=scale,
            is_causal=ranges.causal,
            deterministic=True,
        )
        return grads


class FlashAttention2:
    """`flash_attn`: Ampere and newer."""

    def __init__(self) -> None:
        self.functions: Any = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions._flash_attn_varlen_forward(
            q, k, v, **_offsets(ranges), dropout_p=0.0, softmax_scale=scale, causal=ranges.causal
        )
        return out, lse

    def backward(self, dout: Tensor, state: ForwardState, ranges: Ranges, scale: float) -> Gradients:
        grads = _new_gradients(state)
        self.functions._flash_attn_varlen_backward(
            dout,
            *state,
            *grads,
            **_offsets(ranges),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=ranges.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=True,
        )
        return grads


class TorchVarlen:
    """FlashAttention 2 as torch has it, under `torch.nn.attention.varlen`. No installation.

    Its backward adds dq by atomics unless `torch.use_deterministic_algorithms(True)` is set.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_positional(ranges), 0.0, ranges.causal, False, scale=scale
        )
        return out, lse

    def backward(self, dout: Tensor, state: ForwardState, ranges: Ranges, scale: float) -> Gradients:
        unused = torch.zeros(2, dtype=torch.uint64, device=dout.device)  # the state of a dropout that is off
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, *state, *_positional(ranges), 0.0, ranges.causal, unused, unused, scale=scale
        )
        return dq, dk, dv


# Best first. `backend="flash"` takes the first that is installed and serves the GPU.
LIBRARIES: dict[str, type[Any]] = {
    "flash-attn-4": FlashAttention4,
    "flash-attn-3": FlashAttention3,
    "flash-attn-2": FlashAttention2,
    "torch-varlen": TorchVarlen,
}
# What must be importable. The flash-attn package has the folder `cute` also where its compiler, cutlass, is missing.
MODULES = {
    "flash-attn-4": ("cutlass", "flash_attn.cute.interface"),
    "flash-attn-3": ("flash_attn_interface",),
    "flash-attn-2": ("flash_attn.flash_attn_interface",),
    "torch-varlen": ("torch.nn.attention.varlen",),
}


@functools.cache
def load(name: str) -> Library:
    """The library called `name` in `LIBRARIES`, imported at the first call."""
    library: Library = LIBRARIES[name]()
    return library


@functools.cache
def installed() -> tuple[str, ...]:
    """The libraries that can be imported here, best first."""
    return tuple(name for name, modules in MODULES.items() if all(_found(name, module) for module in modules))


def serves(name: str, capability: tuple[int, int], width: int, training: bool) -> bool:
    """Whether a library has kernels for heads of `width` on a GPU of this compute capability, deterministic backward.

    From the libraries' own checks (see the module's docstring). flash-attn 4 has no backward on sm_80 and no
    deterministic one on sm_120.
    """
    major = capability[0]
    if name == "flash-attn-4":
        if major in (10, 11):
            return width <= 128 or width == 256
        return major == 9 or (major in (8, 12) and not training and width <= 128)
    return major == 9 if name == "flash-attn-3" else major >= 8


def _found(name: str, module: str) -> bool:
    """Whether a module can be imported; a package that is there and breaks is logged."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
    except Exception as error:  # built for another torch or CUDA: any error may come from its extension
        logger.warning("%s is installed but cannot be imported: %s", name, error)
        return False


def _offsets(ranges: Ranges) -> dict[str, Any]:
    return {
        "cu_seqlens_q": ranges.queries,
        "cu_seqlens_k": ranges.keys,
        "max_seqlen_q": ranges.longest_queries,
        "max_seqlen_k": ranges.longest_keys,
    }


def _positional(ranges: Ranges) -> tuple[Tensor, Tensor, int, int]:
    return ranges.queries, ranges.keys, ranges.longest_queries, ranges.longest_keys


def _new_gradients(state: ForwardState) -> Gradients:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in state[:3])
    return dq, dk, dv
