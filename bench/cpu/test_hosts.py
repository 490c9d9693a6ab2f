"""Other people's trainers with and without the operators: seconds of a step and peak extra memory, in the same run.

A transformers model with `apply`, a plain PyTorch loss, TRL's fused head with and without packed rows, and the cost of
masking rows without a loss instead of selecting them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.memory import peak_extra_bytes
from bench.table import Result
from bench.timing import interleaved
from fastvst_kernels import LinearCrossEntropyLoss, linear_cross_entropy
from fastvst_kernels.integrations.transformers import apply

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")


def host() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).train()


def padded(rows: int = 8, longest: int = 256) -> dict[str, Any]:
    ids = torch.randint(3, 8192, (rows, longest))
    lengths = torch.linspace(longest // 4, longest, rows).long()
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def measured(steps: dict[str, Callable[[], Any]]) -> tuple[list[Result], dict[str, float]]:
    """Time and memory as rows, and {name_ms, name_extra_mib}, `speed_ratio` and `memory_ratio` of host to ours."""
    for step in steps.values():
        step()
    seconds = interleaved(steps, rounds=5)
    extra = {name: peak_extra_bytes(step, lambda: None) for name, step in steps.items()}
    figures = {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    figures |= {f"{name}_extra_mib": value / 2**20 for name, value in extra.items()}
    figures["speed_ratio"] = seconds["without"] / seconds["with"]
    rows = [
        Result("ms", figures["with_ms"], "host", figures["without_ms"], less=True),
        Result("MiB", figures["with_extra_mib"], "host", figures["without_extra_mib"], less=True, what="memory"),
    ]
    return rows, figures | {"memory_ratio": extra["with"] / extra["without"]}


def backward_of(model: Any, **call: Any) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(**call).loss.backward()

    return step


@ON_CPU
def test_transformers(record: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    plain = host()
    ours = copy.deepcopy(plain)
    apply(ours)
    call = padded() | {"use_cache": False}
    a, b = (model(**call).loss for model in (plain, ours))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    rows, figures = measured({"without": backward_of(plain, **call), "with": backward_of(ours, **call)})
    record("transformers, Qwen2, padded", *rows, **figures)


@ON_CPU
def test_plain_loop(record: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    hidden = torch.randn(2048, 256, requires_grad=True)
    weight = (torch.randn(8192, 256) / 16).requires_grad_()
    targets = torch.randint(8192, (2048,))
    loss = LinearCrossEntropyLoss()
    steps = {
        "without": lambda: F.cross_entropy(hidden @ weight.t(), targets).backward(),
        "with": lambda: loss(hidden, weight, targets).backward(),
    }
    rows, figures = measured(steps)
    record("plain PyTorch, loss", *rows, **figures)


@ON_CPU
@pytest.mark.needs("trl")
def test_trl(record: Callable[..., None]) -> None:
    from trl.trainer.utils import add_fused_lm_head

    from fastvst_kernels.integrations.trl import use_fused_head

    torch.set_num_threads(1)
    plain = host()
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    apply(ours)
    use_fused_head(ours, ("log_probs", "entropy"))
    call = padded() | {"fused_lm_head": True}
    torch.testing.assert_close(plain(**call).loss, ours(**call).loss, rtol=1e-5, atol=1e-5)
    rows, figures = measured({"without": backward_of(plain, **call), "with": backward_of(ours, **call)})
    record("TRL, fused head, padded", *rows, **figures)


@ON_CPU
def test_ignored_rows(record: Callable[..., None]) -> None:
    """40 % of the rows have no target: the operator selects rows on the CPU; here also with the rows given."""
    torch.set_num_threads(1)
    hidden = torch.randn(4096, 256, requires_grad=True)
    weight = (torch.randn(8192, 256) / 16).requires_grad_()
    targets = torch.randint(8192, (4096,))
    targets[torch.randperm(4096)[:1638]] = -100
    rows = (targets != -100).nonzero().squeeze(1)

    def gradients(loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), (hidden, weight))

    steps = {
        "ignored": gradients(lambda: linear_cross_entropy(hidden, weight, targets)),
        "rows_given": gradients(lambda: linear_cross_entropy(hidden, weight, targets, rows=rows)),
        "selected_before": gradients(lambda: linear_cross_entropy(hidden[rows], weight, targets[rows])),
    }
    for step in steps.values():
        step()
    seconds = interleaved(steps, rounds=5)
    figures = {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    ratio = seconds["ignored"] / seconds["selected_before"]
    peer = ("rows selected before", figures["selected_before_ms"])
    row = Result("ms", figures["ignored_ms"], *peer, less=True, goal=0.9)
    record("40 % ignored rows", row, **figures, ratio=ratio)
