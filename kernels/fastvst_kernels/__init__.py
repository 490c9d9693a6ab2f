"""Operators for packed vision-language training: each public function has its plain PyTorch reference beside it.

Needs torch (and triton for the GPU kernels), and knows nothing of any model or trainer.
"""

from fastvst_kernels.attention import AttentionPlan, attention_reference, packed_attention, prepare
from fastvst_kernels.decode_attention import decode_attention
from fastvst_kernels.linear import packed_linear
from fastvst_kernels.linear_cross_entropy import linear_cross_entropy
from fastvst_kernels.linear_logprobs import linear_logprobs
from fastvst_kernels.linear_policy_loss import linear_policy_loss
from fastvst_kernels.loss_head import VocabularyShard
from fastvst_kernels.mrope import mrope, vision_rope
from fastvst_kernels.norm import add_rms_norm, rms_norm
from fastvst_kernels.sampling import sample_tokens
from fastvst_kernels.swiglu import swiglu
from fastvst_kernels.window import window_attention

__all__ = [
    "VocabularyShard",
    "AttentionPlan",
    "add_rms_norm",
    "attention_reference",
    "decode_attention",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_policy_loss",
    "mrope",
    "packed_attention",
    "packed_linear",
    "prepare",
    "rms_norm",
    "sample_tokens",
    "swiglu",
    "vision_rope",
    "window_attention",
]
