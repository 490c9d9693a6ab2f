"""Decode tokens/s of the engine on a GPU at the 3B and 7B shapes, as a share of the roofline.

`python -m bench.gpu.rollout --out FILE`. Random weights in bf16; prompts of 1,600 tokens, completions of 400, each with
its own prompt or 8 to a prompt. It also measures the fused sampling operator against PyTorch's product, softmax and
multinomial on the same LM head. It has not run on a GPU yet; the roofline itself is tested on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.block import Cases, Figures, Options, command
from bench.gpu.ceilings import copy_tbps, matmul_tflops
from bench.gpu.clock import milliseconds
from fastvst.batch import Cost, EncodedSample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.batch_invariant import batch_invariant
from fastvst.rollout.decode import DecodeState, Sizes, decode_step, forward_tables
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.mismatch import mismatch
from fastvst.rollout.sampler import make_rows
from fastvst_kernels import packed_attention, prepare, sample_tokens
from fastvst_kernels.invariant.op import invariant_attention, invariant_mm
from fastvst_kernels.invariant.tiles import make_tiles

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


def roofline(case: Case, context: float, *, bandwidth: float = BANDWIDTH, matrix: float = MATRIX) -> float:
    """The largest possible tokens/s when every completion has `context` tokens, its prompt included.

    A step takes max(weight bytes / bandwidth, product FLOPs / FLOP rate) + KV bytes / bandwidth. A shared prompt is
    read once.

    Args:
        bandwidth: bytes/s. matrix: FLOP/s. The defaults are for an H200; a measurement takes those of its own run.
    """
    config = ModelConfig.preset(case.preset)
    weights = weight_bytes(config)
    token = 4.0 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys and values, 2 bytes
    read = token * case.rows * (PROMPT / case.group + context - PROMPT)
    seconds = max(weights / bandwidth, weights * case.rows / matrix) + read / bandwidth
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


def limits(options: Options) -> tuple[float, float]:
    """Bytes/s and FLOP/s that the block `ceilings` measured in the same file."""
    return 1e12 * copy_tbps(options), 1e12 * matmul_tflops(options)


def measure(model: Qwen25VL, case: Case, options: Options) -> Figures:
    """Tokens/s of the decode steps, their share of the roofline at the mean context, and the first call's seconds."""
    length, completion = options.pick((PROMPT, COMPLETION), (20, 6))
    prompts = [text_prompt(model.config, length, seed) for seed in range(case.rows // case.group)]
    engine = Engine(model, max_sequences=case.rows, page_size=64, memory=options.pick(0.8, 1 << 26))
    begin = time.perf_counter()
    engine.generate(prompts, SamplingParams(n=case.group, max_tokens=4, ignore_eos=True))
    first = time.perf_counter() - begin
    engine.stats = type(engine.stats)()
    if not options.dry:
        torch.cuda.reset_peak_memory_stats()
    engine.generate(prompts, SamplingParams(n=case.group, max_tokens=completion, ignore_eos=True))
    stats = engine.stats
    rate = stats.decode_tokens / stats.decode_seconds
    engine.release()
    bandwidth, matrix = limits(options)
    return {
        "tokens_per_s": rate,
        "share_of_roofline": rate / roofline(case, length + completion / 2, bandwidth=bandwidth, matrix=matrix),
        "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_seconds,
        "first_call_s": first,
        "peak_memory_gb": 0.0 if options.dry else torch.cuda.max_memory_allocated() * 1e-9,
    }


def measure_bitwise(
    model: Qwen25VL, *, prompt: int = PROMPT, rows: int = 32, completion: int = 32, memory: int = 1 << 30
) -> Figures:
    """The cost of equal bits: decode tokens/s of both numerics, and their largest difference to the trainer."""
    from teacher import teacher_forced

    prompts = [text_prompt(model.config, prompt, seed) for seed in range(rows // 8)]
    params = SamplingParams(n=8, max_tokens=completion, ignore_eos=True)
    found = {}
    for numerics in ("fast", "bitwise"):
        engine = Engine(model, max_sequences=rows, page_size=64, memory=memory, numerics=numerics)
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


def measure_sampling(weight: torch.Tensor, rows: int, options: Options) -> Figures:
    """Milliseconds of drawing `rows` tokens: the operator without and with filters, and PyTorch in bf16."""
    hidden = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seeds = torch.arange(rows, device=weight.device)
    temperature = torch.full((rows,), 0.7, device=weight.device)
    filters = {"filtered": seeds, "top_k": torch.full_like(seeds, 50), "top_p": torch.full_like(temperature, 0.9)}
    filters["min_p"] = torch.zeros_like(temperature)

    def plain() -> torch.Tensor:
        logits = hidden @ weight.t() if not hidden.is_cuda else torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        logprobs = torch.log_softmax(logits.float() / 0.7, dim=1)
        tokens = torch.multinomial(logprobs.exp(), 1)
        return logprobs.gather(1, tokens)

    runs = {
        "fastvst": lambda: sample_tokens(hidden, weight, seeds, seeds, temperature=temperature),
        "fastvst_filtered": lambda: sample_tokens(hidden, weight, seeds, seeds, temperature=temperature, **filters),
        "torch": plain,
    }
    found = {f"{name}_ms": ms for name, ms in milliseconds(runs, options.clock).items()}
    bandwidth, matrix = limits(options)
    seconds = max(2.0 * weight.numel() / bandwidth, 2.0 * rows * weight.numel() / matrix)
    return found | {"share_of_roofline": 1e3 * seconds / found["fastvst_ms"]}


def launch_kernels(preset: str, options: Options) -> Figures:
    """Launch what the cases of a preset launch; the engine itself needs values."""
    config = dataclasses.replace(ModelConfig.preset(preset), num_hidden_layers=1)
    with options.device:
        model = Qwen25VL(config).to(options.dtype)
    pool = PagePool(config, pages=200, page_size=64, dtype=options.dtype, device=options.device)
    with torch.no_grad():
        for length in (PROMPT, PROMPT // 2):
            prompts = torch.tensor([0, length, 2 * length], dtype=torch.int32)
            hidden = torch.empty(2 * length, config.hidden_size, device=options.device, dtype=options.dtype)
            offsets = prompts.to(options.device)
            plan = prepare(prompts, causal=True).to(options.device)

            def attend(_: int, q: Tensor, k: Tensor, v: Tensor, offsets=offsets, plan=plan) -> Tensor:
                return packed_attention(q, k, v, offsets, causal=True, plan=plan)

            model.model(hidden, torch.empty(3, 2 * length, device=options.device, dtype=torch.int32), attend)
        for case in CASES:
            measure_sampling(model.head_weight, case.rows, options)
            rows = make_rows([SamplingParams()] * case.rows, [0] * case.rows, config.vocab_size, torch.device("cpu"))
            sizes = Sizes(rows=case.rows, own=8, groups=case.rows // case.group, prompt=32, most=case.group)
            state = DecodeState(sizes, config.vocab_size, options.device, rows)
            decode_step(model, pool, state, state.tables.tokens[:2].clone())
        hidden = forward_tables(model, pool, state.tables)
        invariant_mm(hidden, model.head_weight.t(), torch.float32)
        invariant_mm(hidden, model.model.layers[0].self_attn.o_proj.weight.t())
        tiles = make_tiles([(range(64), 0, range(64))]).to(options.device)
        q, k = (
            hidden.new_empty(64, n, config.head_dim) for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        invariant_attention(q, k, k, tiles, 0.1)
    return {}


def cases(options: Options) -> Cases:
    """Both presets: sampling, decoding, and at last the cost of equal bits."""
    if options.compile_only:
        for preset in ("3b", "7b"):
            yield preset, lambda preset=preset: launch_kernels(preset, options)
        return
    for preset in options.pick(("3b", "7b"), ("tiny",)):
        with options.device:
            model = Qwen25VL(ModelConfig.preset(preset)).to(torch.float32 if options.dry else torch.bfloat16)
        for case in options.pick(CASES, (Case("tiny", 2, 1), Case("tiny", 4, 2))):
            if case.preset == preset:
                yield case.name, lambda case=case, model=model: measure(model, case, options)
        for rows in options.pick((1, 32, 128, 256), (2,)):
            yield (
                f"{preset}, drawing {rows} tokens",
                lambda rows=rows, model=model: measure_sampling(model.head_weight.detach(), rows, options),
            )
        sizes = options.pick({}, {"prompt": 20, "rows": 8, "completion": 4, "memory": 1 << 26})
        yield f"{preset}, bitwise, 8 to a prompt", lambda model=model, sizes=sizes: measure_bitwise(model, **sizes)
        del model
        if not options.dry:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(command("rollout", cases, __doc__))
