"""Tiny random models of transformers with every attention feature of their class switched on, and what becomes of them.

`MODELS` is the table that the tests check and the documentation shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from fastvst_kernels.integrations import attention as integration

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2}
HEAD = {"head_dim": 16}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QUIET = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
ENCODER = SIZES | QUIET | {"pad_token_id": 0, "max_position_embeddings": 64}
BIG = {"attention_bias": True, "attention_dropout": 0.0}
WINDOW = {"sliding_window": 3}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PIXELS = VISION | {"image_size": 28, "patch_size": 7}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
QUIET_GPT2 = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
BART = {"vocab_size": 97, "d_model": 64, "max_position_embeddings": 64, "decoder_start_token_id": 2}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0, "attention_dropout": 0.0}
M_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PATCHES = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
TOWERS = {
    "Qwen2VL": PATCHES | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "Qwen2_5_VL": PATCHES
    | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    | {"window_size": 16, "fullatt_block_indexes": [1]},
    "Qwen3VL": PATCHES
    | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
}
IMAGE = 90
IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


@dataclass(frozen=True)
class HostModel:
    """One class of transformers.

    Attributes:
        name: without the suffix.
        kind: "decoder", "encoder", "encoder-decoder", "vision" or "vision-language".
        options: of its config.
        refused: None where it equals eager attention, else what the refusal names.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None

    @property
    def suffix(self) -> str:
        return {
            "decoder": "LMHeadModel" if self.name == "GPT2" else "ForCausalLM",
            "encoder": "ForMaskedLM",
            "encoder-decoder": "ForConditionalGeneration",
            "vision": "Model",
            "vision-language": "ForConditionalGeneration",
        }[self.kind]


def _decoder(name: str, *options: dict[str, Any], refused: str | None = None) -> HostModel:
    merged: dict[str, Any] = dict(GROUPED | PADS)
    for more in options:
        merged |= more
    return HostModel(name, "decoder", merged, refused)


def _vision_language(name: str, *options: dict[str, Any]) -> HostModel:
    text: dict[str, Any] = GROUPED | PADS | {"rope_parameters": M_ROPE, "max_position_embeddings": 64}
    for more in options:
        text = text | more
    return HostModel(name, "vision-language", {"text_config": text, "vision_config": TOWERS[name], **IDS})


MODELS: tuple[HostModel, ...] = (
    _decoder("Llama", BIG),
    _decoder("Mistral", WINDOW),
    _decoder("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}, WINDOW),
    _decoder("Qwen3", HEAD, {"attention_bias": True}),
    _decoder("Qwen2Moe", EXPERTS, {"shared_expert_intermediate_size": 32}),
    _decoder("Qwen3Moe", EXPERTS, HEAD),
    _decoder("Gemma", HEAD),
    _decoder("Gemma2", HEAD, WINDOW, {"attn_logit_softcapping": 0.5}, refused="softcap"),
    _decoder("Gemma3", HEAD, WINDOW, {"query_pre_attn_scalar": 9}),
    _decoder("Granite", {"attention_multiplier": 0.7, "attention_bias": True}),
    _decoder("Phi", {"qk_layernorm": True}),
    _decoder("Phi3", WINDOW),
    _decoder("Olmo", {"clip_qkv": 1.0}),
    _decoder("Olmo2", {"attention_bias": True}),
    _decoder("Mixtral", MIXTURE, WINDOW),
    _decoder("Cohere", {"use_qk_norm": True}),
    _decoder("Cohere2", WINDOW, HEAD),
    _decoder("GptOss", MIXTURE, HEAD, WINDOW, refused="s_aux"),
    _decoder("StableLm", {"use_qkv_bias": True}),
    _decoder("Starcoder2", WINDOW, {"use_bias": True}),
    _decoder("SmolLM3", {"no_rope_layers": [1, 0]}),
    _decoder("Glm", HEAD, {"attention_bias": True}),
    _decoder("Helium", HEAD),
    _decoder("GPTNeoX", {"attention_bias": True}),
    _decoder("Nemotron", HEAD),
    HostModel("GPT2", "decoder", GPT2 | QUIET_GPT2 | PADS),
    HostModel("Bert", "encoder", ENCODER),
    HostModel("Roberta", "encoder", ENCODER),
    HostModel("Electra", "encoder", ENCODER),
    HostModel("ModernBert", "encoder", ENCODER | PADS | {"local_attention": 4, "global_attn_every_n_layers": 2}),
    HostModel("Bart", "encoder-decoder", BART | LAYERS | WIDTHS | PADS),
    HostModel("CLIPVision", "vision", PIXELS),
    HostModel("SiglipVision", "vision", PIXELS),
    HostModel("ViT", "vision", PIXELS | QUIET | {"qkv_bias": True}),
    HostModel("Dinov2", "vision", PIXELS | QUIET),
    _vision_language("Qwen2VL"),
    _vision_language("Qwen2_5_VL"),
    _vision_language("Qwen3VL", HEAD),
)


def build(model: HostModel) -> Any:
    """The model with random weights; those of matrices are large, so that no feature is too small to show."""
    torch.manual_seed(0)
    integration.register()
    config = getattr(tf, f"{model.name}Config")(**model.options)
    config._attn_implementation = "eager"
    name = "Gemma3ForCausalLM" if model.name == "Gemma3" else model.name + model.suffix
    if model.name == "Gemma3":
        config = tf.Gemma3TextConfig(**model.options)
        config._attn_implementation = "eager"
    made: nn.Module = getattr(tf, name)(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return made


def images_batch() -> tuple[dict[str, Any], Tensor]:
    """Two rows with three images in all, the second padded on the left: the call of a vision-language model."""
    small = [92, *[IMAGE] * 4, 93]
    wide = [92, *[IMAGE] * 6, 93]
    rows = [[5, 6, *small, 7, 8, *wide, 9, 10, 11], [5, *small, 12, 13]]
    ids = torch.tensor([[0] * (len(rows[0]) - len(row)) + row for row in rows])
    grids = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 4, 4]])
    pixels = torch.randn(int(grids.prod(1).sum()), 96, generator=torch.Generator().manual_seed(2))
    call = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels, "image_grid_thw": grids}
    return call | {"mm_token_type_ids": (ids == IMAGE).int()}, ids > 0


def table() -> str:
    """The Markdown table of the documentation."""
    lines = ['| class | kind | `attn_implementation="fastvst"` |', "| --- | --- | --- |"]
    for model in MODELS:
        result = "equals eager attention" if model.refused is None else f"refused: `{model.refused}`"
        name = model.name if model.kind == "vision" else model.name + model.suffix
        lines.append(f"| `{name}` | {model.kind} | {result} |")
    return "\n".join(lines)
