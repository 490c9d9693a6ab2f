"""A user's program under mypy --strict: every public name is used, and no result is Any."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastvst_kernels

KERNELS = Path(__file__).parents[3] / "kernels"
PROGRAM = """
from typing import assert_type

import torch
from torch import Tensor, nn

import fastvst_kernels as fk
from fastvst_kernels.integrations import flash_attention as fa
from fastvst_kernels.integrations.lm_head import LMHead, check_logits, lm_head
from fastvst_kernels.integrations.transformers import Report, apply, register, restore
from fastvst_kernels.integrations.trl import use_fused_head
from fastvst_kernels.objectives import DAPO, Objective


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.loss = fk.LinearCrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, offsets: Tensor, plan: fk.AttentionPlan | None = None) -> Tensor:
        q, k = fk.rotary_embedding(x, x, x, x, rotary_dim=4, interleaved=True)
        out = fk.packed_attention(q, k, x, offsets, causal=True, plan=plan)
        y, total = fk.add_rms_norm(out, x, self.weight, 1e-6)
        return self.loss(fk.rms_norm(y, self.weight, 1e-6), total, offsets)


def every(x: Tensor, i: Tensor, objective: Objective, shard: fk.VocabularyShard, model: nn.Module) -> None:
    pair = tuple[Tensor, Tensor]
    triple = tuple[Tensor, Tensor, Tensor]
    assert_type(fk.prepare(i, causal=True), fk.AttentionPlan)
    assert_type(fk.packed_attention(x, x, x, i, causal=True), Tensor)
    assert_type(fk.packed_attention(x, x, x, i, causal=True, return_lse=True), pair)
    assert_type(fk.attention_reference(x, x, x, i, causal=True, scale=1.0), pair)
    assert_type(fk.decode_attention(x, x, x, i, i), Tensor)
    assert_type(fk.decode_attention(x, x, x, i, i, return_lse=True), pair)
    assert_type(fk.window_attention(x, None, i, i, num_heads=1, max_window=4), Tensor)
    assert_type(fk.rms_norm(x, None, 1e-6), Tensor)
    assert_type(fk.swiglu(x, x), Tensor)
    assert_type(fk.packed_linear(x, [x, x], [x, x]), Tensor)
    assert_type(fk.vision_rope(x, x, i, num_heads=1), triple)
    rope = fk.mrope(x, x, i, num_heads=1, num_kv_heads=1, head_dim=8, sections=(1, 1, 2), theta=1e4)
    assert_type(rope, triple)
    assert_type(fk.sample_tokens(x, x, i, i), triple)
    assert_type(fk.linear_cross_entropy(x, x, i, bias=x, softcap=3.0, shard=shard), Tensor)
    assert_type(fk.linear_logprobs(x, x, i, temperature=0.5), pair)
    loss, stats = fk.linear_policy_loss(x, x, i, objective, advantages=x)
    assert_type(loss, Tensor)
    assert_type(stats, dict[str, Tensor])
    assert_type(fk.LinearCrossEntropyLoss(reduction="none")(x, x, i), Tensor)
    assert_type(fk.LinearLogProbs(temperature=2.0)(x, x, i), pair)
    assert_type(fk.LinearPolicyLoss(DAPO())(x, x, i, x), tuple[Tensor, dict[str, Tensor]])
    assert_type(fa.flash_attn_func(x, x, x, causal=True), Tensor)
    assert_type(fa.flash_attn_func(x, x, x, return_attn_probs=True), tuple[Tensor, Tensor, None])
    assert_type(fa.flash_attn_varlen_func(x, x, x, i, i, 4, 4), Tensor)
    register()
    assert_type(apply(model), Report)
    restore(model)
    head = lm_head(model)
    assert_type(head, LMHead)
    check_logits(model, i, head)
    use_fused_head(model)
    assert_type(fk.__version__, str)
"""
WRONG = """
fk.packed_attention(x, x, x, i)
fk.rotary_embedding(x, x, x)
fk.linear_cross_entropy(x, x, i, label_smooth=0.1)
"""


def strict(tmp_path: Path, program: str) -> str:
    """What mypy says of the program; errors inside the package are not the user's, as for an installed package."""
    file = tmp_path / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "c")]
    environment = os.environ | {"MYPYPATH": str(KERNELS)}
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_users_program_under_mypy_strict(tmp_path: Path) -> None:
    assert "Success" in (said := strict(tmp_path, PROGRAM)), said
    wrong = PROGRAM + "".join(f"    {line}\n" for line in WRONG.strip().splitlines())
    assert strict(tmp_path, wrong).count("error:") == len(WRONG.strip().splitlines())


def test_the_program_uses_every_public_name() -> None:
    used = set(re.findall(r"fk\.(\w+)", PROGRAM))
    assert used == {*fastvst_kernels.__all__, "__version__"}
    assert (KERNELS / "fastvst_kernels" / "py.typed").exists()
