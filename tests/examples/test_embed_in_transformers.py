"""examples/embed_in_transformers.py: the numbers and gradients of transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastvst_kernels.integrations import attention as integration

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load("embed_in_transformers")


def test_packed_rows_give_the_numbers_of_separate_sequences(example):
    with torch.no_grad():
        assert example.qwen2() < 1e-5
        assert example.qwen2_5_vl() < 1e-5


def test_the_registered_function_is_the_one_that_runs(example, monkeypatch):
    calls = []
    real = integration.packed_attention
    monkeypatch.setattr(integration, "packed_attention", lambda *a, **k: calls.append(k["causal"]) or real(*a, **k))
    with torch.no_grad():
        example.qwen2_5_vl()
    assert True in calls and False in calls  # decoder and vision tower


def test_gradients_of_a_packed_row_with_groups(example):
    """Two completions of one prompt: the shared layout has the gradient of two sequences of prompt and completion."""
    config = example.Qwen2Config(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = example.Qwen2ForCausalLM(config)
    prompt = torch.randint(0, 50, (6,))
    completions = [torch.randint(0, 50, (n,)) for n in (3, 5)]

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model.set_attn_implementation("sdpa")
    separate = sum(model(input_ids=torch.cat([prompt, c])[None]).logits[0, 6:].square().sum() for c in completions)
    expected = gradient(separate)
    model.set_attn_implementation("fastvst")
    positions = torch.cat([torch.arange(6), *(torch.arange(6, 6 + len(c)) for c in completions)])[None]
    packed = example.packed_inputs([6, 3, 5])
    ours = (
        model(
            input_ids=torch.cat([prompt, *completions])[None],
            position_ids=positions,
            use_cache=False,
            groups=torch.tensor([-1, 0, 0], dtype=torch.int32),
            **packed,
        )
        .logits[0, 6:]
        .square()
        .sum()
    )
    torch.testing.assert_close(gradient(ours), expected, rtol=1e-4, atol=1e-5)


def test_cost_is_printed_and_the_packed_row_holds_less(example):
    found = example.cost((100, 6, 20))
    assert found.ours.peak_bytes < 0.8 * found.host.peak_bytes and " times the speed" in str(found)
