"""How long a step of reinforcement learning takes, and what it needs of memory, before anybody has run it: a model.

The update is that of `fastvst.train.plan`. Sampling reads the weights once for every token position and the KV cache of
all sequences of a GPU, half full on average; its prompts are computed once. The plan assumes completions of full length
and one attempt for each prompt. Rewards are computed on the CPU while others are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastvst.model import ModelConfig
from fastvst.model.flops import TRAINING, head_flops
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.rollouts import SamplingConfig
from fastvst.train.plan import Ceilings, Device, PackShape, Part, Plan, count_parameters, operations, plan_step

PROMPT = 1500  # tokens of a prompt with its images, on average
IMAGES = 0.8  # share of these that are image tokens
# Processor time of a built-in reward for one completion: 5,000 detection questions take 1.15 s (docs/measured.md).
REWARD_S = 1.15 / 5000


@dataclass(frozen=True)
class Round:
    """One step of examples/rl.py.

    Attributes:
        prompt: tokens of a prompt with its images.
        workers: reward processes of each GPU.
    """

    sampling: SamplingConfig
    update: UpdateConfig
    prompt: int = PROMPT
    workers: int = 1

    @property
    def group(self) -> int:
        """Tokens of a prompt and all of its completions, which the update computes together."""
        return self.prompt + self.sampling.answers * self.sampling.max_tokens

    @property
    def shape(self) -> PackShape:
        """A pack of the update."""
        vision = IMAGES * self.prompt / self.group
        targets = self.sampling.answers * self.sampling.max_tokens / self.group
        sequence = min(self.prompt + self.sampling.max_tokens, self.update.tokens_per_pack)
        return PackShape(self.update.tokens_per_pack, vision, sequence, 4096, targets)

    def packs(self, gpus: int) -> int:
        """Packs of each GPU in one pass."""
        return max(1, round(self.sampling.prompts * self.group / self.update.tokens_per_pack / gpus))

    @property
    def forward_passes(self) -> float:
        """Passes without gradients: old log-probabilities after the first update, and those of the reference model."""
        later = 1 - 1 / (self.update.minibatches * self.update.epochs)
        return later * (self.update.old_logprobs != "sampler") + (self.update.kl != "none")


def plan_round(
    config: ModelConfig,
    of: Round,
    device: Device,
    ceilings: Ceilings,
    *,
    gpus: int,
    recompute: str | dict[str, str] = "none",
    state_bytes: float = 16.0,
) -> Plan:
    """A step by part: sampling, rewards, log-probabilities, update. Arguments as for `plan_step`."""
    rate = ceilings.rates
    update = plan_step(
        config,
        of.shape,
        device,
        ceilings,
        gpus=gpus,
        packs=of.packs(gpus) * of.update.epochs,
        recompute=recompute,
        state_bytes=state_bytes,
    )
    prompts = of.sampling.prompts / gpus
    ops = operations(config, PackShape(of.prompt, IMAGES, of.prompt, 4096, 0.0))
    cache = 4.0 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes of a token in bf16
    rows = prompts * of.sampling.answers
    read = 2.0 * count_parameters(config) + rows * cache * (of.prompt + of.sampling.max_tokens / 2)
    decode = of.sampling.max_tokens * read / rate["bandwidth"]
    reward = rows * REWARD_S / of.workers
    forward = of.packs(gpus) * sum(operations(config, of.shape).values()) / rate["matmul"]
    parts = [
        Part("sampling: prompts and images", prompts * sum(ops.values()) / rate["matmul"], "matmul"),
        Part("sampling: completions", decode, "bandwidth"),
        Part("reward", max(0.0, reward - decode), "processor", min(reward, decode)),
        Part("log-probabilities", of.forward_passes * forward, "matmul"),
        *(Part(f"update: {part.name}", part.seconds, part.kind, part.hidden) for part in update.parts),
    ]
    head = head_flops(config, round(rows * of.sampling.max_tokens))
    flops = update.flops + prompts * sum(ops.values()) + head + of.forward_passes * update.flops / TRAINING
    return Plan(parts, flops, update.packs, gpus, device.matmul, ceilings)
