"""RL on the tiny model: the update with shared and repeated prompts, and a GRPO step compared with TRL's trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.table import Result
from bench.timing import interleaved
from fastvst.data import Processor, Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rl.advantages import advantages
from fastvst.rl.packing import Answer, Group
from fastvst.rl.policy_update import UpdateConfig, make_minibatches, make_objective, policy_head
from fastvst.rollout import Engine, SamplingParams
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig, World

# A prompt of 1,600 tokens and 8 completions of 128, divided by four; one image has 300 of the prompt's 400 tokens.
PROMPT = 400
ANSWER = 32
N = 8
GROUPS = 2
ROUNDS = 2
WORDS = ("near", "far", "left", "right", "chair", "table", "lamp", "blue")


def words(tokens: int, processor: Processor, rng: np.random.Generator) -> str:
    """Text of about `tokens` tokens."""
    text = " ".join(rng.choice(WORDS, tokens))
    return processor.decode(processor.tokenizer.encode(text, add_special_tokens=False).ids[:tokens])


def question(processor: Processor, number: int, *, with_image: bool) -> Sample:
    """A prompt of about PROMPT tokens."""
    rng = np.random.default_rng(number)
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": words(PROMPT - (330 if with_image else 30), processor, rng)}
    ]
    if with_image:
        pixels = rng.integers(0, 255, (15 * 28, 20 * 28, 3), dtype=np.uint8)
        parts.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
    return Sample.from_messages([{"role": "user", "content": parts}], id=str(number))


def sampled_groups(processor: Processor) -> list[Group]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(GROUPS):
        prompt = processor.encode(question(processor, number, with_image=True), add_generation_prompt=True)
        tokens = torch.randint(100, 2000, (N, ANSWER), generator=generator, dtype=torch.int32)
        values = torch.randn(N, generator=generator).tolist()
        logprobs = torch.full((ANSWER,), -2.0)
        made.append(Group(prompt, tuple(Answer(t, logprobs, v) for t, v in zip(tokens, values, strict=True))))
    return made


def update(
    model: Qwen25VL, groups: list[Group], config: UpdateConfig, world: World, share_prompts: bool
) -> tuple[int, float]:
    """One update without the optimizer step; returns (tokens, FLOPs) of its packs."""
    objective = make_objective(config, ANSWER)
    (batch,), _ = make_minibatches(groups, config, objective, model.config, world, share_prompts=share_prompts)
    for pack in batch.packs:
        pack = pack.to(world.device)
        loss, _ = model(pack.batch, head=policy_head(pack, objective, 1.0, first=True))
        loss.backward()
    model.zero_grad()
    return sum(p.batch.num_tokens for p in batch.packs), sum(p.batch.flops for p in batch.packs)


def test_update_with_shared_prompts(record: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny")
    processor = Processor.preset("tiny", max_pixels=1 << 20, max_seq_len=2048)
    world = distributed.start(ParallelConfig(device=device.type, threads=1), environment={})
    model = Qwen25VL(config).to(device)
    groups = sampled_groups(processor)
    update_config = UpdateConfig(tokens_per_pack=PROMPT + 64 + N * ANSWER)
    layouts = {"shared": True, "repeated": False}
    counts = {name: update(model, groups, update_config, world, shared) for name, shared in layouts.items()}
    seconds = interleaved(
        {
            name: lambda shared=shared: update(model, groups, update_config, world, shared)
            for name, shared in layouts.items()
        },
        rounds=3,
    )
    record(
        f"update, {GROUPS} prompts of {len(groups[0].prompt)} tokens (one image), {N} completions of {ANSWER}",
        Result("s", seconds["shared"], "repeated prompts", seconds["repeated"], less=True, goal=2.5),
        shared_s=seconds["shared"],
        repeated_s=seconds["repeated"],
        seconds_ratio=seconds["repeated"] / seconds["shared"],
        tokens_ratio=counts["repeated"][0] / counts["shared"][0],
        flops_ratio=counts["repeated"][1] / counts["shared"][1],
    )


# ---------------------------------------------------------------------------------------- a step compared with TRL's


def our_step(folder: Path, samples: list[Sample], world: World) -> Callable[[], None]:
    model = Qwen25VL.from_pretrained(folder)
    processor = Processor.from_pretrained(folder)
    engine = Engine(model, processor, memory=1 << 28)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    config = UpdateConfig(objective="dapo", dual_clip=None, tokens_per_pack=2048)
    objective = make_objective(config, ANSWER)

    def step() -> None:
        prompts = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
        rollouts = engine.generate(prompts, SamplingParams(n=N, max_tokens=ANSWER, ignore_eos=True))
        rewards = torch.tensor([[float(r.text.count("e")) for r in row] for row in rollouts])
        values = advantages(rewards, "grpo").tolist()
        groups = [
            Group(p, tuple(Answer(torch.tensor(r.tokens), torch.tensor(r.logprobs), v) for r, v in zip(row, line)))
            for p, row, line in zip(prompts, rollouts, values)
        ]
        (batch,), _ = make_minibatches(groups, config, objective, model.config, world)
        for pack in batch.packs:
            model(pack.batch, head=policy_head(pack, objective, 1.0, first=True))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def trl_step(folder: Path, samples: list[Sample], out: Path) -> Callable[[], object]:
    """One optimizer step of TRL's trainer, which samples with transformers' `generate`."""
    import datasets
    import trl
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    rows = [{"prompt": [{"role": "user", "content": s.parts("text")[0]["text"]}]} for s in samples]
    arguments = trl.GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=len(samples) * N,
        num_generations=N,
        max_steps=1,
        max_completion_length=ANSWER,
        learning_rate=1e-6,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch_fused",
        generation_kwargs={"min_new_tokens": ANSWER},
    )

    def reward(completions: list[Any], **more: Any) -> list[float]:
        return [float(completion[0]["content"].count("e")) for completion in completions]

    # One trainer for each round is made in advance, so that only `train` is timed.
    trainers = [
        trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        for _ in range(1 + ROUNDS)
    ]
    return lambda: trainers.pop().train()


@pytest.mark.needs("trl", "datasets", "accelerate")
def test_a_grpo_step_compared_with_trl(record: Callable[..., None], device: torch.device, tmp_path: Path) -> None:
    if device.type != "cpu":
        pytest.skip("the comparison is set up for the CPU")
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny")
    processor = Processor.preset("tiny", max_seq_len=2048)
    Qwen25VL(config).save_pretrained(tmp_path / "model", processor=processor)
    samples = [question(processor, number, with_image=False) for number in range(GROUPS)]
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    steps = {
        "ours": our_step(tmp_path / "model", samples, world),
        "trl": trl_step(tmp_path / "model", samples, tmp_path),
    }
    seconds = interleaved(steps, rounds=ROUNDS)
    lengths = [len(processor.encode(s, add_generation_prompt=True)) for s in samples]
    record(
        f"GRPO step, {GROUPS} text prompts of {lengths[0]} tokens, {N} completions of {ANSWER}",
        Result("s", seconds["ours"], "TRL's GRPOTrainer", seconds["trl"], less=True),
        ours_s=seconds["ours"],
        trl_s=seconds["trl"],
        ratio=seconds["trl"] / seconds["ours"],
    )
