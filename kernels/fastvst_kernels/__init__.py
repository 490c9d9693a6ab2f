"""Operators for packed vision-language training, each with a plain PyTorch reference in its folder.

Needs torch, and triton for the GPU kernels. Nothing here depends on a model or a trainer.
"""

from fastvst_kernels import flops as _flops  # noqa: F401 - registers the formulas of torch's FLOP counter
from fastvst_kernels.activation.op import swiglu
from fastvst_kernels.attention.api import AttentionPlan, attention_reference, packed_attention, prepare
from fastvst_kernels.decode.op import decode_attention
from fastvst_kernels.linear import packed_linear
from fastvst_kernels.lm_head.cross_entropy import linear_cross_entropy
from fastvst_kernels.lm_head.logprobs import linear_logprobs
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss
from fastvst_kernels.lm_head.types import VocabularyShard
from fastvst_kernels.losses import LinearCrossEntropyLoss, LinearLogProbs, LinearPolicyLoss
from fastvst_kernels.norm.op import add_rms_norm, rms_norm
from fastvst_kernels.rope.op import mrope, vision_rope
from fastvst_kernels.rotary.op import rotary_embedding
from fastvst_kernels.sampling.op import sample_tokens
from fastvst_kernels.window.op import window_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
    "LinearCrossEntropyLoss",
    "LinearLogProbs",
    "LinearPolicyLoss",
    "VocabularyShard",
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
    "rotary_embedding",
    "sample_tokens",
    "swiglu",
    "vision_rope",
    "window_attention",
]
