"""EncodedSample and PackedBatch: what goes from the loader to the model, as explicit frozen objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # label of a token that is not supervised (torch's cross_entropy default)


@dataclass(frozen=True)
class Cost:
    """What a sample costs: LLM tokens, vision patches, and training FLOPs (forward + backward) of both together."""

    tokens: int
    patches: int
    flops: float


@dataclass(frozen=True)
class EncodedSample:
    """One sample as integers and patches. L tokens, I pictures, P patches, N = P / 4 merged vision tokens.

    Attributes:
        tokens: (L,) int32 token ids.
        labels: (L,) int32; `tokens[i]` where token i is supervised, else -100 (not shifted). `labels[0]` is -100.
        positions: (3, L) int32 M-RoPE positions (t, h, w).
        patches: (P, 1176) float32, in Qwen2.5-VL's order (that of the Hugging Face processor's `pixel_values`).
        grid: (I, 3) int32 patch grids (t, h, w), pictures and videos in reading order.
        vision_slots: (N,) int32; the token index of each merged vision token, in patch order.
        window_order, window_lengths, image_lengths, vision_positions: see `fastvst.model.positions.VisionLayout`.
        cost: what the packer balances.
        source, id, kind: provenance; errors and the ledger name them.
        notes: reason codes of what encoding changed ("fov_unified", "fov_unchanged:no_camera_line", ...).
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    patches: Tensor
    grid: Tensor
    vision_slots: Tensor
    window_order: Tensor
    window_lengths: Tensor
    image_lengths: Tensor
    vision_positions: Tensor
    cost: Cost
    source: str = "memory"
    id: str = "0"
    kind: str = "qa"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class PackedBatch:
    """One packed row: S sequences of T tokens in all, W windows, F frames, P patches, N = P / 4, M supervised tokens.

    Boundaries are `cu_seqlens`; positions are data; nothing infers one from the other. Patches and everything that
    belongs to them stand in *tower order* (window after window), so that the vision tower never permutes: the merged
    token j of the tower goes to row `vision_slots[j]` of the decoder's input.

    Attributes:
        tokens: (T,) int64 token ids.
        labels: (T,) int64, not shifted, -100 = not supervised.
        loss_weights: (T,) float32 weight of each label (0 where not supervised).
        loss_rows: (M,) int64; the row of the hidden states that predicts each supervised token. It is the row before,
            except for the first token of an answer whose prompt is shared: there it is the prompt's last row.
        targets: (M,) int64 token ids to predict at `loss_rows`.
        target_weights: (M,) float32, `loss_weights` of the targets.
        positions: (3, T) int32 M-RoPE positions.
        cu_seqlens: (S + 1,) int32, from 0 to T.
        groups: (S,) int32 or None; for each sequence the index of the sequence that is its shared prompt, or -1.
        vision_slots: (N,) int64 rows of the merged vision tokens, in tower order.
        patches: (P, 1176) float32 in tower order.
        vision_positions: (P, 2) int32 (row, column) of each patch in its frame.
        window_order: (N,) int64; tower position j holds merged token `window_order[j]` of the reading order.
        cu_windows: (W + 1,) int32 and cu_images: (F + 1,) int32, patch offsets of windows and frames.
        grid: (I, 3) int32 patch grids in reading order.
        max_seqlen, max_window, max_image: the longest sequence, window and frame, as ints.
        sample_ids: "source/id" of every sequence.
        flops: training FLOPs of the pack (sum of the samples' costs).
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    loss_rows: Tensor
    targets: Tensor
    target_weights: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    groups: Tensor | None
    vision_slots: Tensor
    patches: Tensor
    vision_positions: Tensor
    window_order: Tensor
    cu_windows: Tensor
    cu_images: Tensor
    grid: Tensor
    max_seqlen: int
    max_window: int
    max_image: int
    sample_ids: tuple[str, ...]
    flops: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_targets(self) -> int:
        return self.targets.shape[0]

    @property
    def num_patches(self) -> int:
        return self.patches.shape[0]

    @property
    def num_images(self) -> int:
        return self.grid.shape[0]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def _map(self, fn: Any) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return PackedBatch(**{k: fn(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedBatch:
        """The same batch on `device`; asynchronous where the memory is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (called by DataLoader's pin thread)."""
        return self._map(lambda t: t.pin_memory())

    def equal(self, other: PackedBatch) -> bool:
        """True if every field is equal, tensors bit for bit and dtype for dtype."""
        for f in dataclasses.fields(self):
            a = getattr(self, f.name)
            b = getattr(other, f.name)
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
                    return False
            elif a != b:
                return False
        return True

    def describe(self) -> str:
        """One line for logs: sequences, tokens, supervised tokens, pictures, patches, longest sequence."""
        return (
            f"{len(self.sample_ids)} sequences, {self.num_tokens} tokens ({self.num_targets} supervised, "
            f"{self.vision_slots.shape[0]} vision), {self.num_images} images, {self.num_patches} patches, "
            f"longest {self.max_seqlen}, {self.flops / 1e12:.3g} TFLOP"
        )

    def validate(self) -> None:
        """Check every invariant that the model relies on. Reads the tensors' values: call it on the CPU.

        Raises:
            ValueError: naming the field, what came and what was expected.
        """
        total = self.num_tokens
        patches = self.num_patches
        merged = self.vision_slots.shape[0]
        for name, offsets, end in (
            ("cu_seqlens", self.cu_seqlens, total),
            ("cu_windows", self.cu_windows, patches),
            ("cu_images", self.cu_images, patches),
        ):
            if offsets.dim() != 1 or offsets.numel() < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != end:
                raise ValueError(f"{name} must run from 0 to {end}; got {offsets.tolist()[:8]}...")
            if (offsets.diff() < 0).any():
                raise ValueError(f"{name} decreases: {offsets.tolist()[:16]}...")
        shapes = {
            "labels": (self.labels, (total,)),
            "loss_weights": (self.loss_weights, (total,)),
            "positions": (self.positions, (3, total)),
            "vision_positions": (self.vision_positions, (patches, 2)),
            "window_order": (self.window_order, (merged,)),
            "loss_rows": (self.loss_rows, (self.num_targets,)),
            "target_weights": (self.target_weights, (self.num_targets,)),
        }
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        for name, slots in (("vision_slots", self.vision_slots), ("loss_rows", self.loss_rows)):
            if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < total:
                raise ValueError(f"{name} leaves the pack of {total} tokens: {int(slots.min())}..{int(slots.max())}")
        if self.vision_slots.unique().numel() != merged:
            raise ValueError("vision_slots names a row twice")
        sequences = self.cu_seqlens.numel() - 1
        if len(self.sample_ids) != sequences:
            raise ValueError(f"{len(self.sample_ids)} sample_ids for {sequences} sequences")
        if self.groups is not None:
            _validate_groups(self.groups, sequences)


def _validate_groups(groups: Tensor, sequences: int) -> None:
    if tuple(groups.shape) != (sequences,):
        raise ValueError(f"groups has shape {tuple(groups.shape)}; expected ({sequences},)")
    for index, prompt in enumerate(groups.tolist()):
        if prompt == -1:
            continue
        if not 0 <= prompt < index:
            raise ValueError(f"groups[{index}] is {prompt}; a shared prompt must stand before its answers")
        if groups[prompt] != -1:
            raise ValueError(f"groups[{index}] names sequence {prompt}, which is itself an answer")
        if any(g not in (prompt, -1) or (g == -1) for g in groups[prompt + 1 : index].tolist()):
            raise ValueError(f"groups[{index}]: the layout is [prompt | answer 1 | ... | answer n] without gaps")


def pack(
    samples: Sequence[EncodedSample],
    *,
    groups: Sequence[int] | None = None,
    loss_weights: Sequence[Tensor] | None = None,
) -> PackedBatch:
    """Concatenate encoded samples into one packed row, in the given order. Nothing is truncated or padded.

    Args:
        samples: the sequences; with `groups`, prompts and answers are sequences of their own.
        groups: for each sample the index of the sample that is its shared prompt, or -1 ([prompt | answers...]).
        loss_weights: one (L,) float tensor for each sample; default 1 for every supervised token.

    Raises:
        ValueError: no samples, or an invalid `groups`.
    """
    if not samples:
        raise ValueError("pack() needs at least one encoded sample; got none")
    lengths = torch.tensor([len(s) for s in samples])
    cu_seqlens = _offsets(lengths)
    starts = cu_seqlens[:-1].tolist()
    group_tensor = None
    if groups is not None:
        group_tensor = torch.tensor(list(groups), dtype=torch.int32)
        _validate_groups(group_tensor, len(samples))

    # Patches are nearly all of a pack's bytes (34 MB of a 4,096-token rooms pack): each sample's are permuted straight
    # into their place, which takes 24 ms where permuting, then concatenating took 43.
    patches = torch.empty((sum(s.patches.shape[0] for s in samples), samples[0].patches.shape[1]))
    slots = []
    orders = []
    unit_base = 0
    row = 0
    for sample, start in zip(samples, starts, strict=True):
        order = sample.window_order.long()
        units = order.shape[0]
        rows = sample.patches.shape[0]
        slots.append(sample.vision_slots.long()[order] + start)
        orders.append(order + unit_base)
        if units:
            into = patches[row : row + rows].view(units, -1)
            torch.index_select(sample.patches.view(units, -1), 0, order, out=into)
        unit_base = unit_base + units
        row = row + rows
    windows = torch.cat([s.window_lengths for s in samples])
    frames = torch.cat([s.image_lengths for s in samples])

    labels = torch.cat([s.labels for s in samples]).long()
    weights = (labels != IGNORE).float()
    if loss_weights is not None:
        weights = weights * torch.cat([w.float() for w in loss_weights])
    previous = torch.arange(labels.shape[0]) - 1
    for index, start in enumerate(starts):
        prompt = -1 if group_tensor is None else int(group_tensor[index])
        if lengths[index]:  # an empty sequence owns no row
            shared = prompt >= 0 and lengths[prompt] > 0
            previous[start] = starts[prompt] + int(lengths[prompt]) - 1 if shared else -1
    supervised = torch.nonzero((labels != IGNORE) & (previous >= 0)).squeeze(1)
    return PackedBatch(
        tokens=torch.cat([s.tokens for s in samples]).long(),
        labels=labels,
        loss_weights=weights,
        loss_rows=previous[supervised],
        targets=labels[supervised],
        target_weights=weights[supervised],
        positions=torch.cat([s.positions for s in samples], dim=1),
        cu_seqlens=cu_seqlens,
        groups=group_tensor,
        vision_slots=torch.cat(slots),
        patches=patches,
        vision_positions=torch.cat([s.vision_positions for s in samples]),
        window_order=torch.cat(orders),
        cu_windows=_offsets(windows),
        cu_images=_offsets(frames),
        grid=torch.cat([s.grid for s in samples]),
        max_seqlen=int(lengths.max()),
        max_window=int(windows.max()) if len(windows) else 0,
        max_image=int(frames.max()) if len(frames) else 0,
        sample_ids=tuple(f"{s.source}/{s.id}" for s in samples),
        flops=float(sum(s.cost.flops for s in samples)),
    )


def answer_sample(prompt: EncodedSample, tokens: Tensor, *, flops: float = 0.0) -> EncodedSample:
    """A generated answer as a sequence of its own, to stand behind its shared prompt in `pack(groups=...)`.

    Args:
        prompt: encoded with `add_generation_prompt=True`.
        tokens: (R,) integers, all of them supervised, the first one too: the prompt's last row predicts it.
        flops: training FLOPs that these tokens add to the prompt's.

    Text goes on where the prompt ends: its M-RoPE positions are the largest of the prompt's plus 1, 2, ... in all three
    channels, as transformers' `get_rope_index` has them.
    """
    ids = tokens.to(torch.int32)
    after = int(prompt.positions.max()) + 1 if len(prompt) else 0
    positions = torch.arange(after, after + ids.shape[0], dtype=torch.int32).expand(3, -1).contiguous()
    none = torch.zeros(0, dtype=torch.int32)
    return EncodedSample(
        tokens=ids,
        labels=ids,
        positions=positions,
        patches=prompt.patches[:0],
        grid=prompt.grid[:0],
        vision_slots=none,
        window_order=none,
        window_lengths=none,
        image_lengths=none,
        vision_positions=prompt.vision_positions[:0],
        cost=Cost(ids.shape[0], 0, flops),
        source=prompt.source,
        id=prompt.id,
        kind=prompt.kind,
    )


def join(prompt: EncodedSample, answer: EncodedSample) -> EncodedSample:
    """Prompt and answer as one sequence, with only the answer supervised: the layout that repeats the prompt."""
    return dataclasses.replace(
        prompt,
        tokens=torch.cat([prompt.tokens, answer.tokens]),
        labels=torch.cat([torch.full_like(prompt.labels, IGNORE), answer.labels]),
        positions=torch.cat([prompt.positions, answer.positions], dim=1),
        cost=Cost(prompt.cost.tokens + answer.cost.tokens, prompt.cost.patches, prompt.cost.flops + answer.cost.flops),
    )


def pack_groups(groups: Sequence[tuple[EncodedSample, Sequence[EncodedSample]]], *, shared: bool = True) -> PackedBatch:
    """One packed row of prompts with their answers: [prompt | answer 1 | ... | answer n | next prompt | ...].

    Args:
        groups: prompts and their answers (`answer_sample`).
        shared: each prompt, its pictures included, stands once; else once for each of its answers, which gives the same
            loss and gradients at n times the prompt's cost.

    The targets are the answers' tokens in order, in both layouts.
    """
    if not shared:
        return pack([join(prompt, answer) for prompt, answers in groups for answer in answers])
    samples: list[EncodedSample] = []
    index: list[int] = []
    for prompt, answers in groups:
        at = len(samples)
        samples += [dataclasses.replace(prompt, labels=torch.full_like(prompt.labels, IGNORE)), *answers]
        index += [-1] + [at] * len(answers)
    return pack(samples, groups=index)


def _offsets(lengths: Tensor) -> Tensor:
    """(n,) lengths -> (n + 1,) int32 offsets from 0."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    offsets[1:] = torch.cumsum(lengths, 0)
    return offsets
