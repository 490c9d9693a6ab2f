"""Any layout of any argument gives the dense result in every launcher; wrong bf16 products are refused by name."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastvst_kernels
from operator_calls import LAYOUTS, expanded, operator_call, operator_names, tensors_of

LAUNCHERS = [
    name for name in operator_names() if "backend" in inspect.signature(getattr(fastvst_kernels, name)).parameters
]
HALF = ("window_attention",)  # its kernels take 16-bit values only


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_layout_of_every_argument_gives_the_dense_result(name: str):
    operator = getattr(fastvst_kernels, name)
    dense = operator_call(name) | {"backend": "triton"}
    if name in HALF:
        dense |= {n: x.half() for n, x in dense.items() if isinstance(x, Tensor) and x.is_floating_point()}
    expected = tensors_of(operator(**dense))
    for argument, value in dense.items():
        if not isinstance(value, Tensor):
            continue
        for layout in ("transposed", "sliced"):
            found = tensors_of(operator(**dense | {argument: LAYOUTS[layout](value)}))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=f"{name}, {argument} {layout}")
        if value.is_floating_point():
            rows = expanded(value)
            pair = [tensors_of(operator(**dense | {argument: x})) for x in (rows, rows.clone())]
            for a, b in zip(*pair, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=f"{name}, {argument} expanded")


def test_bfloat16_is_refused_where_the_interpreter_multiplies_it_wrongly():
    """In a process without this folder's repair of the interpreter."""
    code = """
import torch
from fastvst_kernels import packed_attention
from fastvst_kernels.shared.interpreter_probe import product_is_right
q, cu = torch.randn(8, 2, 16).bfloat16(), torch.tensor([0, 8], dtype=torch.int32)
try:
    out = packed_attention(q, q, q, cu, causal=True, backend="triton")
except ValueError as error:
    assert "multiplies bfloat16 wrongly" in str(error) and not product_is_right()
else:
    expected = packed_attention(q, q, q, cu, causal=True, backend="reference")
    assert product_is_right() and (out - expected).abs().max() < 0.05
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
