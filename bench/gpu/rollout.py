"""Decode tokens/s of the engine on a GPU at the 3B and 7B shapes, as a share of the roofline.

`python -m bench.gpu.rollout --out FILE`. Random weights in bf16; prompts of 1,600 tokens, completions of 400, each with
its own prompt or 8 to a prompt. It also measures the fused sampling operator against PyTorch's product, softmax and
multinomial on the same LM head. It has not run on a GPU yet; the roofline itself is tested on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastvst.batch import Cost, EncodedSample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.batch_invariant import batch_invariant
from fastvst.rollout.mismatch import mismatch
from fastvst_kernels import sample_tokens

BANDWIDTH = 4.8e12  # bytes/s of an H200, from its data sheet
MATRIX = 700e12  # FLOP/s that dense bf16 products reach on an H200 in practice
PROMPT = 1600
COMPLETION = 400


@dataclass(frozen=True)
class Case:
    preset: str
    rows: int
    group: int  # completions that share a prompt

    @property
    def name(self) -> str:
        prompts = f"{self.group} to a prompt" if self.group > 1 else "own prompts"
        return f"{self.preset}, {self.rows} completions, {prompts}"


CASES = tuple(
    Case(preset, rows, group)
    for preset in ("3b", "7b")
    for rows, group in ((1, 1), (32, 1), (32, 8), (128, 1), (128, 8), (256, 1), (256, 8))
)


def weight_bytes(config: ModelConfig) -> float:
    """Bytes of the decoder and the LM head in bf16, which every step reads."""
    h = config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    layer = h * (h + 2 * kv) + h * h + 3 * h * config.intermediate_size
    return 2.0 * (config.num_hidden_layers * layer + config.vocab_size * h)


def roofline(case: Case, context: float) -> float:
    """The largest possible tokens/s when every completion has `context` tokens, its prompt included.

    A step takes max(weight bytes / bandwidth, product FLOPs / FLOP rate) + KV bytes / bandwidth. A shared prompt is
    read once.
    """
    config = ModelConfig.preset(case.preset)
    weights = weight_bytes(config)
    token = 4.0 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys and values, 2 bytes
    read = token * case.rows * (PROMPT / case.group + context - PROMPT)
    seconds = max(weights / BANDWIDTH, weights * case.rows / MATRIX) + read / BANDWIDTH
    return case.rows / seconds


def text_prompt(config: ModelConfig, length: int, seed: int) -> EncodedSample:
    """A prompt of random tokens from the middle of the vocabulary, without special tokens."""
    low = config.vocab_size // 100
    high = config.vocab_size * 2 // 3
    tokens = torch.randint(low, high, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    empty = torch.zeros(0, dtype=torch.int32)
    return EncodedSample(
        tokens=tokens,
        labels=torch.full_like(tokens, -100),
        positions=torch.arange(length).expand(3, -1).int(),
        patches=torch.zeros(0, config.vision.patch_values),
        grid=empty.view(0, 3),
        vision_slots=empty,
        window_order=empty,
        window_lengths=empty,
        image_lengths=empty,
        vision_positions=empty.view(0, 2),
        cost=Cost(length, 0, 0.0),
        id=str(seed),
    )


def measure(model: Qwen25VL, case: Case) -> dict[str, float]:
    """Tokens/s of the decode steps, their share of the roofline at the mean context, and the first call's seconds."""
    prompts = [text_prompt(model.config, PROMPT, seed) for seed in range(case.rows // case.group)]
    engine = Engine(model, max_sequences=case.rows, page_size=64, memory=0.8)
    begin = time.perf_counter()
    engine.generate(prompts, SamplingParams(n=case.group, max_tokens=4, ignore_eos=True))
    first = time.perf_counter() - begin
    engine.stats = type(engine.stats)()
    torch.cuda.reset_peak_memory_stats()
    engine.generate(prompts, SamplingParams(n=case.group, max_tokens=COMPLETION, ignore_eos=True))
    stats = engine.stats
    rate = stats.decode_tokens / stats.decode_seconds
    engine.release()
    return {
        "tokens_per_s": rate,
        "share_of_roofline": rate / roofline(case, PROMPT + COMPLETION / 2),
        "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_seconds,
        "first_call_s": first,
        "peak_memory_gb": torch.cuda.max_memory_allocated() * 1e-9,
    }


def measure_bitwise(model: Qwen25VL, prompt: int = PROMPT, rows: int = 32, completion: int = 32) -> dict[str, float]:
    """The cost of equal bits: decode tokens/s of both numerics, and their largest difference to the trainer."""
    from teacher import teacher_forced

    prompts = [text_prompt(model.config, prompt, seed) for seed in range(rows // 8)]
    params = SamplingParams(n=8, max_tokens=completion, ignore_eos=True)
    found = {}
    for numerics in ("fast", "bitwise"):
        engine = Engine(model, max_sequences=rows, page_size=64, memory=1 << 30, numerics=numerics)
        engine.generate(prompts, dataclasses.replace(params, max_tokens=2))
        engine.stats = type(engine.stats)()
        rollouts = engine.generate(prompts, params)
        found[f"{numerics}_tokens_per_s"] = engine.stats.decode_tokens / engine.stats.decode_seconds
        engine.release()
        sampled = torch.tensor([x for many in rollouts for r in many for x in r.logprobs], dtype=torch.float64)
        with batch_invariant() if numerics == "bitwise" else contextlib.nullcontext(), torch.no_grad():
            trained = teacher_forced(model, prompts, rollouts, shared=True)
        found[f"{numerics}_largest_difference"] = mismatch(trained.cpu(), sampled).max
    return found


def measure_sampling(weight: torch.Tensor, rows: int) -> dict[str, float]:
    """Milliseconds of drawing `rows` tokens: the operator without and with filters, and PyTorch in bf16."""
    hidden = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seeds = torch.arange(rows, device=weight.device)
    temperature = torch.full((rows,), 0.7, device=weight.device)
    filters = {"filtered": seeds, "top_k": torch.full_like(seeds, 50), "top_p": torch.full_like(temperature, 0.9)}
    filters["min_p"] = torch.zeros_like(temperature)

    def plain() -> torch.Tensor:
        logprobs = torch.log_softmax(torch.mm(hidden, weight.t(), out_dtype=torch.float32) / 0.7, dim=1)
        tokens = torch.multinomial(logprobs.exp(), 1)
        return logprobs.gather(1, tokens)

    runs = {
        "fastvst": lambda: sample_tokens(hidden, weight, seeds, seeds, temperature=temperature),
        "fastvst_filtered": lambda: sample_tokens(hidden, weight, seeds, seeds, temperature=temperature, **filters),
        "torch": plain,
    }
    found = {f"{name}_ms": cuda_milliseconds(run) for name, run in runs.items()}
    seconds = max(2.0 * weight.numel() / BANDWIDTH, 2.0 * rows * weight.numel() / MATRIX)
    return found | {"share_of_roofline": 1e3 * seconds / found["fastvst_ms"]}


def cuda_milliseconds(run: Callable[[], object], turns: int = 20) -> float:
    """Median of `turns` runs, after three warm-up runs."""
    times = []
    for _ in range(turns + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="start no case after this time")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    found = {}
    for preset in ("3b", "7b"):
        with torch.device("cuda"):
            model = Qwen25VL(ModelConfig.preset(preset)).to(torch.bfloat16)
        for rows in (1, 32, 128, 256):
            name = f"{preset}, drawing {rows} tokens"
            found[name] = measure_sampling(model.head_weight.detach(), rows)
            print(name, found[name], flush=True)
        for case in (c for c in CASES if c.preset == preset):
            if time.monotonic() < deadline:
                found[case.name] = measure(model, case)
                print(case.name, found[case.name], flush=True)
                arguments.out.write_text(json.dumps({"cases": found}, indent=1) + "\n")
        if time.monotonic() < deadline:  # last, because it matters less than the other figures
            name = f"{preset}, bitwise, 32 completions, 8 to a prompt"
            found[name] = measure_bitwise(model)
            print(name, found[name], flush=True)
            arguments.out.write_text(json.dumps({"cases": found}, indent=1) + "\n")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
