"""TRL's GRPO and SFT trainers with the mixins: losses and gradient norms of TRL's own trainers over four steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from fastvst_kernels.integrations import trl as integration
from fastvst_kernels.integrations.trl import GRPOMixin, SFTMixin, use_fused_head

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(60))]


class OurGRPO(GRPOMixin, GRPOTrainer):
    pass


class OurSFT(SFTMixin, SFTTrainer):
    pass


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def model(attention: str = "sdpa") -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    made = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, bos_token_id=None))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    made.set_attn_implementation(attention)
    return made


def texts(count: int) -> list[str]:
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (count,), generator=g).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(0, 60, (n,), generator=g).tolist()) for n in lengths]


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [{n: row[n] for n in ("loss", "grad_norm", "entropy")} for row in trainer.state.log_history if "loss" in row]


def close(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (name, ours, theirs)


COMMON = {"logging_steps": 1, "max_steps": 4, "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 5}


def reward(completions: list[str], **others: Any) -> list[float]:
    return [float(len(set(text.split())) % 3) + 0.1 * (len(text) % 7) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "fastvst"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(tmp_path: Path, beta: float, attention: str) -> None:
    integrations_registered()
    made = []
    for kind, implementation in ((GRPOTrainer, "sdpa"), (OurGRPO, attention)):
        arguments = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            num_iterations=2,
            beta=beta,
            temperature=0.8,
            learning_rate=1e-3,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **COMMON,
        )
        data = Dataset.from_dict({"prompt": texts(8)})
        model().save_pretrained(tmp_path / "model")  # TRL reads the reference model from the model's path
        policy = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        trainer = kind(
            model=policy, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer()
        )
        assert (trainer.ref_model is None) == (beta == 0)
        if implementation != "sdpa":
            trainer.model.set_attn_implementation(implementation)
        made.append(history(trainer))
    close(made[1], made[0])


def integrations_registered() -> None:
    from fastvst_kernels.integrations.transformers import register

    register()


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("form", ["padded", "padding free", "packed"])
def test_sft(tmp_path: Path, form: str, bf16: bool) -> None:
    integrations_registered()
    made = []
    forms: dict[str, dict[str, Any]] = {
        "padded": {},
        "padding free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "max_length": 16},
    }
    for kind in (SFTTrainer, OurSFT):
        arguments = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            bf16=bf16,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **forms[form],
            **COMMON,
        )
        data = Dataset.from_dict({"text": texts(24)})
        trainer = kind(model=model(), args=arguments, train_dataset=data, processing_class=tokenizer())
        if kind is OurSFT:
            trainer.model.set_attn_implementation("fastvst")
        rows = history(trainer)
        accuracy = [row["mean_token_accuracy"] for row in trainer.state.log_history if "loss" in row]
        made.append([row | {"accuracy": x} for row, x in zip(rows, accuracy, strict=True)])
    close(made[1], made[0], 3e-2 if bf16 else 1e-4)


def test_padding_goes_through_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    use_fused_head(made)
    seen: list[tuple[int, ...]] = []
    made.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    ids = torch.randint(2, 60, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = made(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert seen == [(1, 11, 32)]
    wanted = torch.log_softmax(made(input_ids=ids, attention_mask=mask).logits[:, :-1], -1)
    picked = wanted.gather(-1, ids[:, 1:, None]).squeeze(-1)
    kept = mask[:, :-1].bool() & mask[:, 1:].bool()
    torch.testing.assert_close(out.log_probs[kept], picked[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(out.label_mask, labels[:, 1:] != -100)


def test_what_is_not_supported_is_refused() -> None:
    made = model()
    with pytest.raises(ValueError, match="asked for .'mean_logits'."):
        use_fused_head(made, ("log_probs", "mean_logits"))
    use_fused_head(made)
    ids = torch.randint(2, 60, (1, 4))
    with pytest.raises(ValueError, match="has no router loss"):
        made(input_ids=ids, labels=ids, fused_lm_head=True, output_router_logits=True)
    with pytest.raises(ValueError, match="needs labels"):
        made(input_ids=ids, fused_lm_head=True)
    assert integration.FIELDS == ("log_probs", "entropy", "is_top1")
