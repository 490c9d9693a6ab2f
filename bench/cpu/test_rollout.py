"""Rollouts on the tiny model: the engine compared with transformers' `generate` and its continuous batching."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.cases.transformers_peer import padded, peer
from bench.gpu.rollout import CASES, COMPLETION, PROMPT, Case, measure_bitwise, roofline
from bench.table import Result
from fastvst.batch import EncodedSample
from fastvst.data import Processor, Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams

PROMPTS = 32  # half of them without --full
SAMPLES = 8
TOKENS = 64  # the goal in this setting: at least 3x the speed of transformers' generate


def make_prompts(processor: Processor, count: int, *, with_image: bool) -> list[EncodedSample]:
    rng = np.random.default_rng(0)
    encoded = []
    for index in range(count):
        pixels = Image.fromarray(rng.integers(0, 255, (224, 280, 3), dtype=np.uint8))
        parts: list[dict[str, Any]] = [{"type": "image", "image": pixels}] if with_image else []
        parts.append({"type": "text", "text": "How far is the chair from the table in metres? " * (1 + index % 4)})
        sample = Sample.from_messages([{"role": "user", "content": parts}], id=str(index))
        encoded.append(processor.encode(sample, add_generation_prompt=True))
    return encoded


def test_roofline(record):
    """The decode roofline of the GPU bench, computed, not measured: H200, 1,600 + 400 tokens, at the last token."""
    for case in CASES:
        record(f"roofline: {case.name}", tokens_per_s=roofline(case, PROMPT + COMPLETION))
    # Known figures in tokens/s: 7B, 128 completions with their own prompts, and 8 to a prompt.
    assert abs(roofline(Case("7b", 128, 1), 2000) / 21_300 - 1) < 0.01
    assert abs(roofline(Case("7b", 128, 8), 2000) / 33_100 - 1) < 0.01


@pytest.fixture(scope="session")
def prompts(full: bool) -> int:
    return PROMPTS if full else PROMPTS // 2


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Qwen25VL(ModelConfig.preset("tiny")), Processor.preset("tiny")


def test_engine_and_generate(tiny, record, prompts):
    """Alternating turns in one process, best of each. No completion ends early, so both do the same work."""
    model, processor = tiny
    theirs = peer(model)
    samples = make_prompts(processor, prompts, with_image=True)
    engine = Engine(model, processor, memory=1 << 28)
    params = SamplingParams(n=SAMPLES, max_tokens=TOKENS, ignore_eos=True)
    inputs = padded(model.config, samples)

    def ours() -> int:
        return sum(len(r.tokens) for many in engine.generate(samples, params) for r in many)

    @torch.inference_mode()
    def generate() -> int:
        out = theirs.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=SAMPLES,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            pad_token_id=model.config.pad_token_id,
        )
        return out[:, inputs["input_ids"].shape[1] :].numel()

    best: dict[str, float] = {}
    for _ in range(2):
        for name, run in {"engine": ours, "generate": generate}.items():
            begin = time.perf_counter()
            assert run() == prompts * SAMPLES * TOKENS
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    tokens = prompts * SAMPLES * TOKENS
    stats = engine.stats
    record(
        f"tiny, {prompts} prompts with an image x {SAMPLES} completions x {TOKENS} tokens",
        Result("tokens/s", tokens / best["engine"], "transformers generate", tokens / best["generate"], goal=3.0),
        engine_tokens_per_s=tokens / best["engine"],
        transformers_tokens_per_s=tokens / best["generate"],
        ratio=best["generate"] / best["engine"],
        goal=3.0,
        prompt_tokens=sum(map(len, samples)),
        prefill_share=stats.prefill_seconds / (stats.prefill_seconds + stats.decode_seconds),
        kv_pages_peak_mb=stats.peak_pages * engine.config.page_size * 2048e-6,
    )


def test_engine_and_continuous_batching(tiny, record, prompts):
    """Text only, because transformers' continuous batching takes token ids and no images.

    Its cache gets the size that it needs: by default it first fills most of the machine's memory, which takes a minute.
    Each prompt is passed once for every completion, because `num_return_sequences` returns only one completion of each
    prompt; blocks with equal prefixes are shared (its `allow_block_sharing`).
    """
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model, processor = tiny
    theirs = peer(model)
    samples = make_prompts(processor, prompts, with_image=False)
    theirs.set_attn_implementation("paged|sdpa")
    config = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=True, eos_token_id=-1, pad_token_id=model.config.pad_token_id
    )
    blocks = sum(-(-(len(s) + TOKENS) // 32) for s in samples) * SAMPLES
    cache = ContinuousBatchingConfig(block_size=32, num_blocks=blocks, max_batch_tokens=512)
    engine = Engine(model, processor, memory=1 << 28)
    params = SamplingParams(n=SAMPLES, max_tokens=TOKENS, ignore_eos=True)
    inputs = [s.tokens.tolist() for s in samples for _ in range(SAMPLES)]

    def ours() -> int:
        return sum(len(r.tokens) for many in engine.generate(samples, params) for r in many)

    def batching() -> int:
        found = theirs.generate_batch(inputs, generation_config=config, continuous_batching_config=cache)
        return sum(len(o.generated_tokens) for o in found.values())

    tokens = prompts * SAMPLES * TOKENS
    best = {}
    for _ in range(2):
        for name, run in {"engine": ours, "continuous batching": batching}.items():
            begin = time.perf_counter()
            assert run() == tokens, f"{name} did not sample all tokens"
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    record(
        f"tiny, {prompts} text prompts x {SAMPLES} completions x {TOKENS} tokens",
        Result(
            "tokens/s",
            tokens / best["engine"],
            "transformers continuous batching",
            tokens / best["continuous batching"],
            goal=3.0,
        ),
        engine_tokens_per_s=tokens / best["engine"],
        continuous_batching_tokens_per_s=tokens / best["continuous batching"],
        ratio=best["continuous batching"] / best["engine"],
        goal=3.0,
    )


def test_cost_of_equal_bits(record, device):
    """Decode tokens/s of both numerics on the tiny model, and their largest difference to the trainer's logprobs."""
    if device.type != "cpu":
        pytest.skip("bench/gpu/rollout.py measures this on a GPU")
    figures = measure_bitwise(Qwen25VL(ModelConfig.preset("tiny")), prompt=400)
    assert figures["bitwise_largest_difference"] == 0.0
    record("bitwise, 4 prompts of 400 tokens x 8 completions of 32", **figures)
