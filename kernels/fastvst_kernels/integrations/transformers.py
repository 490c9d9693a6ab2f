"""fastvst's operators inside transformers.

from fastvst_kernels.integrations.transformers import apply, register, restore

register()                                # attention only: model.set_attn_implementation("fastvst")
print(apply(model))                       # attention, norms, gated MLPs and the loss; says what was replaced
restore(model)                            # as it was
"""

from fastvst_kernels.integrations.apply import Report, apply, restore
from fastvst_kernels.integrations.attention import NAME, attention, register

__all__ = ["NAME", "Report", "apply", "attention", "register", "restore"]
