"""The backend of an operator: this package's Triton kernels or plain PyTorch. Each choice is logged once."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

logger = logging.getLogger("fastvst_kernels")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # without importing it
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined] # see tile_tables.config


def uses_kernel(op: str, x: Tensor, backend: str) -> bool:
    """Whether `op` runs its Triton kernels on x.

    Args:
        backend: "triton", "torch" (the plain path, any device and dtype), or "auto": Triton for bfloat16, float16 and
            float32 on CUDA if it is installed, else torch. The choice of "auto" is logged once for each device.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        kernel = x.device.type == "cuda" and HAS_TRITON and x.dtype in KERNEL_DTYPES
        if not torch.compiler.is_compiling():
            log_once(op, "triton" if kernel else "torch", x.device.type)
        return kernel
    if backend != "triton":
        raise ValueError(f"unknown backend {backend!r} of {op}; expected 'auto', 'triton' or 'torch'")
    if not HAS_TRITON:
        raise ValueError(f"backend 'triton' of {op} needs the triton package, which is not installed; use 'torch'")
    if x.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"backend 'triton' of {op} has no kernels for {x.device.type!r} tensors; use 'torch' or 'auto'"
        )
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"backend 'triton' of {op} has no {x.dtype} kernels; use backend='torch'")
    check_interpreter(op, x)
    return True


def check_interpreter(op: str, x: Tensor) -> None:
    """Refuse bfloat16 on the CPU where Triton's interpreter multiplies it wrongly.

    Raises:
        ValueError: the interpreter of this Triton computes with the bit patterns of bfloat16.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return
    if not _interpreter_multiplies_bfloat16():
        raise ValueError(
            f"{op}: Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly in this version; use float32 "
            "or float16, or backend='torch'"
        )


@functools.cache
def _interpreter_multiplies_bfloat16() -> bool:
    from fastvst_kernels.shared.interpreter_probe import product_is_right

    return product_is_right()


@functools.cache
def log_once(op: str, backend: str, device: str, why: str = "") -> None:
    """Log a choice the first time that it is made."""
    logger.info("%s on %s uses backend %r%s", op, device, backend, f": {why}" if why else "")
