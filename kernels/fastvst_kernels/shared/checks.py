"""Checks of the public functions' arguments: an error here, never an illegal memory access in a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, groups: Tensor | None, *, causal: bool
) -> None:
    """Check shapes, dtypes and devices, without waiting for the device.

    Raises:
        ValueError: what came and what was expected.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (tokens, heads, head_dim)")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}; expected bfloat16, float16, float32 or float64")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: k and v must have one shape, "
            "with the tokens and head_dim of q"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype")
    if q.shape[1] < 1 or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} KV heads")
    if q.shape[2] % 16 or not 16 <= q.shape[2] <= 256:
        raise ValueError(f"head_dim is {q.shape[2]}; expected a multiple of 16 from 16 to 256")
    check_offsets("cu_seqlens", cu_seqlens, q)
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}; expected one device")
    if groups is not None:
        if not causal:
            raise ValueError("groups (shared prompts) need causal=True")
        if groups.shape != (cu_seqlens.numel() - 1,) or groups.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"groups is {groups.dtype} of shape {tuple(groups.shape)}; expected int32 of shape "
                f"({cu_seqlens.numel() - 1},), one for each sequence of cu_seqlens"
            )
        if groups.device != q.device:
            raise ValueError(f"groups is on {groups.device}, q on {q.device}")


def check_offsets(name: str, offsets: Tensor, like: Tensor) -> None:
    """Check that offsets are (n + 1,) int32 or int64 on `like`'s device."""
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} is {offsets.dtype} of shape {tuple(offsets.shape)}; expected int32 offsets of shape (n + 1,)"
        )
    if offsets.device != like.device:
        raise ValueError(f"{name} is on {offsets.device}, the tokens are on {like.device}; move it there")


def check_offset_values(name: str, offsets: Tensor, total: int) -> list[int]:
    """The offsets as a list, after a check that they rise from 0 to `total`. Waits for the device."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(f"{name} runs from {values[0]} to {values[-1]}; expected from 0 to {total}, the row count")
    for index, (a, b) in enumerate(zip(values[:-1], values[1:], strict=True)):
        if b < a:
            raise ValueError(f"{name} decreases from {a} to {b} at entry {index + 1}")
    return values


def check_attention_values(cu_seqlens: Tensor, groups: Tensor | None, total: int) -> None:
    """Check the values of offsets, and that groups are [prompt | completions ...]. Waits for the device."""
    check_offset_values("cu_seqlens", cu_seqlens, total)
    if groups is None:
        return
    prompts = groups.tolist()
    for index, prompt in enumerate(prompts):
        if prompt == -1:
            continue
        if not 0 <= prompt < index:
            raise ValueError(f"groups[{index}] is {prompt}; expected -1 or a sequence before {index}")
        if prompts[prompt] != -1:
            raise ValueError(
                f"groups[{index}] names sequence {prompt}, which is itself a completion of {prompts[prompt]}"
            )
        if any(p != prompt for p in prompts[prompt + 1 : index]):
            raise ValueError(
                f"groups[{index}] names prompt {prompt}, but another sequence lies between them; "
                "the layout is [prompt | completion 1 | ... | completion n]"
            )
