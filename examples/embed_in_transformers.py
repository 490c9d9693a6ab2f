"""fastvst's packed attention inside transformers: `attn_implementation="fastvst"`.

    python examples/embed_in_transformers.py

`register` adds fastvst's attention under that name, with the mask function that belongs to it. Padded batches and rows
that hold several sequences work as with transformers' own attention. Here the sequences' boundaries are passed as
`cu_seq_lens_q` (the offsets that transformers' own collators and flash attention use). Shared-prompt groups are passed
in the same way, as one more keyword of the model's forward.

The demonstration runs a small random Qwen2 and a small random Qwen2.5-VL, once with transformers' SDPA on each sequence
alone and once with packed attention on all sequences in one row. It prints the largest difference of the logits, and
time and memory of a training step on sequences of very different lengths, compared with a padded batch and SDPA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from fastvst_kernels.integrations.compare import Comparison, compare
from fastvst_kernels.integrations.transformers import register

register()


def packed_inputs(lengths: list[int]) -> dict[str, Tensor | int]:
    """The keywords that a transformers model needs for packed sequences of these lengths."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def difference(model: nn.Module, sequences: list[Tensor], positions: list[Tensor], **images: Tensor) -> float:
    """Largest difference of the logits between SDPA on each sequence alone and packed attention on all in one row.

    Args:
        sequences: token ids, (L,) each.
        positions: (1, L) each, or (3, 1, L) for M-RoPE.
        images: keywords of the model for the images of the first sequence.
    """
    expected = []
    model.set_attn_implementation("sdpa")
    for index, (tokens, position) in enumerate(zip(sequences, positions, strict=True)):
        given = images if index == 0 else {}
        expected.append(model(input_ids=tokens[None], position_ids=position, use_cache=False, **given).logits[0])
    model.set_attn_implementation("fastvst")
    packed = packed_inputs([len(s) for s in sequences])
    ours = model(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat(positions, -1),
        use_cache=False,
        **packed,
        **images,
    ).logits[0]
    return (ours - torch.cat(expected)).abs().max().item()


def tiny_qwen2() -> Qwen2ForCausalLM:
    """A text model of 2 layers."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config).eval()


def qwen2() -> float:
    """Three sequences of 5, 1 and 9 tokens."""
    model = tiny_qwen2()
    sequences = [torch.randint(0, 100, (n,)) for n in (5, 1, 9)]
    return difference(model, sequences, [torch.arange(len(s))[None] for s in sequences])


LENGTHS = (500, 30, 120, 64)


def cost(lengths: tuple[int, ...] = LENGTHS) -> Comparison:
    """Forward and backward of one model: a batch padded to its longest sequence with SDPA against one packed row."""
    model = tiny_qwen2()
    ids = [torch.randint(0, 100, (n,)) for n in lengths]
    batch = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = (torch.arange(batch.shape[1]) < torch.tensor(lengths)[:, None]).long()
    row = torch.cat(ids)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = packed_inputs(list(lengths))

    def host() -> None:
        model.set_attn_implementation("sdpa")
        out = model(input_ids=batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100), use_cache=False)
        out.loss.backward()

    def ours() -> None:
        model.set_attn_implementation("fastvst")
        model(input_ids=row, position_ids=positions, labels=row, use_cache=False, **packed).loss.backward()

    return compare(host, ours)


def qwen2_5_vl() -> float:
    """A vision-language model: an image of 4 x 6 patches with text, and a sequence of text only."""
    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    text = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**text, **ids, vision_config=vision)).eval()
    grid = torch.tensor([[1, 4, 6]])
    sequences = [torch.tensor([1, 2, 92, *[90] * 6, 93, 3, 4]), torch.tensor([5, 6, 7])]
    positions = []
    for index, tokens in enumerate(sequences):
        found = {"image_grid_thw": grid} if index == 0 else {}
        marks = (tokens == 90).int()[None]
        positions.append(model.model.get_rope_index(tokens[None], mm_token_type_ids=marks, **found)[0])
    return difference(model, sequences, positions, pixel_values=torch.randn(24, 1176), image_grid_thw=grid)


if __name__ == "__main__":
    with torch.no_grad():
        print(f"Qwen2, 3 sequences in one row: largest difference of the logits {qwen2():.2g}")
        print(f"Qwen2.5-VL, an image and text in one row: {qwen2_5_vl():.2g}")
    print(f"a training step of Qwen2 on sequences of {', '.join(map(str, LENGTHS))} tokens: {cost()}")
