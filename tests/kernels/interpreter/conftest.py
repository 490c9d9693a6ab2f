"""Tests in Triton's interpreter, which computes bf16 on bit patterns; a patch (for tests only) repairs that."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("the interpreter tests need TRITON_INTERPRET=1 in the environment of pytest")

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastvst_kernels.shared.tile_tables import TABLES  # noqa: F401 - the package must import in this mode

torch.set_num_threads(1)


def _widen(handle):
    if handle.dtype.scalar == tl.bfloat16:
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    return handle


@pytest.fixture(autouse=True, scope="session")
def bfloat16():
    """bf16 operands of tl.dot as the float32 they stand for, and float32 -> bf16 rounded to nearest even."""
    dot = interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        bits = values.view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values.view(np.float32)), np.uint16(0x7FC0), nearest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, c, *rest: dot(self, _widen(a), _widen(b), c, *rest),
        )
        patch.setattr(interpreter, "_convert_float", rounded)
        yield
