"""fastvst's fused LM head and loss in other training loops: from hidden states to the loss, without logits.

    python examples/embed_loss.py

1. a supervised loop in plain PyTorch; 2. the loss of a transformers model; 3. reinforcement-learning updates of it;
4. time and memory of the loss and its gradients, compared with logits that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fastvst_kernels import linear_cross_entropy, linear_logprobs, linear_policy_loss
from fastvst_kernels.integrations.compare import Comparison, compare
from fastvst_kernels.integrations.lm_head import LMHead, check_logits, lm_head, without_peft
from fastvst_kernels.objectives import DAPO, Objective


def bare_loop(steps: int = 60, seed: int = 0) -> list[float]:
    """Train a next-token model with tied embeddings on a repeating text; returns the losses."""
    torch.manual_seed(seed)
    text = torch.tensor(list(b"the small house stands behind the large house. " * 8))
    embedding = nn.Embedding(256, 48)
    mixer = nn.GRU(48, 48, batch_first=True)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *mixer.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        hidden = mixer(embedding(text[None, :-1]))[0][0]  # (M, H)
        loss = linear_cross_entropy(hidden, embedding.weight, text[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tiny_qwen(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=300, tie_word_embeddings=False, **sizes, **heads))


def hidden_and_targets(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B * (T - 1), H) hidden states and the next token of each; labels (B, T) are -100 where there is no loss."""
    hidden = without_peft(model).base_model(input_ids=input_ids).last_hidden_state
    return hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def transformers_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The value of `model(input_ids=..., labels=...).loss`, without its (B, T, V) logits.

    Raises:
        ValueError: the model makes its logits in a way that the operator does not compute.
    """
    head = checked_head(model, input_ids)
    hidden, targets = hidden_and_targets(model, input_ids, labels)
    return linear_cross_entropy(hidden, head.weight, targets, **head.options())


def policy_update(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    rewards: Tensor,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    updates: int = 2,
) -> list[dict[str, Tensor]]:
    """`updates` steps on one group of completions: input_ids, labels (B, T), rewards (B,). Returns the statistics."""
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    completion = torch.arange(len(rewards)).repeat_interleave(labels.shape[1] - 1)
    mask = (labels[:, 1:] != -100).flatten()
    checked_head(model, input_ids)
    with torch.no_grad():
        head = lm_head(model)
        hidden, targets = hidden_and_targets(model, input_ids, labels)
        old, _ = linear_logprobs(hidden, head.weight, targets, **head.options())
    history = []
    for _ in range(updates):
        head = lm_head(model)
        hidden, targets = hidden_and_targets(model, input_ids, labels)
        loss, stats = linear_policy_loss(
            hidden,
            head.weight,
            targets,
            objective,
            **head.options(),
            old_logprobs=old,
            advantages=advantages[completion],
            row_weights=objective.row_weights(mask, completion),
            sequence_ids=completion,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(stats)
    return history


def checked_head(model: PreTrainedModel, input_ids: Tensor) -> LMHead:
    """The LM head (weight, bias, scale, soft cap), compared with the model's own logits of two tokens."""
    head = lm_head(model)
    check_logits(model, input_ids, head)
    return head


def cost(rows: int = 1024, width: int = 128, vocabulary: int = 8192) -> Comparison:
    """The loss and both gradients: PyTorch with its logits against the fused operator."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    return compare(
        lambda: torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets), (hidden, weight)),
        lambda: torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight)),
    )


def main() -> None:
    losses = bare_loop()
    print(f"bare loop: loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model = tiny_qwen()
    input_ids = torch.randint(300, (4, 24))
    labels = input_ids.masked_fill(torch.arange(24) < 10, -100)  # the first ten tokens are the prompt
    theirs = model(input_ids=input_ids, labels=labels).loss
    print(f"transformers' loss {theirs.item():.6f}, fused {transformers_loss(model, input_ids, labels).item():.6f}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    for step, stats in enumerate(policy_update(model, input_ids, labels, rewards, DAPO(), optimizer, updates=3)):
        shown = ("ratio_mean", "ratio_max", "clip_low", "clip_high", "kl_old_k3", "entropy", "gemm_saved")
        print(f"update {step}: " + ", ".join(f"{name} {stats[name].item():.4f}" for name in shown))
    print(f"loss and gradients of 1,024 rows over 8,192 tokens: {cost()}")


if __name__ == "__main__":
    main()
