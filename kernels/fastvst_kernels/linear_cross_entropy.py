"""The language-model head and its losses, a chunk of rows at a time: logits never exist outside a chunk.

The gradients of `linear_cross_entropy` are computed in the forward pass, while the chunk's logits are still there:
three products of 2 M H V floating-point operations in all, where recomputing the logits in backward would pay four.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 1 << 22  # logits of a chunk: 16 MiB in float32, which stays in a CPU's last-level cache


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    chunk_rows: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    validate: bool = False,
) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `targets`, in float32 (float64 for float64 inputs).

    Args:
        hidden: (M, H) floating; weight: (V, H) of the same dtype.
        targets: (M,) integers in 0..V-1; -100 = ignored.
        row_weights: (M,) float or None. Given: loss = sum(row_weights * loss_of_row), the caller having put the
            global normaliser into them. None: the mean over rows that are not ignored (0 if there are none).
        chunk_rows: rows at a time; default about 4 M logits.
        z_loss: adds `z_loss * logsumexp^2` to the loss of each row (arXiv 2204.02311 §5).
        label_smoothing: the share of the target spread over all V, as in `torch.nn.functional.cross_entropy`.
        validate: check on CUDA, too, that targets are in range (a synchronisation); always checked on the CPU.

    Returns:
        scalar, float32 or float64. Gradients flow to hidden and weight (a frozen one skips its product), not to
        row_weights.

    Raises:
        ValueError: shapes or dtypes that do not fit, targets out of range.
    """
    _check(hidden, weight, targets, validate)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep = targets != IGNORE
    if row_weights is None:
        row_weights = keep.to(dtype) / keep.sum().clamp(min=1)
    elif row_weights.shape != targets.shape:
        raise ValueError(f"row_weights has shape {tuple(row_weights.shape)}; expected {tuple(targets.shape)}")
    else:
        row_weights = row_weights.detach().to(dtype) * keep
    rows = chunk_rows or default_chunk_rows(weight.shape[0])
    needs = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, row_weights, rows, z_loss, label_smoothing, needs)


def default_chunk_rows(vocabulary: int) -> int:
    """Rows whose float32 logits fill about 16 MiB, at least 64."""
    return max(64, CHUNK_ELEMENTS // max(vocabulary, 1))


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The formula with all logits at once, in plain differentiable PyTorch and the inputs' dtype."""
    logits = hidden @ weight.t()
    keep = targets != IGNORE
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1) + z_loss * lse**2
    if row_weights is None:
        return (loss * keep).sum() / keep.sum().clamp(min=1)
    return (loss * keep * row_weights).sum()


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    top_entropy: int | None = None,
    chunk_rows: int | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under `softmax(hidden @ weight.T / temperature)`, and the entropy.

    Args:
        hidden: (M, H); weight: (V, H); targets: (M,), -100 = ignored (both results are 0 there).
        temperature: > 0.
        top_entropy: the entropy over the `top_entropy` most likely tokens, renormalised, instead of over all V.

    Returns:
        logprobs (M,), entropy (M,): float32 (float64 for float64 inputs), both differentiable. Backward computes the
        chunk's logits again.
    """
    _check(hidden, weight, targets, validate)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0")
    if top_entropy is not None and not 1 <= top_entropy <= weight.shape[0]:
        raise ValueError(f"top_entropy is {top_entropy}; expected None or 1..{weight.shape[0]}")
    rows = chunk_rows or default_chunk_rows(weight.shape[0])
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, top_entropy, rows)


def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, top_entropy: int | None = None
) -> tuple[Tensor, Tensor]:
    """The formula with all logits at once, in plain differentiable PyTorch."""
    logits = hidden @ weight.t() / temperature
    return _row_statistics(logits, targets, top_entropy)


def _row_statistics(logits: Tensor, targets: Tensor, top_entropy: int | None) -> tuple[Tensor, Tensor]:
    keep = targets != IGNORE
    logprobs = torch.log_softmax(logits, dim=-1)
    picked = logprobs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    if top_entropy is not None:
        logprobs = torch.log_softmax(logits.topk(top_entropy, dim=-1).values, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.where(keep, picked, 0.0), torch.where(keep, entropy, 0.0)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, validate: bool) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; expected (M, H) and (V, H)")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; expected one floating dtype")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}; expected integers of shape ({hidden.shape[0]},)"
        )
    if (validate or targets.device.type == "cpu") and targets.numel():
        bad = (targets != IGNORE) & ((targets < 0) | (targets >= weight.shape[0]))
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"target {int(targets[row])} at row {row} is outside the vocabulary of {weight.shape[0]} (or -100)"
            )


def _logits(hidden: Tensor, weight: Tensor, wide: Tensor | None) -> Tensor:
    """float32 (float64) logits; half-precision products stay in the float32 accumulator."""
    if wide is not None:
        return hidden.to(wide.dtype) @ wide.t()
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.t()
    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)


def _widened(weight: Tensor) -> Tensor | None:
    """On the CPU a half-precision weight is widened once; CUDA multiplies it as it is into float32."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return weight.float() if half and weight.device.type == "cpu" else None


def _products(d: Tensor, h: Tensor, weight: Tensor, wide: Tensor | None, grad_weight: Tensor | None, need_h: bool):
    """Add `d.T @ h` to grad_weight and return `d @ weight`, for d (rows, V) float32."""
    if weight.dtype in (torch.float32, torch.float64):
        if grad_weight is not None:
            grad_weight.addmm_(d.t(), h)
        return d @ weight if need_h else None
    if wide is not None:
        if grad_weight is not None:
            grad_weight.addmm_(d.t(), h.float())
        return d @ wide if need_h else None
    d = d.to(weight.dtype)
    if grad_weight is not None:
        grad_weight += torch.mm(d.t(), h, out_dtype=torch.float32)
    return torch.mm(d, weight, out_dtype=torch.float32) if need_h else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, row_weights, rows, z_loss, smoothing, needs):
        wide, vocabulary = _widened(weight), weight.shape[0]
        need_hidden, need_weight = (needs and n for n in ctx.needs_input_grad[:2])
        loss = row_weights.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=row_weights.dtype) if need_weight else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            h, coefficient = hidden[part], row_weights[part, None]
            target = targets[part, None].clamp(min=0)
            logits = _logits(h, weight, wide)
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            row = lse - (1 - smoothing) * logits.gather(1, target)
            if smoothing:
                row = row - smoothing * logits.mean(-1, keepdim=True)
            if z_loss:
                row = row + z_loss * lse**2
            # An ignored row may hold inf: 0 * inf would poison the sum.
            loss += torch.where(coefficient != 0, row * coefficient, 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            scale = coefficient * (1 + 2 * z_loss * lse) if z_loss else coefficient
            d = logits.sub_(lse).exp_().mul_(scale)
            if smoothing:
                d.sub_(coefficient * (smoothing / vocabulary))
            d.scatter_add_(1, target, -(1 - smoothing) * coefficient)
            grad = _products(d, h, weight, wide, grad_weight, need_hidden)
            if grad_hidden is not None:
                grad_hidden[part] = grad
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, top_entropy, rows):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = (temperature, top_entropy, rows)
        wide = _widened(weight)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs, entropy = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, wide).div_(temperature)
            logprobs[part], entropy[part] = _row_statistics(logits, targets[part], top_entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets = ctx.saved_tensors
        temperature, top_entropy, rows = ctx.settings
        wide = _widened(weight)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad_logprobs.dtype) if need_weight else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, wide).div_(temperature).requires_grad_()
            with torch.enable_grad():
                outputs = _row_statistics(logits, targets[part], top_entropy)
                (d,) = torch.autograd.grad(outputs, logits, (grad_logprobs[part], grad_entropy[part]))
            grad = _products(d.div_(temperature), hidden[part], weight, wide, grad_weight, need_hidden)
            if grad_hidden is not None:
                grad_hidden[part] = grad
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None
