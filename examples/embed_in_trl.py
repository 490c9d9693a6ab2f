"""fastvst's kernels in TRL's GRPO trainer: packed attention, fused layers and a fused LM head; one call, one mixin.

    pip install "trl>=1.16"
    python examples/embed_in_trl.py

A random Qwen2 learns to repeat one word. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from fastvst_kernels.integrations.transformers import apply
from fastvst_kernels.integrations.trl import GRPOMixin

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]


class PackedGRPOTrainer(GRPOMixin, GRPOTrainer):
    """TRL's trainer; prompts and completions of a batch become one packed row, and no logits are kept."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def tiny_qwen(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, bos_token_id=None))


def share_of_one_word(completions: list[str], **others: Any) -> list[float]:
    """The reward: how much of the completion is the word w7."""
    return [text.split().count("w7") / max(1, len(text.split())) for text in completions]


def train(steps: int = 40) -> list[float]:
    """Train and return the mean reward of every step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=8,
            learning_rate=5e-3,
            max_steps=steps,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        model = tiny_qwen()
        print(apply(model))
        trainer = PackedGRPOTrainer(
            model=model,
            reward_funcs=share_of_one_word,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"] * 8}),
            processing_class=tokenizer(),
        )
        trainer.train()
        return [row["reward"] for row in trainer.state.log_history if "reward" in row]


def main() -> None:
    rewards = train()
    print(f"mean reward of the first 5 steps {sum(rewards[:5]) / 5:.3f}, of the last 5 {sum(rewards[-5:]) / 5:.3f}")


if __name__ == "__main__":
    main()
