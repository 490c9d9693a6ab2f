"""AdamW with bfloat16 weights and bfloat16 or 8-bit moments: 8 or 6 bytes for each parameter instead of 16.

    bf16    weights, gradients and both moments in bfloat16. The new weight and both new moments are rounded
            stochastically: to nearest, a weight would never change by less than 1/512 of itself (a step of 1e-5 on a
            weight of 0.02 is 1/2000), and a second moment with beta 0.999 would never decay.
    8bit    weights and gradients in bfloat16, weights rounded stochastically; the moments of matrices as 8-bit codes of
            the dynamic map with one float32 scale for each 256 values of a row (arXiv 2110.02861), those of vectors in
            float32.

A step computes in float32: it widens the stored values, applies AdamW (arXiv 1711.05101), uses the unrounded moments
for the new weight, and rounds at the end. FSDP2 sums gradients over ranks in float32, then rounds them to bfloat16;
micro-batches add up in bfloat16.

The random bits of the rounding are a hash of (step, parameter, place in the whole tensor), and no block of 256 values
crosses a row. So a run has the same bits on any number of ranks, and a resumed run needs no random state. That, and
moments that are plain tensors in the checkpoint's safetensors files, is what torchao.optim 0.18 does not offer: it
draws from torch's generator, quantises a shard only if its length is a multiple of 256, hides the codes in a tensor
subclass, and compiles its step with Inductor also on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

BLOCK = 256  # values that share a scale, as in arXiv 2110.02861
ZERO = {"exp_avg": 127, "exp_avg_sq": 0}  # the code of 0: a map with signs has 127 negative values
STEP_ELEMENTS = 1 << 22  # values that are updated at once
STEP_BYTES = 64 * STEP_ELEMENTS  # of float32 and int32 temporaries for each of them: about 16 tensors at the peak


class LowMemoryAdamW(torch.optim.Optimizer):
    """See the module's docstring. Parameters are bfloat16, plain tensors or DTensors sharded by rows.

    Args:
        groups: as for torch.optim.AdamW; each has lr and weight_decay.
        state: "bf16" or "8bit".

    Raises:
        ValueError: a parameter is not bfloat16.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float, state: str) -> None:
        super().__init__(list(groups), {"lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps})
        self.moments = state
        self.numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        other = {p.dtype for p in self.numbers} - {torch.bfloat16}
        if other:
            raise ValueError(f"optimizer.state {state} needs bfloat16 weights; got {', '.join(map(str, other))}")

    def init_state(self, parameter: Tensor) -> None:
        """Create the state of a parameter before its first step."""
        state = self.state[parameter]
        state["step"] = torch.zeros(())
        for name in ("exp_avg", "exp_avg_sq"):
            if self.moments == "bf16" or parameter.dim() < 2:
                dtype = torch.bfloat16 if self.moments == "bf16" else torch.float32
                state[name] = torch.zeros_like(parameter, dtype=dtype)
                continue
            state[name] = torch.full_like(parameter, ZERO[name], dtype=torch.uint8)
            state[f"{name}_scale"] = _scales(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("LowMemoryAdamW.step takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(parameter)
                    self._update(parameter, group)
        return None

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"])  # on the host
        weight = _rows(parameter)
        gradient = _rows(parameter.grad)
        stored = {name: _rows(value) for name, value in state.items() if name != "step"}
        begin = first_row(parameter) * weight.shape[1]
        count = max(1, STEP_ELEMENTS // max(1, weight.shape[1]))
        for row in range(0, weight.shape[0], count):
            part = slice(row, row + count)
            bits = RandomBits(step, self.numbers[parameter], begin + row * weight.shape[1], weight[part])
            first = _load(stored, "exp_avg", part)
            second = _load(stored, "exp_avg_sq", part)
            new = adamw(weight[part].float(), gradient[part].float(), first, second, step, group)
            weight[part] = bits.rounded(new, 0)
            _store(stored, "exp_avg", part, first, bits)
            _store(stored, "exp_avg_sq", part, second, bits)


def adamw(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """The new weight of AdamW in float32; both moments are updated in place."""
    beta1, beta2 = group["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    return weight.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step))


# -------------------------------------------------------------------------------------------------- stochastic rounding


class RandomBits:
    """Random bits for the elements of one piece of a tensor: the same for the same step, parameter and place."""

    def __init__(self, step: int, number: int, begin: int, like: Tensor) -> None:
        seeds = _mix_number(step), _mix_number(_mix_number(step) ^ number)
        place = torch.arange(begin, begin + like.numel(), device=like.device).to(torch.int32).view(like.shape)
        self.words = [mix(place ^ _signed(seeds[1]))]
        self.seed = _signed(seeds[0])

    def rounded(self, x: Tensor, which: int) -> Tensor:
        """x (float32) rounded to a bfloat16 number next to it, with the probability of 1 - distance; still float32.

        Args:
            which: 0, 1 or 2: the stream of random bits.
        """
        if which == 2 and len(self.words) == 1:
            self.words.append(mix(self.words[0] + self.seed))
        noise = (self.words[which // 2] >> (16 * (which % 2))) & 0xFFFF
        bits = (x.view(torch.int32) + noise) & -0x10000
        return torch.where(x.isfinite(), bits.view(torch.float32), x)


def mix(x: Tensor) -> Tensor:
    """A hash of 32-bit integers, in place (lowbias32 of C. Wellons' hash-prospector, 2018)."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _mix_number(x: int) -> int:
    """`mix` of one Python number, behind a Weyl step so that 0 has a hash other than 0."""
    x = (x + 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


# -------------------------------------------------------------------------------------------------------------- storage


def first_row(parameter: Tensor) -> int:
    """The first row of the whole tensor that this rank holds: FSDP2 divides rows as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    rows = -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
    return min(rows * mesh.get_local_rank(mesh.ndim - 1), parameter.shape[0])


def _rows(tensor: Tensor | None) -> Tensor:
    """This rank's rows (n, width) of a tensor; a vector is one column."""
    assert tensor is not None
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.view(local.shape[0], -1) if local.numel() else local.view(0, 1)


def _scales(parameter: Tensor) -> Tensor:
    """(rows, blocks of a row) float32 zeros, sharded as the parameter."""
    blocks = -(-parameter.shape[1:].numel() // BLOCK)
    if not isinstance(parameter, DTensor):
        return torch.zeros(parameter.shape[0], blocks, device=parameter.device)
    local = torch.zeros(parameter.to_local().shape[0], blocks, device=parameter.device)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size((parameter.shape[0], blocks)),
        stride=(blocks, 1),
    )


def _load(stored: dict[str, Tensor], name: str, part: slice) -> Tensor:
    """A moment in float32, a copy."""
    values = stored[name][part]
    if values.dtype != torch.uint8:
        return values.to(torch.float32, copy=True)
    return dequantised(values, stored[f"{name}_scale"][part], signed=name == "exp_avg")


def _store(stored: dict[str, Tensor], name: str, part: slice, values: Tensor, bits: RandomBits) -> None:
    if stored[name].dtype == torch.uint8:
        codes, scales = quantised(values, signed=name == "exp_avg")
        stored[name][part] = codes
        stored[f"{name}_scale"][part] = scales
    elif stored[name].dtype == torch.bfloat16:
        stored[name][part] = bits.rounded(values, 1 if name == "exp_avg" else 2)
    else:
        stored[name][part] = values


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """(256,) float32 ascending, from -1 or 0 to 1: the dynamic tree quantisation of arXiv 2110.02861 §1.3.

    Seven decades, of which the larger ones have more values: 2^i in decade i (twice as many without a sign), at the
    middles of equal parts of 0.1 to 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values))


@functools.cache
def map_on(signed: bool, device: torch.device) -> Tensor:
    """`dynamic_map` on a device, moved once: each copy would wait for all queued work, four times a parameter."""
    return dynamic_map(signed).to(device)


def quantised(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (n, width) uint8 of the nearest values of the map; scales (n, blocks): the largest size of each block.

    Without a sign, a value above 0 never becomes 0: a second moment of 0 under a first moment that is not 0 would be a
    step of almost any size (the zero-point problem, arXiv 2309.01507 §4.1; torchao 0.18 has it).
    """
    rows, width = x.shape
    blocks = F.pad(x, (0, -width % BLOCK)).view(rows, -1, BLOCK)
    scales = blocks.abs().amax(-1)
    values = map_on(signed, x.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=1e-30)[..., None], middles, out_int32=True)
    if not signed:
        codes.clamp_(min=1).mul_(blocks > 0)
    return codes.to(torch.uint8).view(rows, -1)[:, :width], scales


def dequantised(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """(n, width) float32."""
    rows, width = codes.shape
    values = map_on(signed, codes.device)[F.pad(codes, (0, -width % BLOCK)).int()]
    return (values.view(rows, -1, BLOCK) * scales[..., None]).view(rows, -1)[:, :width].contiguous()
