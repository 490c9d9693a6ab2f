"""Operators for packed vision-language training: each public function has its plain PyTorch reference beside it.

Needs torch (and triton for the GPU kernels), and knows nothing of any model or trainer.
"""

from fastvst_kernels.attention import attention_reference, packed_attention
from fastvst_kernels.linear import packed_linear
from fastvst_kernels.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from fastvst_kernels.mrope import mrope, vision_rope
from fastvst_kernels.norm import add_rms_norm, rms_norm
from fastvst_kernels.swiglu import swiglu
from fastvst_kernels.window import window_attention

__all__ = [
    "add_rms_norm",
    "attention_reference",
    "linear_cross_entropy",
    "linear_logprobs",
    "mrope",
    "packed_attention",
    "packed_linear",
    "rms_norm",
    "swiglu",
    "vision_rope",
    "window_attention",
]
