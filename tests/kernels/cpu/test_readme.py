"""The code blocks of kernels/README.md run, and their comments about shapes and order are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastvst_kernels import rms_norm

README = Path(__file__).parents[3] / "kernels" / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PATHS = re.findall(r"`((?:examples|bench|tests|docs)/[\w/]+(?:\.\w+)?)/?`", TEXT)


def run(word: str) -> dict[str, torch.Tensor]:
    """The names that the block with this word defines."""
    (block,) = (block for block in BLOCKS if word in block)
    torch.manual_seed(0)
    names: dict[str, torch.Tensor] = {}
    exec(compile(block, str(README), "exec"), names)
    return names


def test_shared_prompts():
    assert run("packed_attention(")["out"].shape == (43, 4, 64)


def test_add_rms_norm_gives_the_norm_and_then_the_sum():
    names = run("add_rms_norm(")
    total = names["x"] + names["residual"]
    assert torch.equal(names["total"], total)
    torch.testing.assert_close(names["y"], rms_norm(total, names["weight"], 1e-6))
    assert names["out"].shape == (24, 32) and names["q"].shape == (12, 4, 16) and names["loss"].isfinite()


def test_sampling():
    names = run("sample_tokens(")
    assert names["tokens"].shape == (4,) and (names["logprobs"] < 0).all()


def test_transformers():
    names = run("apply(model)")
    assert "loss" in names["report"].replaced and names["loss"].isfinite()


def test_there_is_a_test_for_every_block():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:examples|bench|tests|docs)/[\w/]+(?:\.\w+)?)/?`", README.read_text())
)
def test_paths_exist(path):
    assert (README.parents[1] / path).exists()
