"""EncodedSample and PackedBatch: the frozen objects that the loader hands to the model, and how samples are packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvst_kernels.attention.plan import AttentionPlan, prepare

IGNORE = -100  # label of an unsupervised token; the default ignore_index of torch's cross_entropy
_LISTS = ("vision_slots", "window_order", "window_lengths", "image_lengths")
_NO_IMAGES: dict[str, Any] = dict.fromkeys(_LISTS, torch.zeros(0, dtype=torch.int32))
NORMALISED = torch.zeros((0, 3))  # the pixel_stats of patches that are normalised already


@dataclass(frozen=True)
class Cost:
    """The cost of a sample: LLM tokens, vision patches, and training FLOPs (forward + backward) of both together."""

    tokens: int
    patches: int
    flops: float


@dataclass(frozen=True)
class EncodedSample:
    """One sample as integers and patches: L tokens, I images and videos, P patches, N = P / 4 merged vision tokens.

    Attributes:
        tokens: (L,) int32 token ids.
        labels: (L,) int32, not shifted; `tokens[i]` where token i is supervised, else -100. `labels[0]` is -100.
        positions: (3, L) int32 M-RoPE positions (t, h, w).
        patches: (P, 1176) in the order of the Hugging Face processor's `pixel_values`: float32 and normalised, or uint8
            pixels with their `pixel_stats`.
        grid: (I, 3) int32 patch grids (t, h, w), images and videos in reading order.
        vision_slots: (N,) int32 token index of each merged vision token, in patch order.
        window_order, window_lengths, image_lengths, vision_positions: fields of `fastvst.model.positions.VisionLayout`.
        cost: tokens, patches and FLOPs, which the packer balances.
        origin: index of the mixture's source that the sample was drawn from; -1 = none.
        source, id, kind: provenance, as in `Sample`.
        notes: reason codes of the changes that encoding made ("fov_unified", "exif_orientation_applied", ...).
        source_sizes: (width, height) of each image and video as the user gave it (as displayed, before resizing).
        sizes: (width, height) of each image and video as the model sees it; pixel coordinates in answers refer to it.
        pixel_stats: (2, 3) float32 mean and standard deviation of the channels on the 0..1 scale, for uint8
            patches; NORMALISED for others.
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
    origin: int = -1
    notes: tuple[str, ...] = ()
    source_sizes: tuple[tuple[int, int], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    pixel_stats: Tensor = NORMALISED

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class PackedBatch:
    """One packed row: S sequences of T tokens in all, W windows, F frames, P patches, N = P / 4, M supervised tokens.

    Boundaries are `cu_seqlens`; positions are data; neither is inferred from the other. Patches and their metadata are
    in *tower order* (window after window), so that the vision tower never permutes: merged token j of the tower goes to
    row `vision_slots[j]` of the decoder's input.

    Attributes:
        tokens: (T,) int64 token ids.
        labels: (T,) int64, not shifted, -100 = not supervised.
        loss_weights: (T,) float32 weight of each label (0 where not supervised).
        loss_rows: (M,) int64 row of the hidden states that predicts each supervised token. It is the row before the
            token, except for the first token of a completion with a shared prompt: the prompt's last row predicts it.
        targets: (M,) int64 token ids to predict at `loss_rows`.
        target_weights: (M,) float32, `loss_weights` of the targets.
        positions: (3, T) int32 M-RoPE positions.
        cu_seqlens: (S + 1,) int32, from 0 to T.
        origins: (S,) int32 index of the mixture's source that each sequence was drawn from; -1 = none.
        groups: (S,) int32 or None; for each sequence the index of the sequence that is its shared prompt, or -1.
        vision_slots: (N,) int64 rows of the merged vision tokens, in tower order.
        patches: (P, 1176) in tower order: float32 and normalised, or uint8 pixels with their `pixel_stats`. The
            vision tower takes `pixel_values()`.
        vision_positions: (P, 2) int32 (row, column) of each patch in its frame.
        window_order: (N,) int64; merged token j of the tower is token `window_order[j]` of the reading order.
        cu_windows, cu_images: (W + 1,) and (F + 1,) int32 patch offsets of windows and frames.
        grid: (I, 3) int32 patch grids in reading order.
        max_seqlen, max_window, max_image: length of the longest sequence (tokens), window and frame (patches).
        sample_ids: "source/id" of every sequence.
        flops: training FLOPs of the pack (sum of the samples' costs).
        pixel_stats: (2, 3) float32 or NORMALISED, as in EncodedSample.
        plan, image_plan: attention tables that `with_plans` adds. They are no fields: `dataclasses.replace` drops them.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    loss_rows: Tensor
    targets: Tensor
    target_weights: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    origins: Tensor
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
    pixel_stats: Tensor = NORMALISED
    plan: ClassVar[AttentionPlan | None] = None
    image_plan: ClassVar[AttentionPlan | None] = None

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

    def _map(self, fn: Callable[[Any], Any]) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: fn(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)._planned(*(p and fn(p) for p in (self.plan, self.image_plan)))

    def _planned(self, *plans: AttentionPlan | None) -> PackedBatch:
        calls = (("plan", self.cu_seqlens, self.groups), ("image_plan", self.cu_images, None))
        for (name, offsets, groups), plan in zip(calls, plans, strict=True):
            object.__setattr__(self, name, plan)
            if plan is not None:
                plan.trust(offsets, groups)
        return self

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedBatch:
        """The same batch on `device`, with plans unless it is the CPU; asynchronous if the memory is pinned."""
        batch = self if torch.device(device).type == "cpu" else self.with_plans()
        return batch._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, with plans. A thread of torch's DataLoader calls it where a GPU is."""
        return self.with_plans()._map(lambda value: value.pin_memory())

    def with_plans(self) -> PackedBatch:
        """The same batch with tile tables for the attention kernels of all layers, if it is on the CPU."""
        if self.plan is not None or self.device.type != "cpu":
            return self
        images = prepare(self.cu_images, causal=False) if self.num_patches else None
        return dataclasses.replace(self)._planned(prepare(self.cu_seqlens, self.groups, causal=True), images)

    def pixel_values(self) -> Tensor:
        """(P, 1176) normalised patches, float32 where they were uint8, computed where the batch is.

        A pixel is a byte on its way through shared memory and PCIe, a quarter of its float32. Nothing waits for the
        host. The values are those of `(u8 / 255 - mean) / std`, to the rounding of float32.
        """
        if self.patches.dtype != torch.uint8:
            return self.patches
        if not len(self.pixel_stats):
            raise ValueError("the patches are uint8 pixels and the batch has no pixel_stats to normalise them with")
        count, values = self.patches.shape
        channels = self.pixel_stats.shape[1]
        mean, std = self.pixel_stats[:, None, :, None]
        # in place: the pixels of 16,384 vision tokens are 308 MB in float32
        found = self.patches.view(count, channels, values // channels).float().div_(255).sub_(mean).div_(std)
        return found.view(count, values)

    def equal(self, other: PackedBatch) -> bool:
        """Whether every field is equal; tensors must agree in dtype and in every bit."""
        for f in dataclasses.fields(self):
            a = getattr(self, f.name)
            b = getattr(other, f.name)
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
                    return False
            elif a != b:
                return False
        return True

    def sum_by_origin(self, values: Tensor, count: int) -> Tensor:
        """(count,) float64 sums of one value for each supervised token over the sources; does not wait for the device.

        Args:
            values: (M,) floats, such as losses.
            count: number of sources; tokens of samples without one of these origins are left out.
        """
        sequence = torch.searchsorted(self.cu_seqlens, self.loss_rows.int(), right=True, out_int32=True) - 1
        place = torch.where(self.origins < count, self.origins, -1)[sequence.long()].long() + 1
        sums = torch.zeros(count + 1, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, place, values.double())[1:]

    def describe(self) -> str:
        """One line for logs: sequences, tokens, supervised tokens, images, patches, longest sequence."""
        return (
            f"{len(self.sample_ids)} sequences, {self.num_tokens} tokens ({self.num_targets} supervised, "
            f"{self.vision_slots.shape[0]} vision), {self.num_images} images, {self.num_patches} patches, "
            f"longest {self.max_seqlen}, {self.flops / 1e12:.3g} TFLOP"
        )

    def validate(self) -> None:
        """Check every invariant that the model relies on. It reads the tensors' values, so call it on the CPU.

        Raises:
            ValueError: the message names the field, what came and what was expected.
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
                raise ValueError(f"{name} must be rows 0..{total - 1}; got {int(slots.min())}..{int(slots.max())}")
        if self.vision_slots.unique().numel() != merged:
            raise ValueError("vision_slots names a row twice")
        sequences = self.cu_seqlens.numel() - 1
        if len(self.sample_ids) != sequences:
            raise ValueError(f"{len(self.sample_ids)} sample_ids for {sequences} sequences")
        if self.patches.dtype == torch.uint8 and not len(self.pixel_stats):
            raise ValueError("the patches are uint8 pixels and the batch has no pixel_stats to normalise them with")
        if self.groups is not None:
            _validate_groups(self.groups, sequences)


def _validate_groups(groups: Tensor, sequences: int) -> None:
    if tuple(groups.shape) != (sequences,):
        raise ValueError(f"groups has shape {tuple(groups.shape)}; expected ({sequences},)")
    for index, prompt in enumerate(groups.tolist()):
        if prompt == -1:
            continue
        if not 0 <= prompt < index:
            raise ValueError(f"groups[{index}] is {prompt}; a shared prompt must come before its completions")
        if groups[prompt] != -1:
            raise ValueError(f"groups[{index}] names sequence {prompt}, which is itself a completion")
        if any(g != prompt for g in groups[prompt + 1 : index].tolist()):
            raise ValueError(f"groups[{index}]: expected [prompt | completion 1 | ... | n] without gaps")


def pack(
    samples: Sequence[EncodedSample],
    *,
    groups: Sequence[int] | None = None,
    loss_weights: Sequence[Tensor] | None = None,
) -> PackedBatch:
    """Concatenate encoded samples into one packed row, in the given order. Nothing is truncated or padded.

    Args:
        samples: the sequences; with `groups`, prompts and completions are sequences of their own.
        groups: for each sample the index of the sample that is its shared prompt, or -1 ([prompt | completions...]).
        loss_weights: one (L,) float tensor for each sample; default 1 for every supervised token.

    Raises:
        ValueError: no samples, an invalid `groups`, or patches of different kinds.
    """
    if not samples:
        raise ValueError("pack() needs at least one encoded sample; got none")
    prompts = None
    if groups is not None:
        prompts = torch.tensor(list(groups), dtype=torch.int32)
        _validate_groups(prompts, len(samples))
    lengths = torch.tensor([len(s) for s in samples])
    cu_seqlens = _offsets(lengths)
    labels = torch.cat([s.labels for s in samples]).long()
    weights = (labels != IGNORE).float()
    if loss_weights is not None:
        weights = weights * torch.cat([w.float() for w in loss_weights])
    previous = _predicting_rows(lengths, cu_seqlens, prompts)
    supervised = torch.nonzero((labels != IGNORE) & (previous >= 0)).squeeze(1)
    patches, vision_slots, window_order = _in_tower_order(samples, cu_seqlens)
    windows = torch.cat([s.window_lengths for s in samples])
    frames = torch.cat([s.image_lengths for s in samples])
    return PackedBatch(
        tokens=torch.cat([s.tokens for s in samples]).long(),
        labels=labels,
        loss_weights=weights,
        loss_rows=previous[supervised],
        targets=labels[supervised],
        target_weights=weights[supervised],
        positions=torch.cat([s.positions for s in samples], dim=1),
        cu_seqlens=cu_seqlens,
        origins=torch.tensor([s.origin for s in samples], dtype=torch.int32),
        groups=prompts,
        vision_slots=vision_slots,
        patches=patches,
        vision_positions=torch.cat([s.vision_positions for s in samples]),
        window_order=window_order,
        cu_windows=_offsets(windows),
        cu_images=_offsets(frames),
        grid=torch.cat([s.grid for s in samples]),
        max_seqlen=int(lengths.max()),
        max_window=int(windows.max()) if len(windows) else 0,
        max_image=int(frames.max()) if len(frames) else 0,
        sample_ids=tuple(f"{s.source}/{s.id}" for s in samples),
        flops=float(sum(s.cost.flops for s in samples)),
        pixel_stats=_leading(samples).pixel_stats,
    )


def _predicting_rows(lengths: Tensor, cu_seqlens: Tensor, prompts: Tensor | None) -> Tensor:
    """(T,) int64 row that predicts each token; -1 for the first token of a sequence without a shared prompt.

    Args:
        lengths: (S,) tokens of each sequence.
        cu_seqlens: (S + 1,) their offsets.
        prompts: (S,) index of each sequence's shared prompt or -1; None if no prompt is shared.
    """
    rows = torch.arange(int(cu_seqlens[-1])) - 1
    starts = cu_seqlens[:-1].tolist()
    for index, start in enumerate(starts):
        if lengths[index]:  # an empty sequence has no first token
            prompt = -1 if prompts is None else int(prompts[index])
            shared = prompt >= 0 and lengths[prompt] > 0
            rows[start] = starts[prompt] + int(lengths[prompt]) - 1 if shared else -1
    return rows


def _leading(samples: Sequence[EncodedSample]) -> EncodedSample:
    """The first sample with images (without any: the first one), whose kind of patches the pack has.

    Raises:
        ValueError: a sample whose patches have another dtype or other pixel_stats.
    """
    shown = [s for s in samples if s.patches.shape[0]]
    first = shown[0] if shown else samples[0]
    for one in shown[1:]:
        a = first.pixel_stats
        b = one.pixel_stats
        if not torch.equal(a, b) or one.patches.dtype != first.patches.dtype:
            raise ValueError(
                f"{one.source}/{one.id} has {one.patches.dtype} patches with pixel_stats {b.tolist()}, "
                f"{first.source}/{first.id} has {first.patches.dtype} with {a.tolist()}; encode both with one processor"
            )
    return first


def _in_tower_order(samples: Sequence[EncodedSample], cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, patch_dim) patches, (N,) vision slots and (N,) window order of a pack; see PackedBatch."""
    # Patches are nearly all of a pack's bytes. Permuting each sample's patches straight into their place takes half the
    # time of permuting and then concatenating.
    first = _leading(samples).patches
    patches = torch.empty((sum(s.patches.shape[0] for s in samples), first.shape[1]), dtype=first.dtype)
    slots = []
    orders = []
    merged_before = 0
    row = 0
    for sample, start in zip(samples, cu_seqlens[:-1].tolist(), strict=True):
        order = sample.window_order.long()
        merged = order.shape[0]
        rows = sample.patches.shape[0]
        slots.append(sample.vision_slots.long()[order] + start)
        orders.append(order + merged_before)
        if merged:
            place = patches[row : row + rows].view(merged, -1)
            torch.index_select(sample.patches.view(merged, -1), 0, order, out=place)
        merged_before += merged
        row += rows
    return patches, torch.cat(slots), torch.cat(orders)


def completion_sample(prompt: EncodedSample, tokens: Tensor, *, flops: float = 0.0) -> EncodedSample:
    """A sampled completion as a sequence of its own, which follows its shared prompt in `pack(groups=...)`.

    Its M-RoPE positions are the prompt's largest position plus 1, 2, ... in all three channels, as in transformers'
    `get_rope_index`.

    Args:
        prompt: encoded with `add_generation_prompt=True`.
        tokens: (R,) integers. All are supervised, the first one included: the prompt's last row predicts it.
        flops: training FLOPs that these tokens add to the prompt's.
    """
    ids = tokens.to(torch.int32)
    after = int(prompt.positions.max()) + 1 if len(prompt) else 0
    positions = torch.arange(after, after + ids.shape[0], dtype=torch.int32).expand(3, -1).contiguous()
    return EncodedSample(
        tokens=ids,
        labels=ids,
        positions=positions,
        patches=prompt.patches[:0],
        grid=prompt.grid[:0],
        **_NO_IMAGES,
        vision_positions=prompt.vision_positions[:0],
        cost=Cost(ids.shape[0], 0, flops),
        source=prompt.source,
        id=prompt.id,
        kind=prompt.kind,
        pixel_stats=prompt.pixel_stats,
    )


def empty_sample() -> EncodedSample:
    """One unsupervised token. It fills a pack without usable samples, so that all ranks make the same steps."""
    return EncodedSample(
        tokens=torch.zeros(1, dtype=torch.int32),
        labels=torch.full((1,), IGNORE, dtype=torch.int32),
        positions=torch.zeros((3, 1), dtype=torch.int32),
        patches=torch.zeros((0, 1176)),
        grid=torch.zeros((0, 3), dtype=torch.int32),
        **_NO_IMAGES,
        vision_positions=torch.zeros((0, 2), dtype=torch.int32),
        cost=Cost(1, 0, 0.0),
        source="fastvst",
        id="empty",
    )


def join(prompt: EncodedSample, completion: EncodedSample) -> EncodedSample:
    """Prompt and completion as one sequence in which only the completion is supervised."""
    return dataclasses.replace(
        prompt,
        tokens=torch.cat([prompt.tokens, completion.tokens]),
        labels=torch.cat([torch.full_like(prompt.labels, IGNORE), completion.labels]),
        positions=torch.cat([prompt.positions, completion.positions], dim=1),
        cost=Cost(
            prompt.cost.tokens + completion.cost.tokens,
            prompt.cost.patches,
            prompt.cost.flops + completion.cost.flops,
        ),
    )


def pack_groups(groups: Sequence[tuple[EncodedSample, Sequence[EncodedSample]]], *, shared: bool = True) -> PackedBatch:
    """One packed row of prompts with their completions: [prompt | completion 1 | ... | completion n | prompt | ...].

    Args:
        groups: prompts and their completions (`completion_sample`).
        shared: True: each prompt, images included, is in the row once. False: it is repeated before each of its
            completions, which gives the same loss and gradients at n times the prompt's cost.

    The targets are the completions' tokens in order, in both layouts.
    """
    if not shared:
        return pack([join(prompt, one) for prompt, completions in groups for one in completions])
    samples: list[EncodedSample] = []
    index: list[int] = []
    for prompt, completions in groups:
        at = len(samples)
        samples += [dataclasses.replace(prompt, labels=torch.full_like(prompt.labels, IGNORE)), *completions]
        index += [-1] + [at] * len(completions)
    return pack(samples, groups=index)


def _offsets(lengths: Tensor) -> Tensor:
    """(n,) lengths -> (n + 1,) int32 offsets from 0."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    offsets[1:] = torch.cumsum(lengths, 0)
    return offsets
